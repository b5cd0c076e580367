"""Between tensors and the bytes of a record."""

from __future__ import annotations

import torch

from mixlocal.quant.format import PART_ALIGNMENT, ExpertLayout, ExpertWeights, QuantSpec, QuantTensor, Weight


def byte_view(data: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor, shared."""
    return data.numpy().data


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of any tensor, in row-major order; shared if it is contiguous."""
    return byte_view(tensor.contiguous().flatten().view(torch.uint8))


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes below 16, [R, C] -> [R, C/2]: first element in the high nibble, as bitsandbytes packs."""
    return (codes[:, ::2] << 4) | codes[:, 1::2]


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[R, C/2] -> [R, C], the inverse of `pack_nibbles`."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)


def matrix_bytes(spec: QuantSpec, shape: tuple[int, int]) -> int:
    """Room that `matrix_in` needs."""
    rows, blocks = spec.scales_shape(shape)
    return _scales_offset(spec, shape) + rows * blocks * spec.scale_dtype.itemsize


def matrix_in(buffer: torch.Tensor, spec: QuantSpec, shape: tuple[int, int]) -> Weight:
    """A [R, C] matrix as views into the beginning of `buffer`, uint8, through which it is written."""
    codes = buffer[: spec.code_bytes(shape)].view(spec.code_dtype).view(spec.codes_shape(shape))
    if spec.kind == "bf16":
        return codes
    scales = buffer[_scales_offset(spec, shape) : matrix_bytes(spec, shape)].view(spec.scale_dtype)
    return QuantTensor(spec, shape, codes, scales.view(spec.scales_shape(shape)))


def _scales_offset(spec: QuantSpec, shape: tuple[int, int]) -> int:
    return -(-spec.code_bytes(shape) // PART_ALIGNMENT) * PART_ALIGNMENT


def read_record(layout: ExpertLayout, record: torch.Tensor) -> ExpertWeights:
    """The expert inside `record`, uint8, at least layout.nbytes of it, as views, through which it is also written."""
    arrays = _record_arrays(layout, record)

    def weight(name: str) -> Weight:
        codes, spec = arrays[f"{name}.codes"], layout.spec_of(name)
        if spec.kind == "bf16":
            return codes
        return QuantTensor(spec, layout.shapes[name], codes, arrays[f"{name}.scales"])

    return ExpertWeights(w1=weight("w1"), w3=weight("w3"), w2=weight("w2"))


def _record_arrays(layout: ExpertLayout, record: torch.Tensor) -> dict[str, torch.Tensor]:
    arrays = {}
    for part in layout.parts:
        name, role = part.name.split(".")
        matrix, spec = layout.shapes[name], layout.spec_of(name)
        shape = spec.codes_shape(matrix) if role == "codes" else spec.scales_shape(matrix)
        dtype = spec.code_dtype if role == "codes" else spec.scale_dtype
        arrays[part.name] = record[part.offset : part.offset + part.nbytes].view(dtype).view(shape)
    return arrays
