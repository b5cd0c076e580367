"""Products on a GPU by the programs of `cuda_programs`, chosen by format and number of tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from mixlocal.kernels import cuda_programs as programs
from mixlocal.kernels.integer import integer_codebook
from mixlocal.quant.format import BLOCK_SIZE, ExpertWeights, QuantTensor, Weight

FEW_TOKENS = 4  # multiplied one by one: the weights stay in the GPU's cache meanwhile
RUN = 8  # blocks that are read together
MANY: dict[str, Any] = {"m": 32, "n": 64, "num_warps": 8, "num_stages": 2}
FEW: dict[str, Any] = {"n": 16, "num_warps": 4, "num_stages": 3}
BFLOAT16: dict[str, Any] = {"m": 16, "n": 32, "k": 128, "num_warps": 4, "num_stages": 3}
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


class Quantized:
    """Activations as whole numbers: codes int8 [T, B * 64], scales float32 [T, B], B a multiple of 8."""

    __slots__ = ("codes", "kind", "scales")

    def __init__(self, x: torch.Tensor, weight: QuantTensor, up: torch.Tensor | None = None) -> None:
        """x [T, C], or silu(x) * up, as `weight` meets it."""
        tokens, columns = x.shape
        blocks = -(-columns // (RUN * BLOCK_SIZE)) * RUN
        self.kind = weight.spec.kind
        self.codes = torch.empty(tokens, blocks * BLOCK_SIZE, dtype=torch.int8, device=x.device)
        self.scales = torch.empty(tokens, blocks, device=x.device)
        four_bit = weight.spec.four_bit
        step = integer_codebook(self.kind).step if four_bit else 1.0
        _launch(
            programs.quantize_rows, (tokens, blocks // RUN), x, x if up is None else up, self.codes, self.scales,
            columns, blocks, step, swiglu=up is not None, paired=four_bit, num_warps=1, **EXACT,
        )  # fmt: skip


def multiply(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    """float32 x [T, C] -> float32 [T, R]; weight: four bits, int8 or bfloat16."""
    x = x.contiguous()
    if isinstance(weight, QuantTensor):
        return multiply_quantized(Quantized(x, weight), weight)
    out = torch.empty(len(x), len(weight), device=x.device)
    grid = (-(-len(weight) // BFLOAT16["n"]), -(-len(x) // BFLOAT16["m"]))
    _launch(programs.multiply_bfloat16, grid, weight.contiguous(), x, out, len(x), *weight.shape, **BFLOAT16, **EXACT)
    return out


def multiply_quantized(x: Quantized, weight: QuantTensor) -> torch.Tensor:
    """The bits of `integer_linear`."""
    tokens, (rows, columns), four_bit = len(x.codes), weight.shape, weight.spec.four_bit
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    levels = _levels(weight.spec.kind, codes.device) if four_bit else codes
    out = torch.empty(tokens, rows, device=codes.device)
    operands = (codes, scales, levels, x.codes, x.scales, out)
    sizes = (rows, codes.shape[1], -(-columns // BLOCK_SIZE), x.scales.shape[1])
    if tokens <= FEW_TOKENS:
        grid = (-(-rows // FEW["n"]), tokens)
        _launch(programs.multiply_few, grid, *operands, *sizes, four_bit=four_bit, **FEW, **EXACT)
    else:
        grid = (-(-tokens // MANY["m"]), -(-rows // MANY["n"]))
        _launch(programs.multiply_many, grid, *operands, tokens, *sizes, four_bit=four_bit, **MANY, **EXACT)
    return out


def expert(x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """w2(silu(w1 x) * (w3 x)) of four-bit or int8 weights, float32 [N, D] -> [N, D], the bits of `CpuKernels`."""
    w1, w3, w2 = weights.w1, weights.w3, weights.w2
    assert isinstance(w1, QuantTensor)
    assert isinstance(w3, QuantTensor)
    assert isinstance(w2, QuantTensor)
    rows = Quantized(x.contiguous(), w1)
    gate, up = multiply_quantized(rows, w1), multiply_quantized(rows, w3)
    return multiply_quantized(Quantized(gate, w2, up), w2)


@cache
def _levels(kind: str, device: torch.device) -> torch.Tensor:
    """int16 [256]: the level of a byte's high nibble, times 256, with that of its low nibble in the low byte."""
    levels = integer_codebook(kind).levels.to(torch.int16)
    return ((levels[:, None] << 8) | (levels[None, :] & 0xFF)).flatten().to(device)


def _launch(program: Any, grid: tuple[int, ...], first: torch.Tensor, /, *others: Any, **constants: Any) -> None:
    """On the GPU that `first` is on and the stream that PyTorch computes on there."""
    if not all(grid):
        return
    with torch.cuda.device(first.device if first.is_cuda else -1):  # Triton asks for the current one; -1: as it is
        program[grid](first, *others, **constants)
