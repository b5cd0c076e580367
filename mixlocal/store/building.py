"""A store under construction: what is committed survives any kind of death, and the rest is done again.

The journal has one line for the job, one for the trunk, one per record: a checksum and JSON. A line counts when it has
its checksum and the bytes it speaks of have theirs, so no torn write or lost page can put a wrong record into a store.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import torch
import xxhash

from mixlocal.quant.format import ExpertLayout
from mixlocal.quant.packing import byte_view
from mixlocal.store.checkpoint import read_into
from mixlocal.store.durable import (
    BuildFile,
    make_folder,
    named_errors,
    publish_folder,
    remove_file,
    remove_folder,
    write_file,
)
from mixlocal.store.expert_file import EXPERTS_FILE, record_digest
from mixlocal.store.manifest import UNDECODABLE, Manifest, Record, StoredFile, write_manifest
from mixlocal.store.model_store import TRUNK_FILE, file_digest
from mixlocal.store.paths import BUILDING_SUFFIX

SYNC_BYTES = 1 << 30


class JobEntry(msgspec.Struct, frozen=True, tag="job"):
    fingerprint: str


class TrunkEntry(msgspec.Struct, frozen=True, tag="trunk"):
    nbytes: int
    xxh3: str
    errors: dict[str, float]


class RecordEntry(msgspec.Struct, frozen=True, tag="record"):
    index: int
    record: Record


Entry = JobEntry | TrunkEntry | RecordEntry


class Building:
    """Use as a context manager; the caller holds the lock of the final folder."""

    def __init__(
        self, final: Path, fingerprint: str, name: str, layout: ExpertLayout, n_layers: int, n_experts: int
    ) -> None:
        self.final, self.folder = final, final.with_name(final.name + BUILDING_SUFFIX)
        self.layout, self.name, self.n_experts = layout, name, n_experts
        self.trunk: TrunkEntry | None = None
        self.records: list[Record | None] = [None] * (n_layers * n_experts)
        self._fingerprint = fingerprint
        self._journal_path = journal_path(final)
        self._unsynced = 0

    def discard(self) -> None:
        """Forget what an earlier run has built."""
        remove_file(self._journal_path)
        if self.folder.is_dir():
            remove_folder(self.folder)

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self.folder.glob("*")) if self.folder.is_dir() else 0

    def __enter__(self) -> Building:
        entries = self._read_journal()
        if not entries or entries[0] != JobEntry(self._fingerprint):
            self.discard()
            entries = []
        make_folder(self.folder)
        for torn in self.folder.glob(".*.part"):
            remove_file(torn)
        self._journal = BuildFile(self._journal_path)
        self._experts = BuildFile(self.folder / EXPERTS_FILE)
        if not entries or self._experts.size() != self.layout.stride * len(self.records):
            self._experts.truncate(0)
        self._experts.allocate(self.layout.stride * len(self.records))
        if not entries:
            self._journal.truncate(0)
            self._commit(JobEntry(self._fingerprint))
        self._replay(entries[1:])
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()
        self._experts.close()

    def commit_trunk(self, entry: TrunkEntry) -> None:
        self._commit(entry)
        self.trunk = entry

    def commit_record(self, index: int, data: torch.Tensor, errors: tuple[float, float, float]) -> None:
        """Write `data`, uint8 [stride], as record `index` and remember it."""
        record = Record(self._digest(index, data), errors)
        self._experts.write(index * self.layout.stride, byte_view(data))
        self._unsynced += self.layout.stride
        if self._unsynced >= SYNC_BYTES:
            self._experts.sync()
            self._unsynced = 0
        self._commit(RecordEntry(index, record))
        self.records[index] = record

    def copy_files(self, source: Path, names: tuple[str, ...]) -> dict[str, StoredFile]:
        """Copy the small files that exist; returns the entries of all files beside experts.bin."""
        assert self.trunk is not None
        files = {TRUNK_FILE: StoredFile(self.trunk.nbytes, self.trunk.xxh3)}
        for name in names:
            path = source / name
            if path.is_file():
                with named_errors(path):
                    data = path.read_bytes()
                write_file(self.folder / name, data)
                files[name] = file_digest(self.folder / name)
        return files

    def publish(self, manifest: Manifest) -> None:
        """Make the finished store visible, in place of an older one."""
        self._experts.sync()
        write_manifest(self.folder, manifest)
        if self.final.is_dir():
            remove_folder(self.final)
        publish_folder(self.folder, self.final)
        remove_file(self._journal_path)

    def _commit(self, entry: Entry) -> None:
        self._journal.append(_line(entry))

    def _read_journal(self) -> list[Entry]:
        if not self._journal_path.is_file() or not (self.folder / EXPERTS_FILE).is_file():
            return []
        with named_errors(self._journal_path):
            return list(_entries(self._journal_path.read_bytes()))

    def _replay(self, entries: list[Entry]) -> None:
        """Accept every entry whose bytes are still right, and rewrite the journal without the others."""
        kept: list[Entry] = [JobEntry(self._fingerprint)]
        for entry in entries:
            if isinstance(entry, TrunkEntry) and self._trunk_is_whole(entry):
                self.trunk = entry
                kept.append(entry)
            elif isinstance(entry, RecordEntry) and self._record_is_whole(entry):
                self.records[entry.index] = entry.record
                kept.append(entry)
        lines = b"".join(map(_line, kept))
        if lines != self._journal.read_all():
            self._journal.truncate(0)
            self._journal.write(0, lines)

    def _trunk_is_whole(self, entry: TrunkEntry) -> bool:
        path = self.folder / TRUNK_FILE
        return path.is_file() and file_digest(path) == StoredFile(entry.nbytes, entry.xxh3)

    def _record_is_whole(self, entry: RecordEntry) -> bool:
        if not 0 <= entry.index < len(self.records):
            return False
        data = torch.empty(self.layout.stride, dtype=torch.uint8)
        read_into(self.folder / EXPERTS_FILE, entry.index * self.layout.stride, byte_view(data))
        return self._digest(entry.index, data) == entry.record.xxh3

    def _digest(self, index: int, data: torch.Tensor) -> str:
        layer, expert = divmod(index, self.n_experts)
        return record_digest(self.name, layer, expert, data)


def journal_path(final: Path) -> Path:
    """Beside the building folder, so that the finished store never holds it."""
    return final.with_name(f".{final.name}.journal")


def sweep(final: Path) -> None:
    """Remove what dead processes left of `final`: a journal whose store was published, a folder on its way out."""
    if final.is_dir():
        remove_file(journal_path(final))
    for grave in final.parent.glob(f".{final.name}.*.removed"):
        remove_folder(grave)


def _entries(data: bytes) -> Iterator[Entry]:
    """The lines that are right; the first other one ends the journal."""
    for line in data.splitlines(keepends=True):
        try:
            entry: Entry = msgspec.json.decode(line.partition(b" ")[2], type=Entry)
        except UNDECODABLE:
            return
        if line != _line(entry):
            return
        yield entry


def _line(entry: Entry) -> bytes:
    body = msgspec.json.encode(entry)
    return xxhash.xxh3_64_hexdigest(body).encode() + b" " + body + b"\n"
