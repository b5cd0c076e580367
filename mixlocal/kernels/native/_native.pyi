"""Signatures of the compiled module. It trusts its callers: arrays are addresses of contiguous memory.

R rows, C columns, T tokens, B blocks of 64 per row. `isa` is one of `available_isas()`, `kind` one of the constants.
"""

FOUR_BIT: int
INT8: int
BF16: int

def available_isas() -> list[str]:
    """What this machine can run, best first."""

def threads() -> int:
    """Threads that share the work, the caller's included."""

def set_threads(count: int, /) -> None: ...
def linear(
    isa: str,
    kind: int,
    rows: int,
    columns: int,
    codes: int,
    scales: int,
    half_scales: bool,
    codebook: int,
    x: int,
    tokens: int,
    out: int,
    /,
) -> None:
    """x f32 [T, C] -> out f32 [T, R].

    codes uint8 [R, C/2], scales f16 or f32 [R, B], codebook f32 [16] | int8 [R, C], f32 [R] | bf16 [R, C].
    """

def quantize(
    isa: str,
    kind: int,
    rows: int,
    columns: int,
    source: int,
    bf16: bool,
    codebook: int,
    codes: int,
    scales: int,
    half_scales: bool,
    /,
) -> tuple[float, float, int]:
    """source bf16 or f32 [R, C] -> codes and scales as for `linear`.

    Returns the sums of squares of the error and of the source, and the flat index of the first NaN or infinity or -1.
    """
