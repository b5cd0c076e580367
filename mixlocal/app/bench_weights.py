"""Weights to time kernels with: random and valid, without a model to take them from."""

from __future__ import annotations

import torch

from mixlocal.quant.format import ExpertLayout, ExpertWeights, QuantSpec, QuantTensor, Weight
from mixlocal.quant.packing import read_record
from mixlocal.quant.quantize import empty

ROTATION_BYTES = 1 << 28  # all copies of a matrix together: far above a last-level cache
BLOCK = 1 << 20  # random elements, repeated: caches go by address, not by content


def weight_copies(spec: QuantSpec, shape: tuple[int, int]) -> list[Weight]:
    """Matrices [R, C], as many as fill `ROTATION_BYTES` and at least two, one behind the other in memory."""
    rows, columns = shape
    count = max(2, -(-ROTATION_BYTES // spec.code_bytes(shape)))
    tall = _empty(spec, (count * rows, columns))
    randomize(tall)
    return [_rows(tall, slice(first, first + rows)) for first in range(0, count * rows, rows)]


def random_expert(layout: ExpertLayout) -> ExpertWeights:
    """Views into one record, as an expert comes from a store."""
    expert = read_record(layout, torch.empty(layout.stride, dtype=torch.uint8))
    for weight in (expert.w1, expert.w3, expert.w2):
        randomize(weight)
    return expert


def _empty(spec: QuantSpec, shape: tuple[int, int]) -> Weight:
    return torch.empty(shape, dtype=torch.bfloat16) if spec.kind == "bf16" else empty(spec, shape)


def _rows(weight: Weight, part: slice) -> Weight:
    if isinstance(weight, torch.Tensor):
        return weight[part]
    return QuantTensor(weight.spec, (part.stop - part.start, weight.shape[1]), weight.codes[part], weight.scales[part])


def randomize(weight: Weight) -> None:
    """Codes uniform, scales 0.01 to 0.03; plain weights normal with a deviation of 0.02."""
    if isinstance(weight, torch.Tensor):
        _fill(weight, (torch.randn(BLOCK) * 0.02).to(weight.dtype))
        return
    low, high = (0, 256) if weight.spec.four_bit else (-127, 128)
    _fill(weight.codes, torch.randint(low, high, (BLOCK,), dtype=weight.codes.dtype))
    _fill(weight.scales, (0.01 + 0.02 * torch.rand(BLOCK)).to(weight.scales.dtype))


def _fill(target: torch.Tensor, block: torch.Tensor) -> None:
    """Write `block` over and over into a contiguous tensor."""
    flat = target.view(-1)
    for start in range(0, len(flat), len(block)):
        part = flat[start : start + len(block)]
        part.copy_(block[: len(part)])
