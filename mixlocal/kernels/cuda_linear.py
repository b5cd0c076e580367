"""Products on a GPU by the programs of `cuda_programs`, chosen by format and number of tokens."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from mixlocal.kernels import cuda_programs as programs
from mixlocal.kernels.integer import integer_codebook
from mixlocal.quant.format import BLOCK_SIZE, ExpertWeights, QuantSpec, QuantTensor, Weight

FEW_TOKENS = 4  # multiplied one by one: the weights stay in the GPU's cache meanwhile
RUN = 8  # blocks that are read together
MANY: dict[str, Any] = {"m": 32, "n": 64, "num_warps": 8, "num_stages": 2}
FEW: dict[str, Any] = {"n": 16, "num_warps": 4, "num_stages": 3}
BFLOAT16: dict[str, Any] = {"m": 16, "n": 32, "k": 128, "num_warps": 4, "num_stages": 3}
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


class Quantized:
    """Activations as whole numbers: codes int8 [T, B * 64], scales float32 [T, B], B a multiple of 8.

    totals: for affine weights, float32 [T, B * 64 / block size], the sums of whole numbers that share a zero.
    """

    __slots__ = ("codes", "kind", "scales", "totals")

    def __init__(self, x: torch.Tensor, weight: QuantTensor, up: torch.Tensor | None = None) -> None:
        """x [T, C], or silu(x) * up, as `weight` meets it."""
        (tokens, columns), spec = x.shape, weight.spec
        blocks = -(-columns // (RUN * BLOCK_SIZE)) * RUN
        self.kind = spec.kind
        self.codes = torch.empty(tokens, blocks * BLOCK_SIZE, dtype=torch.int8, device=x.device)
        self.scales = torch.empty(tokens, blocks, device=x.device)
        self.totals = self.scales  # which stand in where there are none
        if spec.affine:
            self.totals = torch.empty(tokens, blocks * BLOCK_SIZE // spec.block_size, device=x.device)
        step = integer_codebook(self.kind).step if _planes(spec) == 1 else 1.0
        _launch(
            programs.quantize_rows, (tokens, blocks // RUN), x, x if up is None else up, self.codes, self.scales,
            self.totals, columns, blocks, step, swiglu=up is not None, piece=spec.block_size if spec.four_bit else 0,
            summed=spec.affine, num_warps=1, **EXACT,
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
    tokens, (rows, columns), planes = len(x.codes), weight.shape, _planes(weight.spec)
    codes, scales = weight.codes.contiguous(), weight.scales.contiguous()
    levels = _levels(weight.spec.kind, codes.device) if planes == 1 else codes
    out = torch.empty(tokens, rows, device=codes.device)
    operands = (codes, scales, levels, x.codes, x.scales, x.totals, out)
    sizes = (rows, codes.shape[1], -(-columns // BLOCK_SIZE), x.scales.shape[1])
    if tokens <= FEW_TOKENS:
        grid = (-(-rows // FEW["n"]), tokens)
        _launch(programs.multiply_few, grid, *operands, *sizes, planes=planes, **FEW, **EXACT)
    else:
        grid = (-(-tokens // MANY["m"]), -(-rows // MANY["n"]))
        _launch(programs.multiply_many, grid, *operands, tokens, *sizes, planes=planes, **MANY, **EXACT)
    return out


def expert(x: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """w2(silu(w1 x) * (w3 x)), each in any quantized format, float32 [N, D] -> [N, D], the bits of `CpuKernels`."""
    w1, w3, w2 = weights.w1, weights.w3, weights.w2
    assert isinstance(w1, QuantTensor)
    assert isinstance(w3, QuantTensor)
    assert isinstance(w2, QuantTensor)
    x = x.contiguous()
    rows = Quantized(x, w1)
    gate = multiply_quantized(rows, w1)
    up = multiply_quantized(rows if w3.spec.kind == w1.spec.kind else Quantized(x, w3), w3)
    return multiply_quantized(Quantized(gate, w2, up), w2)


def _planes(spec: QuantSpec) -> int:
    """As the programs take it."""
    return spec.planes if spec.four_bit else 0


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
