"""What the compiled kernels compute with four-bit and int8 weights, in PyTorch, to the bit.

Activations become whole numbers from -127 to 127, one scale per token and block of 64 columns. A codebook becomes
whole steps of 1/s of the block's absmax. Products within a block add up as whole numbers, exactly; block b is added as
float32 to the running sum b % 8 of eight. An affine weight's block adds (s * P + z * S) times the activations' scale, P
being the sum of codes times whole numbers and S that of the whole numbers; halves with scales of their own are added up
before that. So the result is the same on every instruction set, for any number of tokens and of threads.

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
    if weight.spec.affine:
        return _add_up(_affine_blocks(whole, weight) * scales.T.unsqueeze(-1))
    if weight.spec.four_bit:
        book = integer_codebook(weight.spec.kind)
        codes = book.levels[unpack_nibbles(weight.codes).long()]
        scales, block_scales = scales * book.step, weight.scales.float()
        row_scales = torch.ones(rows)
    else:
        codes, block_scales, row_scales = weight.codes, torch.ones(rows, whole.shape[1]), weight.scales.flatten()
    packed = pad(codes.float(), (0, -columns % BLOCK_SIZE)).view(rows, -1, BLOCK_SIZE)
    products = torch.einsum("tbc,rbc->btr", whole, packed)  # exact: whole numbers below 2^24
    return _add_up(products * (block_scales.T.unsqueeze(1) * scales.T.unsqueeze(-1))) * row_scales


def _affine_blocks(whole: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """whole [T, B, 64] -> s * P + z * S of every block, halves added up, float32 [B, T, R]."""
    rows, columns = weight.shape
    blocks, size = whole.shape[1], weight.spec.block_size
    halves = BLOCK_SIZE // size
    codes = pad(unpack_nibbles(weight.codes).float(), (0, -columns % BLOCK_SIZE)).view(rows, blocks, halves, size)
    planes = weight.scales.float().view(rows, 2, halves, blocks)
    numbers = whole.view(len(whole), blocks, halves, size)
    products = torch.einsum("tbhc,rbhc->hbtr", numbers, codes)
    totals = numbers.sum(-1).permute(2, 1, 0).unsqueeze(-1)  # [h, B, T, 1]
    scale, zero = planes.permute(1, 2, 3, 0).unsqueeze(3)  # each [h, B, 1, R]
    parts = products * scale + totals * zero
    whole_blocks: torch.Tensor = parts[0] if halves == 1 else parts[0] + parts[1]
    return whole_blocks


def _add_up(blocks: torch.Tensor) -> torch.Tensor:
    """float32 [B, T, R] -> [T, R], in the order of the kernels."""
    sums = torch.zeros(RUNNING_SUMS, *blocks.shape[1:])
    for number, block in enumerate(blocks):
        sums[number % RUNNING_SUMS] += block
    low, high = (sums[0] + sums[1]) + (sums[4] + sums[5]), (sums[2] + sums[3]) + (sums[6] + sums[7])
    return low + high


def integer_error(x: torch.Tensor, weight: QuantTensor, exact: torch.Tensor) -> torch.Tensor:
    """Bound [T, R] on how far `integer_linear` is from x @ exact.T, where `exact` [R, C] is what `weight` stands for.

    Rounding moves each activation by at most half a scale of its block and each weight by at most the codebook's error
    times its absmax; blocks of activations below SMALLEST are lost; the rest is float32's own rounding.
    """
    whole, scales = quantize_activations(x)
    padded = pad(exact, (0, -exact.shape[1] % BLOCK_SIZE)).view(len(exact), -1, BLOCK_SIZE).abs()
    bound = torch.einsum("tb,rb->tr", scales / 2, padded.sum(-1))
    sizes = whole.abs().sum(-1) * scales
    if weight.spec.affine:  # the rounding of z * S and of s * P, which may be much larger than their sum
        planes = weight.scales.float().abs().view(len(exact), 2, -1, whole.shape[1])
        bound += 4e-7 * torch.einsum("tb,rb->tr", sizes, 15 * planes[:, 0].amax(1) + planes[:, 1].amax(1))
    elif weight.spec.four_bit:
        bound += integer_codebook(weight.spec.kind).error * (sizes @ weight.scales.float().T)
    bound += 1e-6 * torch.einsum("tb,rb->tr", sizes, padded.amax(-1))
    return bound + SMALLEST * (1 + padded.sum((-1, -2)))
