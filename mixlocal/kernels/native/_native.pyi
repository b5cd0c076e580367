"""Signatures of the compiled module. It trusts its callers: arrays are addresses of contiguous memory.

T tokens, D model dimension, R rows, C columns, B blocks of 64 per row, K experts per token, d head dimension. `kind` is
one of the constants. Objects made with an `owner` keep it, and so the arrays behind their addresses, alive.
"""

FOUR_BIT: int
AFFINE: int
INT8: int
BF16: int
FLOAT: int

def available_isas() -> list[str]:
    """What this machine can run, best first."""

def threads() -> int:
    """Threads that share the work, the caller's included."""

def set_threads(count: int, /) -> None: ...

class Matrix:
    """[R, C]: codes uint8 [R, C/2], scales f16 or f32 [R, planes * B] | int8 [R, C], f32 [R] | bf16 or f32 [R, C].

    fine: blocks of 32, only for AFFINE. levels: int8 [16] and what one step of them stands for, only for FOUR_BIT.
    """

    def __init__(
        self,
        kind: int,
        rows: int,
        columns: int,
        codes: int,
        scales: int,
        half_scales: bool,
        fine: bool,
        levels: int,
        step: float,
        /,
    ) -> None: ...

class Expert:
    def __init__(self, w1: Matrix, w3: Matrix, w2: Matrix, owner: object, /) -> None: ...

class Attention:
    """norm: f32 [D]. window: 0 for none."""

    def __init__(
        self,
        norm: int,
        eps: float,
        q: Matrix,
        k: Matrix,
        v: Matrix,
        o: Matrix,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        window: int,
        owner: object,
        /,
    ) -> None: ...

class Router:
    """norm: f32 [D]. weight: f32 [experts, D]."""

    def __init__(
        self, norm: int, eps: float, weight: int, dim: int, experts: int, top_k: int, owner: object, /
    ) -> None: ...

class Kernels:
    def __init__(self, isa: str, /) -> None: ...
    def linear(self, weight: Matrix, x: int, tokens: int, out: int, /) -> None:
        """x f32 [T, C] -> out f32 [T, R]."""

    def norm_linear(self, norm: int, eps: float, weight: Matrix, x: int, tokens: int, out: int, /) -> None:
        """The same of normalised rows; norm f32 [C]."""

    def attention(
        self,
        layer: Attention,
        hidden: int,
        count: int,
        starts: int,
        counts: int,
        pages: int,
        most_pages: int,
        cos: int,
        sin: int,
        keys: int,
        values: int,
        value_stride: int,
        half: bool,
        /,
    ) -> None:
        """hidden f32 [T, D] += attention of `count` sequences; starts and counts int64 [count], pages int64 [count,
        most_pages], cos and sin f32 [T, d] as in `mixlocal.kernels.Step`; keys and values as in `KeyValues`."""

    def route(self, router: Router, hidden: int, tokens: int, normed: int, ids: int, weights: int, /) -> None:
        """hidden f32 [T, D] -> normed f32 [T, D], ids int64 [T, K], weights f32 [T, K]."""

    def moe_ffn(
        self, x: int, dim: int, tokens: int, ids: int, weights: int, top_k: int, experts: dict[int, object], out: int, /
    ) -> int | None:
        """x f32 [T, D], ids int64 [T, K], weights f32 [T, K]: out f32 [T, D] += the experts.

        Returns None, or the id of a chosen expert that is not in `experts`, or not of the width of the others; then
        nothing is done.
        """

    def read(self, data: int, nbytes: int, /) -> float:
        """Reads every byte with all threads; nbytes a multiple of 2^18."""

    def quantize(
        self,
        kind: int,
        rows: int,
        columns: int,
        source: int,
        bf16: bool,
        codebook: int,
        codes: int,
        scales: int,
        half_scales: bool,
        fine: bool,
        search: bool,
        importance: int,
        /,
    ) -> tuple[float, float, int]:
        """source bf16 or f32 [R, C] -> codes and scales as in `Matrix`; codebook f32 [16]; importance f32 [C] or 0.

        Returns the sums of squares of the error and of the source, and the flat index of the first NaN or infinity, or
        -1.
        """
