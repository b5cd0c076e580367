"""A finished model on disk: manifest.json, trunk.safetensors, experts.bin, and the small files as they came."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from mixlocal.errors import CorruptError, MixlocalError
from mixlocal.quant.packing import byte_view
from mixlocal.store.checkpoint import TensorRef, data_start, read_into, tensor_refs
from mixlocal.store.durable import named_errors
from mixlocal.store.expert_file import ExpertFile
from mixlocal.store.manifest import Manifest, StoredFile, read_manifest
from mixlocal.store.memory import page_memory
from mixlocal.store.paths import BUILDING_SUFFIX

TRUNK_FILE = "trunk.safetensors"
SCALES_SUFFIX = ".scales"  # of the tensor that holds a quantized trunk tensor's scales
# What is taken over from a checkpoint as it came, where it is there.
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "LICENSE",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelStore:
    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> ModelStore:
        """Read the manifest and check every file but the two large ones. Raises `NotFoundError` or `CorruptError`."""
        store = cls(folder, read_manifest(folder))
        if TRUNK_FILE not in store.manifest.files:
            raise CorruptError(f"{folder}: its manifest names no {TRUNK_FILE}", "remove the model and pull it again")
        for name, stored in store.manifest.files.items():
            if name != TRUNK_FILE:
                _check(folder / name, stored)
        stray = next((n for n in SMALL_FILES if n not in store.manifest.files and (folder / n).exists()), None)
        if stray is not None:
            raise CorruptError(f"{folder / stray}: not part of this model", "remove that file")
        return store

    def read_trunk(self) -> dict[str, torch.Tensor]:
        """Every tensor but the experts', by our names, as views into one checked buffer."""
        path, stored = self.folder / TRUNK_FILE, self.manifest.files[TRUNK_FILE]
        _check_present(path)
        with named_errors(path):
            size = path.stat().st_size
        if size != stored.nbytes:
            raise CorruptError(f"{path}: {size} bytes instead of {stored.nbytes}", "remove the model and pull it again")
        data = page_memory(size)
        view = byte_view(data)
        read_into(path, 0, view)
        _check_digest(path, xxhash.xxh3_128(view).hexdigest(), stored)
        start = data_start(path, bytes(view[:8]), size)
        return {ref.name: _tensor(data, ref) for ref in tensor_refs(path, bytes(view[8:start]), size)}

    def experts(self, *, direct: bool = False) -> ExpertFile:
        return ExpertFile(self.folder, self.manifest, direct=direct)

    def verify(self) -> Iterator[tuple[int, int]]:
        """Read every byte; yields (done, total) bytes. Raises `CorruptError` at the first damage."""
        done, total = 0, self.manifest.nbytes
        for name, stored in self.manifest.files.items():
            _check(self.folder / name, stored)
            done += stored.nbytes
            yield done, total
        experts = self.experts()
        try:
            for done_records in self._check_records(experts):
                yield done + self.manifest.layouts.offsets[done_records], total
        finally:
            experts.close()

    def _check_records(self, experts: ExpertFile) -> Iterator[int]:
        count, per_layer = len(self.manifest.records), self.manifest.n_experts
        slots = [torch.empty(self.manifest.stride, dtype=torch.uint8) for _ in range(2)]
        with ThreadPoolExecutor(len(slots)) as pool:
            for first in range(0, count, len(slots)):
                batch = range(first, min(first + len(slots), count))
                list(pool.map(lambda i, slot: experts.read(i // per_layer, i % per_layer, slot), batch, slots))
                yield batch.stop


def find_stores(models: Path) -> list[ModelStore | MixlocalError]:
    """Every finished store under the models folder; a damaged one is returned as its error."""
    found: list[ModelStore | MixlocalError] = []
    for path in sorted(models.glob("*/*/manifest.json")):
        if path.parent.name.startswith(".") or path.parent.name.endswith(BUILDING_SUFFIX):
            continue
        try:
            found.append(ModelStore(path.parent, read_manifest(path.parent)))
        except MixlocalError as error:
            found.append(error)
    return found


def file_digest(path: Path) -> StoredFile:
    """Size and xxh3-128 of a file, read in pieces."""
    digest, nbytes = xxhash.xxh3_128(), 0
    with named_errors(path), path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            nbytes += len(chunk)
    return StoredFile(nbytes, digest.hexdigest())


def _tensor(data: torch.Tensor, ref: TensorRef) -> torch.Tensor:
    """A view of `ref` in the bytes of its file; a copy where its elements do not start on a multiple of their size."""
    raw = data[ref.offset : ref.offset + ref.nbytes]
    return (raw.clone() if ref.offset % ref.dtype.itemsize else raw).view(ref.dtype).view(ref.shape)


def _check(path: Path, stored: StoredFile) -> None:
    _check_present(path)
    _check_digest(path, file_digest(path).xxh3, stored)


def _check_present(path: Path) -> None:
    if not path.is_file():
        raise CorruptError(f"{path}: missing", "remove the model and pull it again")


def _check_digest(path: Path, digest: str, stored: StoredFile) -> None:
    if digest != stored.xxh3:
        raise CorruptError(f"{path}: damaged (its checksum does not match)", "remove the model and pull it again")
