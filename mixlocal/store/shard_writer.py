"""Safetensors files written tensor by tensor: the header is known first, so memory holds one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import xxhash

from mixlocal.quant.packing import bytes_of
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
    """Writes the tensors of `specs`, in that order; digests are taken as the bytes pass. Use as a context manager."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self._file = BuildFile(path)
        self._file.truncate(0)
        self._specs = iter(specs)
        self._spec = TensorSpec("", torch.uint8, (0,))
        self._left = 0  # bytes that `_spec` still lacks
        self._sha256, self._xxh3 = hashlib.sha256(), xxhash.xxh3_128()
        self._offset = 0
        self._put(header_of(specs))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, or its next rows: a large one may come in parts."""
        if self._left == 0:
            self._spec = next(self._specs)
            self._left = self._spec.nbytes
        spec = self._spec
        assert (spec.name, spec.dtype, spec.shape[1:]) == (name, tensor.dtype, tuple(tensor.shape[1:])), (
            spec,
            name,
            tensor.dtype,
        )
        assert tensor.nbytes <= self._left, (spec, tensor.shape)
        self._left -= tensor.nbytes
        self._put(bytes_of(tensor))

    def finish(self) -> WrittenFile:
        """Sync; the digests of the whole file."""
        assert self._left == 0, f"{self._spec.name} lacks rows"
        assert next(self._specs, None) is None, "tensors are missing"
        self._file.sync()
        return WrittenFile(self._offset, self._sha256.hexdigest(), self._xxh3.hexdigest())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(self._offset, data)
        self._sha256.update(data)
        self._xxh3.update(data)
        self._offset += len(data)


def header_of(specs: Sequence[TensorSpec]) -> bytes:
    """Everything before the data of a file with these tensors, in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # some versions of transformers fail without it
    for spec, begin in zip(specs, offsets_of(specs), strict=True):
        entries[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, begin + spec.nbytes],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(len(text) + 8) % HEADER_ALIGNMENT
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def offsets_of(specs: Sequence[TensorSpec]) -> Iterator[int]:
    """Where each tensor begins, counted from the end of the header."""
    offset = 0
    for spec in specs:
        yield offset
        offset += spec.nbytes
