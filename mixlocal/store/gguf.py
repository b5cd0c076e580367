"""GGUF files: the head is kept in memory, tensors are read as float32, some rows at a time, without a mapping.

Of the many kinds of tensor these files may hold, F32, Q8_0 and Q4_1 are read. R, C = rows and columns of a matrix.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, quants

from mixlocal.errors import CorruptError, NotFoundError, RefusedError
from mixlocal.store.durable import named_errors

VECTOR_KINDS = {GGMLQuantizationType.F32}
MATRIX_KINDS = {GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1}
SCALAR_CODES = "BbHhIif?__Qqd"  # struct codes by GGUFValueType; 8 is a string, 9 an array
ALL = slice(None)
OTHER_FILE = "use another GGUF file"

FloatArray = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies; its shape is outermost first, as in PyTorch."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata and tensor table of a GGUF file that is long enough for all of them."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def field(self, name: str, kind: type[T]) -> T:
        """A metadata value. Raises `CorruptError` if it is missing or of another type."""
        value = self.fields.get(name)
        if not isinstance(value, kind):
            found = "is missing" if value is None else f"is a {type(value).__name__}, not a {kind.__name__}"
            raise corrupt(self.path, f"{name} {found}")
        return value

    def require(self, name: str, expected: str) -> None:
        """Raises `RefusedError` if a metadata string is another one."""
        if (found := self.field(name, str)) != expected:
            raise RefusedError(f"{self.path}: {name} is {found!r}, not {expected!r}", OTHER_FILE)

    def raw(self, name: str, rows: slice) -> npt.NDArray[np.uint8]:
        """The bytes of some rows of a tensor, [R, bytes per row]."""
        tensor = self.tensors[name]
        row_bytes = tensor.nbytes // tensor.shape[0]
        first, last, _ = rows.indices(tensor.shape[0])
        with named_errors(self.path), self.path.open("rb") as file:
            file.seek(tensor.offset + first * row_bytes)
            data = np.fromfile(file, np.uint8, (last - first) * row_bytes)
        if len(data) < (last - first) * row_bytes:
            raise corrupt(self.path, f"the file ends inside {name}")
        return data.reshape(last - first, row_bytes)

    def floats(self, name: str, rows: slice = ALL) -> FloatArray:
        """Some rows of a tensor, or the entries of a vector, as float32. Raises `CorruptError` for NaN or infinity."""
        tensor = self.tensors[name]
        readable = MATRIX_KINDS if len(tensor.shape) == 2 else VECTOR_KINDS
        if tensor.kind not in readable:
            raise RefusedError(f"{self.path}: {name} is {tensor.kind.name}, which is not read here", OTHER_FILE)
        with np.errstate(all="ignore"):  # what overflows is found right below
            values: FloatArray = quants.dequantize(self.raw(name, rows), tensor.kind)
        if not np.isfinite(values).all():
            raise corrupt(self.path, f"{name} holds NaN or infinity")
        return values.reshape(-1, *tensor.shape[1:])

    def steps(self, name: str) -> FloatArray:
        """The quantization step of every block of 32 weights of a Q4_1 matrix, [R, C / 32]."""
        tensor = self.tensors[name]
        if tensor.kind != GGMLQuantizationType.Q4_1:
            raise RefusedError(f"{self.path}: {name} is {tensor.kind.name}; only Q4_1 has steps to read", OTHER_FILE)
        blocks = self.raw(name, ALL).reshape(tensor.shape[0], -1, GGML_QUANT_SIZES[tensor.kind][1])
        return np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)


def corrupt(path: Path, what: str) -> CorruptError:
    return CorruptError(f"{path}: {what}", "the file is damaged; fetch it again")


def read_gguf(path: Path) -> GgufFile:
    """The head of a GGUF file, version 2 or 3 (github.com/ggml-org/ggml, docs/gguf.md).

    Raises `NotFoundError`, `RefusedError` for another version, `CorruptError` naming the field that makes no sense.
    """
    with named_errors(path):
        if not path.is_file():
            raise NotFoundError(f"{path} is not there", "fetch it again")
        with path.open("rb") as file:
            return GgufReader(file, path).head()


class GgufReader:
    """Takes values off the head of a GGUF file, bounds checked; `where` is what errors name."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.where = file, path, "the header"
        self.left = self.size = path.stat().st_size

    def head(self) -> GgufFile:
        """All of it. The file must be long enough for the tensors it lists."""
        if self.take(4) != b"GGUF":
            raise corrupt(self.path, "this is not a GGUF file")
        if (version := self.number("I")) not in (2, 3):
            raise RefusedError(f"{self.path}: GGUF version {version} is not supported", OTHER_FILE)
        n_tensors, n_fields = self.count(), self.count()
        fields = dict(self.field() for _ in range(n_fields))
        table = dict(self.tensor() for _ in range(n_tensors))
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise corrupt(self.path, f"general.alignment is {alignment!r}")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in table.items()}
        for name, tensor in tensors.items():
            if tensor.offset + tensor.nbytes > self.size:
                raise corrupt(self.path, f"the file ends inside {name}")
        return GgufFile(self.path, fields, tensors)

    def take(self, count: int) -> bytes:
        self.left -= count
        data = self.file.read(count) if self.left >= 0 else b""
        if len(data) < count:
            raise corrupt(self.path, f"the file ends inside {self.where}")
        return data

    def numbers(self, code: str, count: int) -> list[Any]:
        layout = f"<{count}{code}"
        return list(struct.unpack(layout, self.take(struct.calcsize(layout))))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def count(self) -> int:
        """A length. Each thing counted takes a byte at least, so a damaged one is caught before it is believed."""
        number = int(self.number("Q"))
        if number > self.left:
            raise corrupt(self.path, f"the file ends inside {self.where}")
        return number

    def string(self) -> str:
        try:
            return self.take(self.count()).decode()
        except UnicodeDecodeError as error:
            raise corrupt(self.path, f"{self.where} is not UTF-8") from error

    def field(self) -> tuple[str, Any]:
        self.where = "a metadata name"
        self.where = self.string()
        kind = self.number("I")
        if kind != GGUFValueType.ARRAY:
            return self.where, self.values(kind, 1)[0]
        return self.where, self.values(self.number("I"), self.count())

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        if kind >= len(SCALAR_CODES) or kind == GGUFValueType.ARRAY:
            raise corrupt(self.path, f"{self.where} has the unknown type {kind}")
        return self.numbers(SCALAR_CODES[kind], count)

    def tensor(self) -> tuple[str, GgufTensor]:
        """One line of the tensor table; its offset counts from where the data starts."""
        self.where = "the tensor table"
        name = self.where = self.string()
        if (n_dims := self.number("I")) > 4:
            raise corrupt(self.path, f"{name} has {n_dims} dimensions")
        shape = tuple(reversed(self.numbers("Q", n_dims)))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in list(GGMLQuantizationType):
            raise corrupt(self.path, f"{name} has the unknown type {kind}")
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not shape or shape[-1] % block:
            raise corrupt(self.path, f"{name} has the impossible shape {list(shape)}")
        return name, GgufTensor(GGMLQuantizationType(kind), shape, offset, math.prod(shape) // block * nbytes)
