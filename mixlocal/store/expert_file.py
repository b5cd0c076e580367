"""experts.bin: one record per expert, opened with `pread`."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
import xxhash

from mixlocal.errors import CorruptError
from mixlocal.quant.format import RECORD_ALIGNMENT
from mixlocal.quant.packing import byte_view
from mixlocal.store.checkpoint import read_exactly
from mixlocal.store.durable import named_errors
from mixlocal.store.manifest import Manifest

EXPERTS_FILE = "experts.bin"
_DIRECT = getattr(os, "O_DIRECT", 0)
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def record_hasher(model: str, layer: int, expert: int) -> xxhash.xxh3_128:
    """Takes the bytes of a record; model, layer and expert are in it, so a record in another's place is caught too."""
    return xxhash.xxh3_128(f"{model}\0{layer}\0{expert}\0".encode())


class ExpertFile:
    """Reads records of one store. Safe from many threads: it keeps no position.

    direct: past the page cache, into slots that start on a page; False where the file system has no such reads.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, direct: bool = False) -> None:
        """Raises `CorruptError` if the file has not the size the manifest implies."""
        self.path = folder / EXPERTS_FILE
        self.manifest = manifest
        with named_errors(self.path):
            if not self.path.exists():
                raise CorruptError(f"{self.path}: missing", "remove the model and pull it again")
            self._descriptor, self.direct = open_to_read(self.path, direct)
        size = os.fstat(self._descriptor).st_size
        if size != manifest.experts_bytes:
            self.close()
            raise CorruptError(f"{self.path}: {size} bytes instead of {manifest.experts_bytes}", "pull the model again")

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        """Fill `slot`, uint8 and large enough, with a record and check it. Raises `CorruptError`."""
        self.fill(layer, expert, slot)
        self.check(layer, expert, slot)

    def fill(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        """As `read`, unchecked. A disk's error is worth a second try."""
        with named_errors(self.path):
            try:
                self._fill(layer, expert, slot)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                self._fill(layer, expert, slot)

    def check(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        """Raises `CorruptError` unless `slot` holds that record as it was written."""
        manifest = self.manifest
        index = layer * manifest.n_experts + expert
        hasher = record_hasher(manifest.name, layer, expert)
        hasher.update(byte_view(slot[: manifest.layouts.stride(index)]))
        if hasher.hexdigest() != manifest.records[index].xxh3:
            raise CorruptError(
                f"{self.path}: layer {layer} expert {expert} is damaged", "remove the model and pull it again"
            )

    def close(self) -> None:
        os.close(self._descriptor)

    def _fill(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        alignment = RECORD_ALIGNMENT if self.direct else 1
        layouts, index = self.manifest.layouts, layer * self.manifest.n_experts + expert
        room = byte_view(slot[: layouts.stride(index)])
        read_exactly(self._descriptor, self.path, layouts.offsets[index], room, alignment)


def open_to_read(path: Path, direct: bool) -> tuple[int, bool]:
    """A descriptor, and whether it really reads past the page cache. Raises `OSError`."""
    if direct and _DIRECT:
        try:
            return os.open(path, _FLAGS | _DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:  # that is how a file system says it cannot
                raise
    return os.open(path, _FLAGS), False
