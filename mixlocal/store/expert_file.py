"""experts.bin: one record per expert at a fixed stride, opened with `pread`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import xxhash

from mixlocal.errors import CorruptError
from mixlocal.quant.packing import byte_view
from mixlocal.store.checkpoint import read_exactly
from mixlocal.store.durable import named_errors
from mixlocal.store.manifest import Manifest

EXPERTS_FILE = "experts.bin"


def record_digest(model: str, layer: int, expert: int, record: torch.Tensor) -> str:
    """xxh3-128 over model, layer, expert and bytes, so that a record in another's place is caught too."""
    digest = xxhash.xxh3_128(f"{model}\0{layer}\0{expert}\0".encode())
    digest.update(byte_view(record))
    return digest.hexdigest()


class ExpertFile:
    """Reads records of one store. Safe from many threads: it keeps no position."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Raises `CorruptError` if the file has not the size the manifest implies."""
        self.path = folder / EXPERTS_FILE
        self.manifest = manifest
        with named_errors(self.path):
            if not self.path.exists():
                raise CorruptError(f"{self.path}: missing", "remove the model and pull it again")
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        size = os.fstat(self._descriptor).st_size
        if size != manifest.experts_bytes:
            self.close()
            raise CorruptError(f"{self.path}: {size} bytes instead of {manifest.experts_bytes}", "pull the model again")

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        """Fill `slot`, uint8 [stride], with a record and check it. Raises `CorruptError`."""
        manifest = self.manifest
        index = layer * manifest.n_experts + expert
        with named_errors(self.path):
            read_exactly(self._descriptor, self.path, index * manifest.stride, byte_view(slot))
        if record_digest(manifest.name, layer, expert, slot) != manifest.records[index].xxh3:
            raise CorruptError(
                f"{self.path}: layer {layer} expert {expert} is damaged", "remove the model and pull it again"
            )

    def close(self) -> None:
        os.close(self._descriptor)
