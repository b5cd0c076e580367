"""The bytes of a saved KV cache: a head, then parts of raw bytes, all of it behind checksums. Only a cache of what can
be computed again: whatever is wrong with it is a reason not to use it, and no error.

    magic, format version, size of the head, digest of the head | head as JSON | part 0, its digest | part 1, ...

A digest is xxh3-128 over the head's digest and the part's bytes and number, so that no part passes for another.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Self

import msgspec
import xxhash

from mixlocal.store.durable import TEMP_SUFFIX, BuildFile, make_folder, remove_file, replacing

FORMAT_VERSION = 1
SUFFIX = ".kv"
PRIVATE = 0o600  # it tells the text as well as the text itself
MAGIC = b"mixlocKV"
DIGEST_BYTES = 16
_PREFIX = struct.Struct(f"<8sHH{DIGEST_BYTES}s")
_ABANDONED_SECONDS = 3600.0  # writing takes less than that

Piece = memoryview


class Unusable(StrEnum):
    """Why a file is of no use, for people."""

    ABSENT = "none was kept"
    DAMAGED = "what was kept is damaged"
    VERSION = "it was kept by another version of mixlocal"
    IDENTITY = "it was kept of another model, or with other settings"


class UnusableError(Exception):
    """Never leaves this program's use of the file."""

    def __init__(self, why: Unusable) -> None:
        super().__init__(why)
        self.why = why


class KvHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """identity: of all that decides what the numbers are. length: how many tokens."""

    identity: str
    dtype: str
    length: int
    layers: int
    kv_heads: int
    head_dim: int
    value_width: int


def snapshot_path(folder: Path, session_id: str) -> Path:
    return folder / f"{session_id}{SUFFIX}"


def write_kv_file(path: Path, head: KvHead, parts: Iterable[Iterable[Piece]]) -> None:
    """Replace `path`; each part comes in pieces. Raises what writing a file can raise, and leaves nothing then."""
    make_folder(path.parent)
    encoded = msgspec.json.encode(head)
    seal = xxhash.xxh3_128_digest(encoded)
    with replacing(path, PRIVATE) as file:
        offset = _write(file, 0, _PREFIX.pack(MAGIC, FORMAT_VERSION, len(encoded), seal) + encoded)
        for number, pieces in enumerate(parts):
            digest = _hasher(seal, number)
            for piece in pieces:
                digest.update(piece)
                offset = _write(file, offset, piece)
            offset = _write(file, offset, digest.digest())


class KvReader:
    """Reads what `write_kv_file` wrote, in its order. Raises `UnusableError` and nothing else.

    Not mapped: a file that is cut short under a mapping would end the process.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._offset = self._number = 0
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise UnusableError(Unusable.ABSENT) from error
        try:
            self.head, self._seal = self._read_head()
        except BaseException:
            self.close()
            raise

    def read_part(self, pieces: Iterable[Piece]) -> None:
        """Fill `pieces` with the next part."""
        digest = _hasher(self._seal, self._number)
        for piece in pieces:
            self._read_into(piece)
            digest.update(piece)
        if self._read(DIGEST_BYTES) != digest.digest():
            raise UnusableError(Unusable.DAMAGED)
        self._number += 1

    def left(self) -> int:
        """Bytes behind what was read."""
        return os.fstat(self._descriptor).st_size - self._offset

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_head(self) -> tuple[KvHead, bytes]:
        magic, version, nbytes, seal = _PREFIX.unpack(self._read(_PREFIX.size))
        if magic != MAGIC:
            raise UnusableError(Unusable.DAMAGED)
        if version != FORMAT_VERSION:
            raise UnusableError(Unusable.VERSION)
        encoded = self._read(nbytes)
        if xxhash.xxh3_128_digest(encoded) != seal:
            raise UnusableError(Unusable.DAMAGED)
        try:
            return msgspec.json.decode(encoded, type=KvHead), seal
        except msgspec.DecodeError as error:
            raise UnusableError(Unusable.DAMAGED) from error

    def _read(self, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self._read_into(memoryview(data))
        return bytes(data)

    def _read_into(self, piece: Piece) -> None:
        while piece:
            try:
                count = os.preadv(self._descriptor, [piece], self._offset)
            except OSError as error:
                raise UnusableError(Unusable.DAMAGED) from error
            if not count:  # cut short
                raise UnusableError(Unusable.DAMAGED)
            piece, self._offset = piece[count:], self._offset + count


def remove_kv_file(folder: Path, session_id: str) -> None:
    """An absent one is fine."""
    remove_file(snapshot_path(folder, session_id))


def prune_kv_files(folder: Path, keep_bytes: int) -> None:
    """Keep the newest that take `keep_bytes` together; remove the others, and what processes that died left."""
    kept = 0
    for path, status in sorted(_files(folder, f"*{SUFFIX}"), key=lambda pair: -pair[1].st_mtime):
        kept += status.st_size
        if kept > keep_bytes:
            remove_file(path)
    for path, status in _files(folder, f".*{SUFFIX}.*{TEMP_SUFFIX}"):
        if time.time() - status.st_mtime > _ABANDONED_SECONDS:
            remove_file(path)


def _files(folder: Path, pattern: str) -> list[tuple[Path, os.stat_result]]:
    """With their sizes and ages; one that another process removes meanwhile is left out."""
    found = []
    for path in folder.glob(pattern):
        with suppress(OSError):
            found.append((path, path.lstat()))
    return found


def _hasher(seal: bytes, number: int) -> xxhash.xxh3_128:
    digest = xxhash.xxh3_128(seal)
    digest.update(number.to_bytes(4, "little"))
    return digest


def _write(file: BuildFile, offset: int, data: bytes | Piece) -> int:
    """Returns where the next bytes belong."""
    file.write(offset, data)
    return offset + len(data)
