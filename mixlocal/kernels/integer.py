"""What the compiled kernels compute with four-bit and int8 weights, in PyTorch, to the bit.

Activations become whole numbers from -127 to 127, one scale per token and block of 64 columns. A codebook becomes
whole steps of 1/s of the block's absmax. Products within a block add up as whole numbers, exactly; block b is added as
float32 to the running sum b % 8 of eight. So the result is the same on every instruction set, for any number of tokens
and of threads.

T = tokens, R = rows, C = columns, B = blocks per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch.nn.functional import pad

from mixlocal.quant.format import BLOCK_SIZE, CODEBOOKS, QuantTensor
from mixlocal.quant.packing import unpack_nibbles

LARGEST = 127
RUNNING_SUMS = 8
SMALLEST = 1e-36  # a block of activations whose largest is below this counts as zero


@dataclass(frozen=True, slots=True)
class IntegerCodebook:
    """levels: int8 [16].  step: levels * step are the codebook's numbers, each to within `error`."""

    levels: torch.Tensor
    step: float
    error: float


@cache
def integer_codebook(kind: str) -> IntegerCodebook:
    """The number of steps in [64, 127] at which the codebook's numbers, rounded to whole steps, are off the least."""
    exact = torch.tensor(CODEBOOKS[kind], dtype=torch.float64)

    def error(steps: int) -> float:
        return float((exact - (exact * steps).round() / steps).square().sum())

    best = min(range(64, LARGEST + 1), key=lambda steps: (error(steps), -steps))
    levels = (exact * best).round().to(torch.int8)
    step = torch.tensor(1.0 / best, dtype=torch.float32)
    return IntegerCodebook(levels, step.item(), float((exact - levels * step.double()).abs().max()))


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 x [T, C] -> whole numbers, float32 [T, B, 64] padded with zeros, and scales [T, B].

    Each number of a block is off by at most half a scale, that is 1/254 of the block's largest. A block with a NaN or
    an infinity has a NaN for a scale.
    """
    blocks = pad(x, (0, -x.shape[1] % BLOCK_SIZE)).view(len(x), -1, BLOCK_SIZE)
    largest = blocks.abs().amax(-1)
    inverse = torch.where(largest < SMALLEST, 0.0, torch.full_like(largest, LARGEST) / largest)
    scales = torch.where(largest < SMALLEST, 0.0, largest / LARGEST)
    finite = largest.isfinite()
    whole = torch.where(finite.unsqueeze(-1), (blocks * inverse.unsqueeze(-1)).round(), 0.0)
    return whole, torch.where(finite, scales, torch.nan)


def integer_linear(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """float32 x [T, C] -> float32 [T, R], the very bits of `CpuKernels.linear` for four-bit and int8 weights."""
    whole, scales = quantize_activations(x)
    rows, columns = weight.shape
    if weight.spec.four_bit:
        book = integer_codebook(weight.spec.kind)
        codes = book.levels[unpack_nibbles(weight.codes).long()]
        scales, block_scales = scales * book.step, weight.scales.float()
        row_scales = torch.ones(rows)
    else:
        codes, block_scales, row_scales = weight.codes, torch.ones(rows, whole.shape[1]), weight.scales.flatten()
    packed = pad(codes.float(), (0, -columns % BLOCK_SIZE)).view(rows, -1, BLOCK_SIZE)
    sums = torch.zeros(RUNNING_SUMS, len(x), rows)
    for block in range(whole.shape[1]):
        products = whole[:, block] @ packed[:, block].T  # exact: whole numbers below 2^24
        sums[block % RUNNING_SUMS] += products * (block_scales[:, block] * scales[:, block, None])
    low, high = (sums[0] + sums[1]) + (sums[4] + sums[5]), (sums[2] + sums[3]) + (sums[6] + sums[7])
    return (low + high) * row_scales


def integer_error(x: torch.Tensor, weight: QuantTensor, exact: torch.Tensor) -> torch.Tensor:
    """Bound [T, R] on how far `integer_linear` is from x @ exact.T, where `exact` [R, C] is what `weight` stands for.

    Rounding moves each activation by at most half a scale of its block and each weight by at most the codebook's error
    times its absmax; blocks of activations below SMALLEST are lost; the rest is float32's own rounding.
    """
    whole, scales = quantize_activations(x)
    padded = pad(exact, (0, -exact.shape[1] % BLOCK_SIZE)).view(len(exact), -1, BLOCK_SIZE).abs()
    bound = torch.einsum("tb,rb->tr", scales / 2, padded.sum(-1))
    sizes = whole.abs().sum(-1) * scales
    if weight.spec.four_bit:
        bound += integer_codebook(weight.spec.kind).error * (sizes @ weight.scales.float().T)
    bound += 1e-6 * torch.einsum("tb,rb->tr", sizes, padded.amax(-1))
    return bound + SMALLEST * (1 + padded.sum((-1, -2)))
