"""Which scales lose least, block by block: the specification of what `kernels/native` computes, to the bit.

A block's error is the sum over its numbers x of w * (x - what x becomes)^2, w being the importance of x's column. For
given codes the best scale, or scale and zero, is weighted least squares. So candidates are tried for the codes they
give, each is judged by its least squares, and the best one's codes are kept: what llama.cpp's make_qkx2_quants does
(ggml-quants.c). Half-quadratic quantization (HQQ, 2023) moves the zero alone, and for another norm.

Least squares shrinks: a block becomes shorter by as much as it loses, in every matrix alike, which adds up from layer
to layer where the errors themselves do not. So the kept scale is not that of least squares but a little larger: that
whose projection on the block is the block. (Seen with nf4: by least squares a model's KL divergence fell to 0.94 of
what plain scales gave, and so to 0.87, with 0.7 % more of squared error.)

Shapes: R = rows, B = blocks of a row, S = numbers of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch.nn.functional import pad

SUM_LANES = 16
FACTORS = (1.0, 1.06, 0.95, 0.9, 0.85, 0.79)  # shares of a block's largest magnitude
SHRINKS = 8  # an affine range loses up to 7 of 7 steps at either end
SHRINK = 0.2 / 7
REFINEMENTS = 4


@dataclass(frozen=True, slots=True)
class Search:
    """importance: float32 [C], above zero: what the square of an error in each column counts. None: all the same."""

    importance: torch.Tensor | None = None

    def weights(self, columns: int, size: int) -> torch.Tensor:
        """[B, S] of whole runs of 64 columns; what is behind the row's end counts nothing."""
        known = torch.ones(columns) if self.importance is None else self.importance
        return pad(known, (0, -columns % 64)).view(-1, size)


def best_scales(
    unit: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor, midpoints: torch.Tensor
) -> torch.Tensor:
    """unit [R, B, S] in [-1, 1], weights [B, S], a codebook's levels ascending -> [R, B], to multiply the levels by.

    Both signs are tried: nf4 has eight levels above zero and seven below.
    """
    weighted = unit * weights
    power = total(weighted * unit)
    best, most = torch.ones(unit.shape[:2]), torch.full(unit.shape[:2], -1.0)
    for factor in FACTORS:
        reciprocal = torch.tensor(1.0) / torch.tensor(factor)
        for signed in (reciprocal, -reciprocal):
            level = levels[torch.bucketize((unit * signed).clamp_(-1, 1), midpoints, out_int32=True)]
            product, square = total(weighted * level), total((level * weights) * level)
            gain = product / square * product  # what the error is less than the block's power
            better = (square > 0) & (gain > most)
            best, most = torch.where(better, power / product, best), torch.where(better, gain, most)
    return best


@dataclass(frozen=True, slots=True)
class Lines:
    """code * scale + zero, each [R, B]. gain: what the error is less than the block's power. code, product: sums of
    w * code and of w * code * x."""

    scale: torch.Tensor
    zero: torch.Tensor
    gain: torch.Tensor
    code: torch.Tensor
    product: torch.Tensor

    def or_better(self, other: Lines, where: torch.Tensor | bool = True) -> Lines:
        better = (other.gain > self.gain) & where
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Lines(*(torch.where(better, theirs, ours) for ours, theirs in pairs))


def best_lines(unit: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """unit [R, B, S] in [0, 1], weights [B, S] -> scale and zero [R, B] for codes from 0 to 15.

    Ranges that leave out up to a fifth at either end, then codes and least squares in turn from the best of them.
    """
    shape = unit.shape[:2]
    own = weights * unit
    weight, weighted, square = total(weights.expand_as(unit)), total(own), total(own * unit)
    none = torch.zeros(shape)
    best = Lines(torch.full(shape, 1 / 15), none, torch.full(shape, -1.0), none, none)
    step = torch.tensor(0.2) / 7
    for low in range(SHRINKS):
        for high in range(SHRINKS):
            zero = low * step
            reciprocal = torch.tensor(15.0) / ((1.0 - zero) - high * step)
            best = best.or_better(_fit(unit, weights, zero, reciprocal, weight, weighted))
    line, goes_on = best, torch.ones(shape, dtype=torch.bool)
    for _ in range(REFINEMENTS):
        goes_on = goes_on & (line.scale > 0)
        line = _fit(unit, weights, line.zero.unsqueeze(-1), (1.0 / line.scale).unsqueeze(-1), weight, weighted)
        best = best.or_better(line, goes_on)
    variance, covariance = weight * square - weighted * weighted, weight * best.product - weighted * best.code
    usable = (best.gain >= 0) & (covariance > 0)
    scale = torch.where(usable, variance / covariance, best.scale)
    return scale, torch.where(usable, (weighted - scale * best.code) / weight, best.zero)


def _fit(
    unit: torch.Tensor, weights: torch.Tensor, zero: torch.Tensor, reciprocal: torch.Tensor,
    weight: torch.Tensor, weighted: torch.Tensor,
) -> Lines:  # fmt: skip
    """Least squares for the codes nearest to (unit - zero) * reciprocal; weight, weighted: sums of w and w * unit."""
    codes = ((unit - zero) * reciprocal).clamp_(0, 15).round_()
    own = codes * weights
    code, square, product = total(own), total(own * codes), total(own * unit)
    spread = weight * square - code * code
    scale = (weight * product - code * weighted) / spread
    at = (weighted - scale * code) / weight
    fits = spread > 0
    gain = at * weighted + scale * product
    scale, at, gain = (torch.where(fits, *pair) for pair in ((scale, 0.0), (at, 0.0), (gain, -1.0)))
    return Lines(scale, at, gain, code, product)


def total(numbers: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis, float32, in one order on every machine: 16 running sums, folded in half to one."""
    sums = torch.zeros(*numbers.shape[:-1], SUM_LANES)
    for start in range(0, numbers.shape[-1], SUM_LANES):
        sums = sums + numbers[..., start : start + SUM_LANES]
    while sums.shape[-1] > 1:
        low, high = sums.chunk(2, dim=-1)
        sums = low + high
    return sums[..., 0]
