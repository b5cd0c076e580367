"""Checkpoints in Hugging Face format: safetensors shards, read with `pread`, never mapped and never unpickled.

The format: 8 bytes of header length, a JSON header of name -> {dtype, shape, data_offsets}, then the data without gaps.
"""

from __future__ import annotations

import os
import reprlib
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mixlocal.errors import CorruptError, NotFoundError, RefusedError
from mixlocal.quant.packing import byte_view
from mixlocal.store.durable import named_errors
from mixlocal.store.paths import is_plain_name
from mixlocal.store.strict_json import parse_json_object, read_json_object

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 25_000_000
MAX_RANK, MAX_NAME = 8, 256
MAX_INDEX_BYTES = 32 << 20
INDEX = "model.safetensors.index.json"
SHARD_SUFFIX = ".safetensors"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor of a checkpoint lies: `nbytes` from `offset` of `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """A folder with config.json and safetensors shards; headers are read and checked at once, data on demand."""

    def __init__(self, folder: Path) -> None:
        """Raises `NotFoundError`, `RefusedError` or `CorruptError`, naming the file."""
        self.folder = folder
        with named_errors(folder):
            if not folder.is_dir():
                raise NotFoundError(f"{folder}: no such folder")
            if not (folder / "config.json").is_file():
                raise NotFoundError(f"{folder}: no config.json", "give a folder in Hugging Face format")
        self.config: dict[str, Any] = read_json_object(folder / "config.json")
        weight_map = _weight_map(folder)
        with named_errors(folder):
            names = [p.name for p in sorted(folder.iterdir()) if p.is_file() or p.suffix != SHARD_SUFFIX]
        self.shards = [folder / name for name in shard_names(str(folder), names, weight_map)]
        self.tensors: dict[str, TensorRef] = {}
        for shard in self.shards:
            add_tensors(self.tensors, read_header(shard))
        if weight_map is not None:
            check_index(str(folder / INDEX), weight_map, self.tensors)

    def read(self, ref: TensorRef, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """See `read_tensor`."""
        return read_tensor(ref, buffer)


def add_tensors(tensors: dict[str, TensorRef], refs: Iterable[TensorRef]) -> None:
    """The tensors of one more shard. Raises `RefusedError` for one that another has too."""
    for ref in refs:
        if ref.name in tensors:
            raise RefusedError(f"{ref.path}: tensor {ref.name} is also in {tensors[ref.name].path.name}")
        tensors[ref.name] = ref


def check_index(where: str, weight_map: dict[str, str], tensors: Mapping[str, TensorRef]) -> None:
    """Raises `RefusedError` unless every tensor is in the shard that the index names for it."""
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise RefusedError(
                f"{where}: tensor {name} is not in {shard}", "a shard was swapped or is of another model"
            )
    extra = next((name for name in tensors if name not in weight_map), None)
    if extra is not None:
        raise RefusedError(f"{tensors[extra].path}: tensor {extra} is not in the index {INDEX}")


def read_tensor(ref: TensorRef, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """One tensor, read with `pread`, at the start of `buffer` (uint8, large enough) if one is given.

    Raises `CorruptError` if the file has become shorter.
    """
    data = torch.empty(ref.nbytes, dtype=torch.uint8) if buffer is None else buffer[: ref.nbytes]
    read_into(ref.path, ref.offset, byte_view(data), once=True)
    return data.view(ref.dtype).view(ref.shape)


def read_header(path: Path) -> list[TensorRef]:
    """The tensors of one safetensors file in file order; every claim of the header is checked against the file."""
    with named_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = data_start(path, file.read(8), size)
        return tensor_refs(path, file.read(start - 8), size)


def data_start(path: Path, prefix: bytes, size: int) -> int:
    """Where the data begins in a safetensors file of `size` bytes with these first 8."""
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise CorruptError(f"{path}: truncated or not a safetensors file", "fetch it again")
    return 8 + int(length)


def tensor_refs(path: Path, header: bytes, size: int) -> list[TensorRef]:
    """As `read_header`, from the JSON between the length and the data of a file of `size` bytes."""
    entries = parse_json_object(header, f"{path}: header")
    entries.pop("__metadata__", None)
    end = 8 + len(header)
    refs = sorted(
        (_tensor_ref(path, name, entry, end) for name, entry in entries.items()),
        key=lambda ref: (ref.offset, ref.nbytes),  # empty tensors first
    )
    for ref in refs:
        if ref.offset != end:
            raise CorruptError(f"{path}: tensor {ref.name} overlaps another or leaves a gap")
        end += ref.nbytes
    if end != size:
        raise CorruptError(f"{path}: {size} bytes on disk, {end} by its header", "it is truncated; fetch it again")
    return refs


def read_into(path: Path, offset: int, view: memoryview, *, once: bool = False) -> None:
    """Fill `view` from `offset` of a file. Raises `CorruptError` on a short read.

    `once`: nobody will read these bytes again soon, so they need not push other files out of the page cache.
    """
    with named_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_exactly(descriptor, path, offset, view)
            if once and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_exactly(descriptor: int, path: Path, offset: int, view: memoryview, alignment: int = 1) -> None:
    """As `read_into`, from an open descriptor; of a direct read only the file's end leaves pieces of `alignment`."""
    while view:
        count = os.preadv(descriptor, [view], offset)
        if count == 0 or count % alignment:
            raise CorruptError(
                f"{path}: ends at byte {offset + count}, {len(view) - count} bytes early",
                "it was truncated; fetch it again",
            )
        view, offset = view[count:], offset + count


def _tensor_ref(path: Path, name: str, entry: object, start: int) -> TensorRef:
    if not _is_tensor_name(name):
        raise CorruptError(f"{path}: header names a tensor {reprlib.repr(name)}")
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest} if not rest:
            pass
        case _:
            raise CorruptError(f"{path}: header entry of tensor {name} is malformed")
    if dtype not in DTYPES:
        raise RefusedError(f"{path}: tensor {name} has type {reprlib.repr(dtype)}, which we cannot read")
    if len(shape) > MAX_RANK or not all(_is_size(n) for n in (*shape, begin, end)):
        raise CorruptError(f"{path}: tensor {name} has an impossible shape or offset")
    nbytes = prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise CorruptError(f"{path}: tensor {name} of shape {shape} claims {end - begin} bytes instead of {nbytes}")
    return TensorRef(name, path, DTYPES[dtype], tuple(shape), start + begin, nbytes)


def _is_tensor_name(name: str) -> bool:
    return name.isascii() and name.isprintable() and 0 < len(name) <= MAX_NAME


def _is_size(n: object) -> bool:
    """Whether a number of a header can be a count of elements or bytes; larger ones are not worth an addition."""
    return type(n) is int and 0 <= n < 1 << 50


def shard_names(where: str, names: Collection[str], weight_map: dict[str, str] | None) -> list[str]:
    """Those of `names` that hold the weights. Raises `NotFoundError`, `RefusedError` where they are pickled only."""
    if weight_map is not None:
        wanted = sorted(set(weight_map.values()))
        missing = next((name for name in wanted if name not in names), None)
        if missing is not None:
            raise NotFoundError(f"{where}/{missing}: missing, but named by {INDEX}", "fetch the missing shard")
        return wanted
    shards = sorted(name for name in names if name.endswith(SHARD_SUFFIX))
    if shards:
        return ["model.safetensors"] if "model.safetensors" in shards else shards
    unsafe = next((name for name in names if name.endswith(PICKLED)), None)
    if unsafe is not None:
        raise RefusedError(
            f"{where}: only pickled weights ({unsafe}); they can run code", "use a safetensors checkpoint"
        )
    raise NotFoundError(f"{where}: no *{SHARD_SUFFIX} weights")


def _weight_map(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    return read_weight_map(read_json_object(path, MAX_INDEX_BYTES), str(path)) if path.is_file() else None


def read_weight_map(index: dict[str, Any], where: str) -> dict[str, str]:
    """Tensor name -> shard, from the index's JSON. Raises `RefusedError` for names that are none."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RefusedError(f"{where}: weight_map is missing or empty")
    for name, shard in weight_map.items():
        if not _is_tensor_name(name):
            raise RefusedError(f"{where}: weight_map names a tensor {reprlib.repr(name)}")
        if not isinstance(shard, str) or not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise RefusedError(f"{where}: weight_map names the file {reprlib.repr(shard)} for {name}")
    return weight_map
