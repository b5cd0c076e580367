"""Tensor -> QuantTensor -> tensor, in plain PyTorch: the specification of each format."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from mixlocal.errors import RefusedError
from mixlocal.quant.format import BLOCK_SIZE, CODEBOOKS, QuantSpec, QuantTensor, Weight
from mixlocal.quant.packing import pack_nibbles, unpack_nibbles
from mixlocal.quant.search import Search, best_lines, best_scales

WIDEST = 3e38  # a block that spans more is not searched
TINY = 1e-38  # stands in for the absmax of an all-zero block, as in bitsandbytes
CHUNK_ELEMENTS = 1 << 21  # temporaries are a few times this many floats, whatever the tensor's size


def quantize(name: str, weight: torch.Tensor, spec: QuantSpec, search: Search | None = None) -> Weight:
    """[R, C] floats -> the same matrix as `spec` says; `name` is for the error message.

    search: look for the scales of 4-bit blocks that lose least; without, they span the block's numbers.

    Raises `RefusedError` for NaN or infinity, for a shape the format cannot hold, and for an absmax beyond float16.
    """
    rows, columns = weight.shape
    spec.check_shape(name, (rows, columns))
    if spec.kind == "bf16":
        check_finite(name, weight)
        return weight.to(torch.bfloat16)
    result = empty(spec, (rows, columns))
    codes, scales = result.codes, result.scales
    for part in row_chunks(rows, columns):
        exact = weight[part].float()
        check_finite(name, exact, part.start)
        codes[part], scales[part] = _rows(exact, spec, search)
    if not bool(scales.isfinite().all()):
        raise RefusedError(f"{name}: its largest weight does not fit a 16-bit scale", "quantize with --scales 32")
    return result


def empty(spec: QuantSpec, shape: tuple[int, int]) -> QuantTensor:
    """Room for a quantized matrix, not yet filled."""
    codes = torch.empty(spec.codes_shape(shape), dtype=spec.code_dtype)
    return QuantTensor(spec, shape, codes, torch.empty(spec.scales_shape(shape), dtype=spec.scale_dtype))


def dequantize(weight: Weight) -> torch.Tensor:
    """The float32 [R, C] matrix that a weight stands for."""
    if isinstance(weight, torch.Tensor):
        return weight.float()
    if weight.spec.kind == "int8":
        return weight.codes.float() * weight.scales
    rows, columns = weight.shape
    if weight.spec.affine:
        return _affine_values(weight)
    codebook = torch.tensor(CODEBOOKS[weight.spec.kind], device=weight.codes.device)
    levels = pad(codebook[unpack_nibbles(weight.codes).int()], (0, -columns % BLOCK_SIZE))
    blocks = levels.view(rows, -1, BLOCK_SIZE) * weight.scales.float().unsqueeze(-1)
    return blocks.view(rows, -1)[:, :columns]


def dequantize_rows(weight: Weight, part: slice) -> torch.Tensor:
    """float32 [rows of part, C]."""
    if isinstance(weight, torch.Tensor):
        return weight[part].float()
    rows = weight.codes[part]
    return dequantize(QuantTensor(weight.spec, (len(rows), weight.shape[1]), rows, weight.scales[part]))


def row_chunks(rows: int, columns: int, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Slices of rows with about `elements` numbers each."""
    step = max(1, elements // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def relative_error(weight: torch.Tensor, quantized: Weight) -> float:
    """Root mean square of the error over that of the weight; 0 for an all-zero weight."""
    error = power = 0.0
    for part in row_chunks(*weight.shape):
        exact = weight[part].double()
        error += (dequantize_rows(quantized, part) - exact).square().sum().item()
        power += exact.square().sum().item()
    return (error / power) ** 0.5 if power else 0.0


def check_finite(name: str, weight: torch.Tensor, first_row: int = 0) -> None:
    """Raise `RefusedError` naming the first NaN or infinity of a tensor whose row 0 is `first_row` of the whole."""
    low, high = weight.aminmax()  # NaN wins in both, and no temporary as large as the tensor is made
    if bool(low.isfinite() & high.isfinite()):
        return
    index = (~weight.isfinite()).nonzero()[0].tolist()
    value = weight[tuple(index)].item()
    index[0] += first_row
    raise RefusedError(f"{name} holds {value} at {index}", "the checkpoint is damaged; fetch it again")


def _rows(exact: torch.Tensor, spec: QuantSpec, search: Search | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of float32 [R, C]."""
    if spec.affine:
        return _affine_rows(exact, spec, search)
    return _codebook_rows(exact, spec, search) if spec.four_bit else _int8_rows(exact, spec)


def _codebook_rows(exact: torch.Tensor, spec: QuantSpec, search: Search | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest level of the codebook per element, absmax per block; the arithmetic of bitsandbytes' `quantize_4bit`."""
    rows, columns = exact.shape
    blocks = pad(exact, (0, -columns % BLOCK_SIZE)).view(rows, -1, BLOCK_SIZE)
    absmax = blocks.abs().amax(dim=-1)
    reciprocal = 1.0 / absmax.clamp(min=TINY)
    levels, order = torch.tensor(CODEBOOKS[spec.kind]).sort(stable=True)
    midpoints = (levels[1:] + levels[:-1]) / 2
    if search is not None:
        unit = blocks * reciprocal.unsqueeze(-1)
        found = best_scales(unit, search.weights(columns, BLOCK_SIZE), levels, midpoints) * absmax
        rounded = found.to(spec.scale_dtype).float()
        usable = (absmax >= TINY) & (rounded.abs() > TINY)
        absmax = torch.where(usable, found, absmax)
        reciprocal = torch.where(usable, 1.0 / rounded, reciprocal)
    scaled = (blocks * reciprocal.unsqueeze(-1)).clamp_(-1, 1).view(rows, -1)
    codes = order.to(torch.uint8)[torch.bucketize(scaled[:, :columns].contiguous(), midpoints, out_int32=True)]
    return pack_nibbles(codes), absmax.to(spec.scale_dtype)


def _affine_rows(exact: torch.Tensor, spec: QuantSpec, search: Search | None) -> tuple[torch.Tensor, torch.Tensor]:
    """code = (number - zero) / scale, 0 to 15; without a search these span a block from its least to its largest."""
    rows, columns = exact.shape
    size, padding = spec.block_size, -columns % BLOCK_SIZE
    present = torch.arange(columns + padding).view(-1, size) < columns
    blocks = pad(exact, (0, padding)).view(rows, -1, size)
    blocks = torch.where(present, blocks, blocks[..., :1])  # what is behind the row's end must not widen a range
    least, most = blocks.amin(-1) + 0.0, blocks.amax(-1)
    span = most - least
    scale, zero = span / 15.0, least
    if search is not None:
        unit = (blocks - least.unsqueeze(-1)) * (1.0 / span).unsqueeze(-1)
        line_scale, line_zero = best_lines(unit, search.weights(columns, size))
        usable = (span >= TINY) & (span < WIDEST)
        scale = torch.where(usable, line_scale * span, scale)
        zero = torch.where(usable, least + line_zero * span, zero)
    scale, zero = scale.to(spec.scale_dtype), zero.to(spec.scale_dtype)
    rounded = scale.float()
    reciprocal = torch.where(rounded > TINY, 1.0 / rounded, 0.0)
    codes = ((blocks - zero.float().unsqueeze(-1)) * reciprocal.unsqueeze(-1)).clamp_(0, 15).round_()
    halves = BLOCK_SIZE // size
    planes = torch.stack((scale, zero), 1).view(rows, 2, -1, halves).transpose(2, 3)  # [R, 2, halves, B]
    return pack_nibbles(codes.to(torch.uint8).view(rows, -1)[:, :columns]), planes.flatten(1)


def _affine_values(weight: QuantTensor) -> torch.Tensor:
    (rows, columns), size = weight.shape, weight.spec.block_size
    halves = BLOCK_SIZE // size
    planes = weight.scales.float().view(rows, 2, halves, -1).transpose(2, 3).reshape(rows, 2, -1)
    codes = pad(unpack_nibbles(weight.codes).float(), (0, -columns % BLOCK_SIZE)).view(rows, -1, size)
    return (codes * planes[:, 0].unsqueeze(-1) + planes[:, 1].unsqueeze(-1)).view(rows, -1)[:, :columns]


def _int8_rows(exact: torch.Tensor, spec: QuantSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric, one scale per row, as LLM.int8 (arXiv 2208.07339, section 2.1)."""
    absmax = exact.abs().amax(dim=1, keepdim=True)
    inverse = torch.where(absmax > TINY, 127.0 / absmax.clamp(min=4e-37), 0.0)
    return (exact * inverse).round_().clamp_(-127, 127).to(torch.int8), (absmax / 127.0).to(spec.scale_dtype)
