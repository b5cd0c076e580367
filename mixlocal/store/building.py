"""A store under construction: what is committed survives any kind of death, and the rest is done again.

Its two large files have their final size from the start, and every tensor of the source (a piece) has its place in
them, so pieces may come in any order and give the same bytes. The journal has a line for each; it counts when it has
its checksum and the bytes it speaks of have theirs, so no torn write or lost page can put wrong bytes into a store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash

from mixlocal.errors import CorruptError
from mixlocal.quant.format import ExpertLayouts
from mixlocal.store.checkpoint import read_into
from mixlocal.store.durable import (
    Buffer,
    BuildFile,
    make_folder,
    publish_folder,
    remove_file,
    remove_folder,
    write_file,
)
from mixlocal.store.expert_file import EXPERTS_FILE, record_hasher
from mixlocal.store.journal import Journal, PieceEntry, RevokeEntry, ShardEntry
from mixlocal.store.manifest import Manifest, Record, StoredFile, write_manifest
from mixlocal.store.model_store import TRUNK_FILE
from mixlocal.store.paths import BUILDING_SUFFIX
from mixlocal.store.pieces import PieceMap, Range, piece_hasher
from mixlocal.store.shard_writer import TensorSpec

SYNC_BYTES = 1 << 28
CHUNK = 1 << 20  # bytes read back at a time: they are hashed while in the processor's cache


@dataclass(frozen=True, slots=True)
class Origin:
    """The source file a piece was cut from, and how many of its first bytes that took."""

    shard: str
    end: int


class Building:
    """Use as a context manager; the caller holds the lock of the final folder. One thread at a time changes it.

    trunk_specs: the tensors of trunk.safetensors in their order; `x` and `x.scales` are one piece.
    """

    def __init__(
        self,
        final: Path,
        fingerprint: str,
        name: str,
        layouts: ExpertLayouts,
        n_experts: int,
        trunk_specs: Sequence[TensorSpec],
    ) -> None:
        self.final, self.folder = final, building_folder(final)
        self.name, self.n_experts = name, n_experts
        self._map = PieceMap(layouts, n_experts, trunk_specs)
        self._journal = Journal(journal_path(final), fingerprint)
        self._records: list[Record | None] = [None] * len(layouts)
        self._files: dict[str, BuildFile] = {}
        self._unsynced = 0
        self._chunk = memoryview(bytearray(CHUNK))

    @property
    def nbytes(self) -> int:
        """Of the two large files."""
        return sum(self._map.sizes.values())

    @property
    def records(self) -> tuple[Record, ...]:
        """All of them; there must be all of them."""
        records = tuple(record for record in self._records if record is not None)
        assert len(records) == len(self._records), "experts are missing"
        return records

    @property
    def trunk_errors(self) -> dict[str, float]:
        """Relative error of every matrix outside the experts that has come, in the order of the file."""
        pieces = (self._journal.pieces[name] for name in self._map.trunk if self.has(name))
        return {piece.name: piece.error for piece in pieces if piece.error is not None}

    def discard(self) -> None:
        """Forget what an earlier run has built."""
        remove_file(journal_path(self.final))
        if self.folder.is_dir():
            remove_folder(self.folder)

    def bytes_on_disk(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self.folder.glob("*")) if self.folder.is_dir() else 0

    def __enter__(self) -> Building:
        resumed = self._journal.replay()
        if not resumed or self.folder.is_symlink():
            self.discard()  # refuses the link
        make_folder(self.folder)
        for torn in self.folder.glob(".*.part"):
            remove_file(torn)
        with ExitStack() as stack:
            self._journal.open()
            stack.callback(self._journal.close)
            for name, size in self._map.sizes.items():
                self._files[name] = stack.enter_context(BuildFile(self.folder / name))
                self._files[name].allocate(size)
            self._files[TRUNK_FILE].write(0, self._map.header)
            self._check_pieces()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def has(self, name: str) -> bool:
        return name in self._journal.pieces

    def commit(self, name: str, arrays: Sequence[Buffer], error: float | None, origin: Origin | None) -> None:
        """Put a piece in its place: its codes, then its scales where it has any. origin: None for a trusted source."""
        assert not self.has(name), f"{name} came twice"
        hasher = piece_hasher(name)
        places = zip(self._map.ranges[name], arrays, strict=True)
        for place, data in sorted(places, key=lambda pair: pair[0].offset):
            self._write(place, data, hasher)
        shard, end = (origin.shard, origin.end) if origin else (None, 0)
        self._journal.append(PieceEntry(name, hasher.hexdigest(), error, shard, end))
        index = self._map.index(name)
        if index is not None and self._has_record(index):
            self._digest_record(index)
            if not self._has_record(index):
                raise self._changed(EXPERTS_FILE)
        if self._unsynced >= SYNC_BYTES:
            self.sync()

    def accept(self, shard: str, sha256: str) -> None:
        """A source file has proved whole: the pieces cut from it count for good."""
        if self.accepted(shard) != sha256:
            self._journal.append(ShardEntry(shard, sha256))

    def accepted(self, shard: str) -> str | None:
        """The sha256 of a source file that has proved whole and is not needed again."""
        return self._journal.shards.get(shard)

    def revoke(self, shard: str, beyond: int = 0) -> None:
        """Bytes of a source file were lost or wrong: pieces that need more than its first `beyond` are done again."""
        if self._journal.cut_beyond(shard, beyond) or self.accepted(shard) is not None:
            self._journal.append(RevokeEntry(shard, beyond))
            self._journal.sync()  # or else a power cut could revive wrong bytes beside the proof of right ones

    def sync(self) -> None:
        """What was committed and accepted so far is on disk: a source file that was accepted may go. Any thread may."""
        for file in self._files.values():
            file.sync()
        self._journal.sync()
        self._unsynced = 0

    def check_complete(self) -> None:
        """Nothing is missing, and nothing is of a source file that has not proved whole."""
        for name in self._map.ranges:
            assert self.has(name), f"{name} is missing"
            shard = self._journal.pieces[name].shard
            assert shard is None or self.accepted(shard) is not None, f"{name} is of {shard}, which was not accepted"

    def write_files(self, small_files: Mapping[str, bytes]) -> dict[str, StoredFile]:
        """Write the small files; the entries of all files beside experts.bin. The trunk must be complete."""
        files = {TRUNK_FILE: self._trunk_digest()}
        for name, data in small_files.items():
            write_file(self.folder / name, data)
            files[name] = StoredFile(len(data), xxhash.xxh3_128_hexdigest(data))
        return files

    def publish(self, manifest: Manifest) -> None:
        """Make the finished store visible, in place of an older one."""
        self.check_complete()
        self.sync()
        write_manifest(self.folder, manifest)
        if self.final.is_dir():
            remove_folder(self.final)
        publish_folder(self.folder, self.final)
        remove_file(journal_path(self.final))

    def _write(self, place: Range, data: Buffer, hasher: xxhash.xxh3_128) -> None:
        assert len(data) == place.nbytes, (place, len(data))
        file, padding = self._files[place.file], bytes(place.padding)
        file.write(place.offset, data)
        if padding:
            file.write(place.offset + place.nbytes, padding)
        hasher.update(data)
        hasher.update(padding)
        self._unsynced += place.nbytes

    def _check_pieces(self) -> None:
        """Forget every piece whose bytes are not what its line says."""
        for unknown in self._journal.pieces.keys() - self._map.ranges.keys():
            self._journal.lose(unknown)
        self._forget_damaged(self._map.trunk, xxhash.xxh3_128())
        for index in range(len(self._records)):
            self._digest_record(index)

    def _has_record(self, index: int) -> bool:
        return all(map(self.has, self._map.record(index)))

    def _digest_record(self, index: int) -> None:
        """Read what has come of a record; if that is all of it, and as it was written, the record is done."""
        pieces, hasher = self._map.record(index), record_hasher(self.name, *divmod(index, self.n_experts))
        self._forget_damaged(pieces, hasher)
        if self._has_record(index):
            w1, w3, w2 = (self._journal.pieces[name].error or 0.0 for name in pieces)
            self._records[index] = Record(hasher.hexdigest(), (w1, w3, w2))

    def _trunk_digest(self) -> StoredFile:
        hasher = xxhash.xxh3_128(self._map.header)
        if self._forget_damaged(self._map.trunk, hasher):
            raise self._changed(TRUNK_FILE)
        return StoredFile(self._map.sizes[TRUNK_FILE], hasher.hexdigest())

    def _forget_damaged(self, pieces: Sequence[str], whole: xxhash.xxh3_128) -> bool:
        """Read those of `pieces` that have come into `whole`, in the order of their file. True if one was damaged."""
        hashers = {name: piece_hasher(name) for name in pieces if self.has(name)}
        for place in self._map.in_file_order(hashers):
            for chunk in self._read(place):
                whole.update(chunk)
                hashers[place.piece].update(chunk)
        lines = self._journal.pieces
        damaged = [name for name, hasher in hashers.items() if hasher.hexdigest() != lines[name].xxh3]
        for name in damaged:
            self._journal.lose(name)
        return bool(damaged)

    def _read(self, place: Range) -> Iterator[memoryview]:
        """Its bytes and its padding, in chunks that are overwritten by the next."""
        offset, end = place.offset, place.offset + place.nbytes + place.padding
        while offset < end:
            chunk = self._chunk[: min(CHUNK, end - offset)]
            read_into(self.folder / place.file, offset, chunk)
            yield chunk
            offset += len(chunk)

    def _changed(self, name: str) -> CorruptError:
        return CorruptError(
            f"{self.folder / name}: other bytes were read than written", "check the disk, then run the command again"
        )


def building_folder(final: Path) -> Path:
    """Where `final` grows."""
    return final.with_name(final.name + BUILDING_SUFFIX)


def journal_path(final: Path) -> Path:
    """Beside the building folder, so that the finished store never holds it."""
    return final.with_name(f".{final.name}.journal")


def sweep(final: Path) -> None:
    """Remove what dead processes left of `final`: a journal whose store was published, a folder on its way out."""
    if final.is_dir():
        remove_file(journal_path(final))
    for grave in final.parent.glob(f".{final.name}.*.removed"):
        remove_folder(grave)
