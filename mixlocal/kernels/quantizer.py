"""Quantizing with the compiled kernels: the bits of `mixlocal.quant.quantize`, many times faster."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from mixlocal.errors import RefusedError
from mixlocal.kernels.checks import check_quantized
from mixlocal.kernels.isa import MISSING, chosen_isa, native_kernels
from mixlocal.kernels.operands import address
from mixlocal.quant.format import BLOCK_SIZE, CODEBOOKS, QuantSpec, QuantTensor, Weight
from mixlocal.quant.quantize import check_finite, empty, quantize, relative_error, row_chunks
from mixlocal.quant.search import Search

if not MISSING:
    from mixlocal.kernels.native import _native


def quantize_rows(
    name: str, weight: torch.Tensor, spec: QuantSpec, out: Weight | None = None, search: Search | None = None
) -> tuple[Weight, float]:
    """`quantize` and `relative_error` in one pass over a [R, C] weight, compiled where possible; the same bits.

    `out`: where to put the result, such as views into a record. The error agrees with `relative_error` to four digits.
    Raises `RefusedError` as `quantize` does.
    """
    if spec.kind == "bf16" and weight.dtype == torch.bfloat16:
        check_finite(name, weight)
        return _placed(weight, out), 0.0
    isa = chosen_isa()
    if isa is None or spec.kind == "bf16" or weight.device.type != "cpu":
        quantized, relative = _quantize_by_specification(name, weight, spec, search)
        return _placed(quantized, out), relative
    rows, columns = weight.shape
    spec.check_shape(name, (rows, columns))
    target = empty(spec, (rows, columns)) if out is None else out
    if not isinstance(target, QuantTensor) or (target.spec, target.shape) != (spec, (rows, columns)):
        raise RefusedError(f"{name}: there is no room for it where it should go")
    check_quantized(target)
    codes, scales = target.codes, target.scales
    error = power = 0.0
    for part, source in _sources(weight):
        part_error, part_power, bad = _quantize_part(isa, spec, source, codes[part], scales[part], search)
        if bad >= 0:
            row = bad // columns
            check_finite(name, source[row : row + 1], part.start + row)
        error, power = error + part_error, power + part_power
    if not bool(scales.isfinite().all()):
        return _quantize_by_specification(name, weight, spec, search)  # which says what is wrong
    return target, (error / power) ** 0.5 if power else 0.0


def _placed(weight: Weight, out: Weight | None) -> Weight:
    """`weight` itself, or its copy in `out`."""
    if out is None:
        return weight
    if isinstance(weight, QuantTensor) and isinstance(out, QuantTensor):
        out.codes.copy_(weight.codes)
        out.scales.copy_(weight.scales)
    elif isinstance(weight, torch.Tensor) and isinstance(out, torch.Tensor):
        out.copy_(weight)
    return out


def _quantize_by_specification(
    name: str, weight: torch.Tensor, spec: QuantSpec, search: Search | None
) -> tuple[Weight, float]:
    quantized = quantize(name, weight, spec, search)
    return quantized, relative_error(weight, quantized)


def _quantize_part(
    isa: str, spec: QuantSpec, source: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, search: Search | None
) -> tuple[float, float, int]:
    """Sums of squares of error and source, and the flat index of the first NaN or infinity or -1."""
    rows, columns = source.shape
    kind = _native.AFFINE if spec.affine else _native.FOUR_BIT if spec.four_bit else _native.INT8
    codebook = _codebook(spec.kind).data_ptr() if spec.kind in CODEBOOKS else 0
    importance = None if search is None or search.importance is None else search.importance.contiguous()
    return native_kernels(isa).quantize(
        kind, rows, columns, source.data_ptr(), source.dtype == torch.bfloat16,
        codebook, address("codes", codes), address("scales", scales), scales.dtype == torch.float16,
        spec.block_size < BLOCK_SIZE, search is not None, 0 if importance is None else importance.data_ptr(),
    )  # fmt: skip


def _sources(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A weight as the compiled quantizer reads it: whole if it can, else as float32 some rows at a time."""
    weight = weight.detach()
    if weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous():
        yield slice(0, len(weight)), weight
        return
    for part in row_chunks(*weight.shape):
        yield part, weight[part].float().contiguous()


@cache
def _codebook(kind: str) -> torch.Tensor:
    return torch.tensor(CODEBOOKS[kind])
