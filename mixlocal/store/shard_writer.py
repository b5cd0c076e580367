"""Safetensors files written tensor by tensor: the header is known first, so memory holds one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import xxhash

from mixlocal.quant.packing import byte_view
from mixlocal.store.checkpoint import DTYPE_NAMES
from mixlocal.store.durable import BuildFile

HEADER_ALIGNMENT = 4096  # data starts on a page, so tensors read in one piece keep their alignment


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class WrittenFile:
    nbytes: int
    sha256: str
    xxh3: str


class ShardWriter:
    """Writes the tensors of `specs`, in that order; digests are taken as the bytes pass."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._file = BuildFile(path)
        self._file.truncate(0)
        self._specs = iter(specs)
        self._sha256, self._xxh3 = hashlib.sha256(), xxhash.xxh3_128()
        self._offset = 0
        self._put(_header(specs))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        spec = next(self._specs)
        assert (spec.name, spec.dtype, spec.shape) == (name, tensor.dtype, tuple(tensor.shape)), (
            spec,
            name,
            tensor.dtype,
        )
        self._put(byte_view(tensor.contiguous().flatten().view(torch.uint8)))

    def finish(self) -> WrittenFile:
        """Sync and close; the digests of the whole file."""
        assert next(self._specs, None) is None, "tensors are missing"
        self._file.sync()
        self._file.close()
        return WrittenFile(self._offset, self._sha256.hexdigest(), self._xxh3.hexdigest())

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(self._offset, data)
        self._sha256.update(data)
        self._xxh3.update(data)
        self._offset += len(data)


def write_shard(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]) -> WrittenFile:
    writer = ShardWriter(path, specs)
    for name, tensor in tensors:
        writer.write(name, tensor)
    return writer.finish()


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries = {}
    for spec, begin in zip(specs, _offsets(specs), strict=True):
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, begin + spec.nbytes],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(len(text) + 8) % HEADER_ALIGNMENT
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def _offsets(specs: Sequence[TensorSpec]) -> Iterator[int]:
    offset = 0
    for spec in specs:
        yield offset
        offset += spec.nbytes
