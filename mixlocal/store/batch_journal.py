"""The answers of a batch as they came: a line per row, each a checksum, the row's key, "ok" or "failed", and JSON.

It only grows, by one write a row, and is on disk at most a second later. Whoever is killed leaves at most a torn last
line, which has no newline and is cut off; any other line that is not right was changed by somebody, and is dropped.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from mixlocal.errors import CorruptError, MixlocalError
from mixlocal.store.durable import BuildFile, named_errors, replacing

SYNC_SECONDS = 1.0
KEY_BYTES = 32
_KEY_DIGITS = 2 * KEY_BYTES
_STATES = {b"ok": True, b"failed": False}
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the journal a row's line is. good: it is an answer, not a failure."""

    key: bytes
    good: bool
    offset: int
    nbytes: int


class BatchJournal:
    """damaged: how many lines were not as they had been written, and are gone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = BuildFile(path)
        try:
            self.damaged, self._end = self._survey()
            if self.damaged:
                self._drop_damaged()
            elif self._file.size() != self._end:
                self._file.truncate(self._end)
            self._file.sync()  # what an earlier process wrote last may not be on disk yet
        except BaseException:
            self._file.close()
            raise
        self._synced, self._unsynced_since = self._end, 0.0
        self._failed = False

    def places(self) -> Iterator[Place]:
        """Of all lines, in the order in which they were written."""
        offset = 0
        for line in self._lines():
            key, good, _ = _parse(line)
            yield Place(key, good, offset, len(line))
            offset += len(line)

    def append(self, key: bytes, good: bool, body: bytes) -> Place:
        """body: without a newline."""
        line = _line(key, good, body)
        try:
            self._file.write(self._end, line)
        except MixlocalError:
            with contextlib.suppress(MixlocalError):  # the next run cuts it off too
                self._file.truncate(self._end)
            raise
        if self._synced == self._end:
            self._unsynced_since = time.monotonic()
        place = Place(key, good, self._end, len(line))
        self._end += len(line)
        return place

    def read(self, offset: int, nbytes: int) -> bytes:
        """The body of the line there. Raises `CorruptError` if it is not what was written."""
        with named_errors(self._path):
            line = os.pread(self._file.fileno(), nbytes, offset)
        if not _is_right(line):
            raise CorruptError(f"{self._path}: changed while it was in use", "run the same command again")
        return _parse(line)[2]

    def sync_if_due(self) -> None:
        if self._synced < self._end and time.monotonic() - self._unsynced_since >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """What the disk did not take is lost, whatever a second attempt says: it is given up, and its rows are left."""
        if self._synced == self._end or self._failed:
            return
        try:
            self._file.sync()
        except MixlocalError:
            self._failed = True
            with contextlib.suppress(MixlocalError):
                self._file.truncate(self._synced)
            raise
        self._synced = self._end

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._file.close()

    def _survey(self) -> tuple[int, int]:
        """(lines that are not right, where the last whole one ends)."""
        damaged = end = 0
        for line in self._lines():
            if not line.endswith(b"\n"):
                break
            damaged += not _is_right(line)
            end += len(line)
        return damaged, end

    def _drop_damaged(self) -> None:
        with replacing(self._path) as file:
            self._end = 0
            for line in self._lines():
                if _is_right(line):
                    file.write(self._end, line)
                    self._end += len(line)
        self._file.close()
        self._file = BuildFile(self._path)

    def _lines(self) -> Iterator[bytes]:
        with named_errors(self._path), _reader(self._file) as reader:
            reader.seek(0)
            yield from reader


def _reader(file: BuildFile) -> BinaryIO:
    return open(file.fileno(), "rb", buffering=_CHUNK, closefd=False)


def _line(key: bytes, good: bool, body: bytes) -> bytes:
    rest = b"%s %s %s" % (key.hex().encode(), b"ok" if good else b"failed", body)
    return b"%s %s\n" % (xxhash.xxh3_128_hexdigest(rest).encode(), rest)


def _is_right(line: bytes) -> bool:
    check, space, rest = line.partition(b" ")
    if not space or not rest.endswith(b"\n") or check != xxhash.xxh3_128_hexdigest(rest[:-1]).encode():
        return False
    key, state, _ = (*rest.split(b" ", 2), b"", b"")[:3]
    return len(key) == _KEY_DIGITS and state in _STATES


def _parse(line: bytes) -> tuple[bytes, bool, bytes]:
    """(key, whether it is an answer, body) of a line that is right."""
    _, key, state, body = line[:-1].split(b" ", 3)
    return bytes.fromhex(key.decode()), _STATES[state], body
