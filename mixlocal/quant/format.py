"""Blueprints of quantized tensors and of one expert's record.

Shapes: R = rows (output features), C = columns (input features), B = runs of 64 columns in a row, the last one begun.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import torch

from mixlocal.errors import RefusedError

Kind = Literal["nf4", "fp4", "int4", "int4-32", "int8", "bf16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ScaleBits = Literal[16, 32]
BLOCK_SIZE = 64
PART_ALIGNMENT = 64
RECORD_ALIGNMENT = 4096

# The 16 levels of bitsandbytes' 4-bit types, by code, for blocks scaled to [-1, 1].  nf4: quantiles of a normal
# distribution (QLoRA, arXiv 2305.14314, appendix E).  fp4: sign, 2 exponent bits, 1 mantissa bit.
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12,
        -0.0, -0.0625 / 12, -8 / 12, -12 / 12, -4 / 12, -6 / 12, -2 / 12, -3 / 12,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How the numbers of one tensor are written.

    nf4, fp4: 4-bit codes, two a byte, the first element in the high nibble; one absmax per block of 64 along the row.
    int4, int4-32: 4-bit codes, packed the same; a scale s and a zero z per block of 64 or 32: s * code + z.
    int8: symmetric, one float32 scale per row.  bf16: not quantized.
    """

    kind: Kind
    scale_bits: ScaleBits = 16

    @property
    def four_bit(self) -> bool:
        return self.kind in CODEBOOKS or self.affine

    @property
    def affine(self) -> bool:
        return self.kind in ("int4", "int4-32")

    @property
    def block_size(self) -> int:
        """Numbers that share a scale, of a four-bit format."""
        return 32 if self.kind == "int4-32" else BLOCK_SIZE

    @property
    def planes(self) -> int:
        """Numbers that 64 columns have beside their codes: an absmax; a scale and a zero; or, in this order, the scales
        of the first and the last 32 and their zeros."""
        return 2 * BLOCK_SIZE // self.block_size if self.affine else 1

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float16 if self.four_bit and self.scale_bits == 16 else torch.float32

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.four_bit else torch.int8 if self.kind == "int8" else torch.bfloat16

    def codes_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """[R, C/2] for 4 bits, else [R, C]."""
        rows, columns = shape
        return rows, columns // 2 if self.four_bit else columns

    def code_bytes(self, shape: tuple[int, int]) -> int:
        rows, columns = self.codes_shape(shape)
        return rows * columns * self.code_dtype.itemsize

    def scales_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """[R, planes * B] for 4 bits, one plane of a row behind the other; [R, 1] for int8, [R, 0] for bf16."""
        rows, columns = shape
        if self.four_bit:
            return rows, self.planes * -(-columns // BLOCK_SIZE)
        return rows, 1 if self.kind == "int8" else 0

    def check_shape(self, name: str, shape: tuple[int, int]) -> None:
        """Raise `RefusedError` if a [R, C] tensor cannot be written so."""
        if self.four_bit and shape[1] % 2:
            raise RefusedError(f"{name}: {shape[1]} columns cannot be packed two a byte", "use --method int8")


@dataclass(frozen=True, slots=True)
class QuantTensor:
    """A [R, C] matrix as codes and scales, both views into whatever buffer holds them.

    codes: uint8 [R, C/2] for 4 bits, int8 [R, C].  scales: `spec.scales_shape` in spec.scale_dtype.
    """

    spec: QuantSpec
    shape: tuple[int, int]
    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


Weight = torch.Tensor | QuantTensor
WIDE = QuantSpec("int8")
WIDE_BITS = {"w1": 1, "w3": 2, "w2": 4}


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One SwiGLU expert: w2(silu(w1 x) * (w3 x)).  w1, w3: [H, D] (gate, up).  w2: [D, H] (down)."""

    w1: Weight
    w3: Weight
    w2: Weight


@dataclass(frozen=True, slots=True)
class Part:
    """Where one array lies inside a record, in bytes."""

    name: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """The record of one expert: codes of w1, w3, w2, then their scales.

    Every part starts on 64 bytes and the record on 4096, so one aligned read fills a slot and kernels load aligned.
    w1 and w3 are adjacent: gate and up are one pass over memory.
    """

    dim: int
    hidden: int
    spec: QuantSpec
    wide: int = 0  # the matrices that are int8 instead: 1 for w1, 2 for w3, 4 for w2, added up

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {"w1": (self.hidden, self.dim), "w3": (self.hidden, self.dim), "w2": (self.dim, self.hidden)}

    def spec_of(self, name: str) -> QuantSpec:
        """Of w1, w3 or w2."""
        return WIDE if self.wide & WIDE_BITS[name] else self.spec

    @property
    def parts(self) -> tuple[Part, ...]:
        specs = {name: self.spec_of(name) for name in self.shapes}
        sizes = {f"{name}.codes": specs[name].code_bytes(shape) for name, shape in self.shapes.items()}
        for name, shape in self.shapes.items():
            rows, numbers = specs[name].scales_shape(shape)
            sizes[f"{name}.scales"] = rows * numbers * specs[name].scale_dtype.itemsize
        parts, offset = [], 0
        for name, nbytes in sizes.items():
            parts.append(Part(name, offset, nbytes))
            offset = _align(offset + nbytes, PART_ALIGNMENT)
        return tuple(parts)

    @property
    def nbytes(self) -> int:
        """Bytes in use, without the padding to `stride`."""
        last = self.parts[-1]
        return last.offset + last.nbytes

    @property
    def stride(self) -> int:
        return _align(self.nbytes, RECORD_ALIGNMENT)


class ExpertLayouts:
    """The records of a whole file, one behind the other.

    wide: of each record, as in `ExpertLayout`; empty where no matrix is written otherwise than `spec`.
    """

    def __init__(self, dim: int, hidden: int, spec: QuantSpec, count: int, wide: tuple[int, ...] = ()) -> None:
        assert len(wide) in (0, count)
        self._made = {mask: ExpertLayout(dim, hidden, spec, mask) for mask in sorted(set(wide) or {0})}
        self._strides = {mask: layout.stride for mask, layout in self._made.items()}
        self._wide = wide or (0,) * count
        self.offsets = (0, *accumulate(self._strides[mask] for mask in self._wide))

    def __len__(self) -> int:
        return len(self._wide)

    def __getitem__(self, index: int) -> ExpertLayout:
        return self._made[self._wide[index]]

    def stride(self, index: int) -> int:
        return self._strides[self._wide[index]]

    def at(self, offset: int) -> int:
        """The record that a byte of the file belongs to."""
        return bisect_right(self.offsets, offset) - 1

    @property
    def formats(self) -> tuple[ExpertLayout, ...]:
        """The different ones there are."""
        return tuple(self._made.values())

    @property
    def largest(self) -> ExpertLayout:
        return max(self._made.values(), key=lambda layout: layout.stride)

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.offsets[-1]


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
