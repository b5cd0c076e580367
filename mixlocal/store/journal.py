"""The journal of a store under construction: a line per event, each a checksum and JSON; it only grows.

Lines count in their order, up to the first that is not right. A piece counts as long as nothing revokes it; its source
file has proved whole if it said so after the last piece cut from it. Whether a piece's bytes are on disk as its line
says is for the reader of the journal to find out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import xxhash

from mixlocal.store.durable import BuildFile, named_errors
from mixlocal.store.manifest import UNDECODABLE


class JobEntry(msgspec.Struct, frozen=True, tag="job"):
    """The first line: what is being made, of what."""

    fingerprint: str


class PieceEntry(msgspec.Struct, frozen=True, tag="piece"):
    """A source tensor is in its place. error: of its quantization. shard: None for a source that is trusted as it is.
    end: the first byte of the shard that the tensor does not need.
    """

    name: str
    xxh3: str
    error: float | None
    shard: str | None
    end: int


class ShardEntry(msgspec.Struct, frozen=True, tag="shard"):
    """This source file has proved whole: every piece cut from it so far is good."""

    name: str
    sha256: str


class RevokeEntry(msgspec.Struct, frozen=True, tag="revoke"):
    """Bytes of a source file were lost or wrong: its pieces that need more than the first `beyond` bytes are void."""

    shard: str
    beyond: int


Entry = JobEntry | PieceEntry | ShardEntry | RevokeEntry


class Journal:
    """pieces: those that count, by name. shards: sha256 of the source files that proved whole, by name."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.pieces: dict[str, PieceEntry] = {}
        self.shards: dict[str, str] = {}
        self._path, self._job = path, JobEntry(fingerprint)
        self._kept = 0  # bytes of an earlier run's lines

    def replay(self) -> bool:
        """Take over what an earlier run of this job wrote. False: there is nothing of it."""
        data = b""
        with named_errors(self._path):
            if self._path.is_file():
                data = self._path.read_bytes()
        for entry, line in _entries(data):
            if not self._kept and entry != self._job:
                break
            self._apply(entry)
            self._kept += len(line)
        return self._kept > 0

    def open(self) -> None:
        """Go on behind the lines that were taken over; what follows them is cut off."""
        self._file = BuildFile(self._path)
        if self._file.size() != self._kept:
            self._file.truncate(self._kept)
        if not self._kept:
            self.append(self._job)

    def append(self, entry: Entry) -> None:
        self._file.append(_line(entry))
        self._apply(entry)

    def lose(self, name: str) -> None:
        """A piece's bytes are not what its line says: its source file is needed once more."""
        shard = self.pieces.pop(name).shard
        if shard is not None:
            self.shards.pop(shard, None)

    def cut_beyond(self, shard: str, beyond: int) -> list[str]:
        """The pieces that a revocation would make void."""
        return [name for name, piece in self.pieces.items() if piece.shard == shard and piece.end > beyond]

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _apply(self, entry: Entry) -> None:
        match entry:
            case PieceEntry():
                self.pieces[entry.name] = entry
                if entry.shard is not None:
                    self.shards.pop(entry.shard, None)
            case ShardEntry():
                self.shards[entry.name] = entry.sha256
            case RevokeEntry():
                for name in self.cut_beyond(entry.shard, entry.beyond):
                    del self.pieces[name]
                self.shards.pop(entry.shard, None)


def shards_used_up(path: Path) -> frozenset[str]:
    """The source files that a journal speaks of as whole and done with; none where there is no journal."""
    with named_errors(path):
        data = path.read_bytes() if path.is_file() else b""
    journal = Journal(path, "")
    for entry, _ in _entries(data):
        journal._apply(entry)
    return frozenset(journal.shards)


def _entries(data: bytes) -> Iterator[tuple[Entry, bytes]]:
    """The lines that are right, with their bytes; the first other one ends the journal."""
    for line in data.splitlines(keepends=True):
        try:
            entry: Entry = msgspec.json.decode(line.partition(b" ")[2], type=Entry)
        except UNDECODABLE:
            return
        if line != _line(entry):
            return
        yield entry, line


def _line(entry: Entry) -> bytes:
    body = msgspec.json.encode(entry)
    return xxhash.xxh3_64_hexdigest(body).encode() + b" " + body + b"\n"
