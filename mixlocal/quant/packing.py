"""Between tensors and the bytes of a record."""

from __future__ import annotations

import torch

from mixlocal.quant.format import ExpertLayout, ExpertWeights, QuantTensor, Weight


def byte_view(data: torch.Tensor) -> memoryview:
    """The bytes of a contiguous uint8 tensor, shared."""
    return data.numpy().data


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes below 16, [R, C] -> [R, C/2]: first element in the high nibble, as bitsandbytes packs."""
    return (codes[:, ::2] << 4) | codes[:, 1::2]


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[R, C/2] -> [R, C], the inverse of `pack_nibbles`."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)


def read_record(layout: ExpertLayout, record: torch.Tensor) -> ExpertWeights:
    """The expert inside `record`, uint8 [layout.stride], as views, through which it is also written."""
    arrays = _record_arrays(layout, record)

    def weight(name: str) -> Weight:
        codes = arrays[f"{name}.codes"]
        if layout.spec.kind == "bf16":
            return codes
        return QuantTensor(layout.spec, layout.shapes[name], codes, arrays[f"{name}.scales"])

    return ExpertWeights(w1=weight("w1"), w3=weight("w3"), w2=weight("w2"))


def _record_arrays(layout: ExpertLayout, record: torch.Tensor) -> dict[str, torch.Tensor]:
    spec = layout.spec
    code_dtype = torch.uint8 if spec.four_bit else torch.int8 if spec.kind == "int8" else torch.bfloat16
    arrays = {}
    for part in layout.parts:
        name, role = part.name.split(".")
        rows, columns = layout.shapes[name]
        shape = (
            (rows, columns // 2 if spec.four_bit else columns)
            if role == "codes"
            else spec.scales_shape((rows, columns))
        )
        dtype = code_dtype if role == "codes" else spec.scale_dtype
        arrays[part.name] = record[part.offset : part.offset + part.nbytes].view(dtype).view(shape)
    return arrays
