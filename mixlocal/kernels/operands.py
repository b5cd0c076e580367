"""Checked weights as the compiled module takes them. It trusts its callers: everything is checked here."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from mixlocal.errors import RefusedError
from mixlocal.kernels.checks import check_weight
from mixlocal.kernels.integer import integer_codebook
from mixlocal.kernels.isa import MISSING
from mixlocal.quant.format import BLOCK_SIZE, QuantTensor, Weight

if TYPE_CHECKING or not MISSING:
    from mixlocal.kernels.native import _native

MAX_COLUMNS = 1 << 18  # of a four-bit or int8 weight: as many as a config.json may claim


def matrix(weight: Weight) -> _native.Matrix:
    """Raises `RefusedError` if codes and scales are not what their format says, or not contiguous."""
    check_weight(weight)
    rows, columns = weight.shape
    if isinstance(weight, torch.Tensor):
        kind = _native.BF16 if weight.dtype == torch.bfloat16 else _native.FLOAT
        return _native.Matrix(kind, rows, columns, address("weight", weight), 0, False, False, 0, 1.0)
    if columns > MAX_COLUMNS:
        raise RefusedError(f"a quantized weight of {columns} columns is more than the kernels take, {MAX_COLUMNS}")
    return _quantized(weight, rows, columns)


def address(name: str, array: torch.Tensor) -> int:
    if not array.is_contiguous() or array.device.type != "cpu":
        raise RefusedError(f"linear: {name} are not contiguous in memory")
    return array.data_ptr()


def _quantized(weight: QuantTensor, rows: int, columns: int) -> _native.Matrix:
    codes, scales = address("codes", weight.codes), address("scales", weight.scales)
    if not weight.spec.four_bit:
        return _native.Matrix(_native.INT8, rows, columns, codes, scales, False, False, 0, 1.0)
    half = weight.scales.dtype == torch.float16
    if weight.spec.affine:
        fine = weight.spec.block_size < BLOCK_SIZE
        return _native.Matrix(_native.AFFINE, rows, columns, codes, scales, half, fine, 0, 1.0)
    book = integer_codebook(weight.spec.kind)
    return _native.Matrix(
        _native.FOUR_BIT, rows, columns, codes, scales, half, False, _levels(weight.spec.kind).data_ptr(), book.step
    )


@cache
def _levels(kind: str) -> torch.Tensor:
    return integer_codebook(kind).levels.contiguous()
