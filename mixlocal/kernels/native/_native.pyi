"""Signatures of the compiled module. Arrays are contiguous CPU tensors; ValueError names the one that does not fit.

R rows, C columns, T tokens, B blocks of 64 per row. `isa` is one of `available_isas()`.
"""

from torch import Tensor

def available_isas() -> list[str]:
    """What this machine can run, best first."""

def threads() -> int:
    """Threads that share the work, the caller's included."""

def set_threads(count: int) -> None: ...
def linear_4bit(isa: str, x: Tensor, codebook: Tensor, codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """x f32 [T, C], codebook f32 [16], codes uint8 [R, C/2], scales f16 or f32 [R, B] -> out f32 [T, R]."""

def linear_int8(isa: str, x: Tensor, codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """x f32 [T, C], codes int8 [R, C], scales f32 [R, 1] -> out f32 [T, R]."""

def linear_bf16(isa: str, x: Tensor, weight: Tensor, out: Tensor) -> None:
    """x f32 [T, C], weight bf16 [R, C] -> out f32 [T, R]."""

def quantize_4bit(
    isa: str, weights: Tensor, codebook: Tensor, codes: Tensor, scales: Tensor
) -> tuple[float, float, int]:
    """weights bf16 or f32 [R, C] -> codes uint8 [R, C/2], scales f16 or f32 [R, B].

    Returns the sums of squares of the error and of the weights, and the flat index of the first NaN or infinity or -1.
    """

def quantize_int8(isa: str, weights: Tensor, codes: Tensor, scales: Tensor) -> tuple[float, float, int]:
    """weights bf16 or f32 [R, C] -> codes int8 [R, C], scales f32 [R, 1]; returns as `quantize_4bit`."""
