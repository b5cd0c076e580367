"""A reference's logits of a text on disk, chunk by chunk, so that a run that was stopped goes on where it was.

    magic, format version, size of the head, digest of the head | head as JSON | chunk 0, its digest | chunk 1, ...

A chunk is float32 [scored, vocab_size], row by row. Its digest is xxh3-128 over the head's digest, the chunk's number
and its bytes, so that no chunk passes for another. The file appears with its head and then only grows, a chunk at a
time: whatever stops the writer, all that can be wrong lies behind the last whole chunk, and is written again.
"""

from __future__ import annotations

import os
import struct
from itertools import count
from pathlib import Path
from typing import Self

import msgspec
import torch
import xxhash

from mixlocal.errors import CorruptError, RefusedError
from mixlocal.quant.packing import bytes_of
from mixlocal.store.durable import BuildFile, make_folder, named_errors, replacing

FORMAT_VERSION = 1
SUFFIX = ".logits"
PRIVATE = 0o600  # it tells much of the text
MAGIC = b"mixlocLG"
DIGEST_BYTES = 16
PIECE_BYTES = 4 << 20  # of a chunk that is being checked
_PREFIX = struct.Struct(f"<8sII{DIGEST_BYTES}s")
_MAX_HEAD = 1 << 16
AGAIN = "run the same command again: what is damaged is made anew"


class LogitHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the numbers depend on: `model` (name:variant) by the sha256 of its manifest, the text, its token ids, tokens
    a chunk, experts per token, who computes, in what the KV cache is kept. scored: tokens of a chunk."""

    model: str
    manifest_sha256: str
    text_sha256: str
    tokens_sha256: str
    context: int
    experts_per_token: int
    arithmetic: str
    kv_dtype: str
    mixlocal: str
    scored: int
    vocab_size: int

    @property
    def chunk_bytes(self) -> int:
        return 4 * self.scored * self.vocab_size

    @property
    def record_bytes(self) -> int:
        return self.chunk_bytes + DIGEST_BYTES

    def file_bytes(self, chunks: int) -> int:
        return len(_encode(self)) + chunks * self.record_bytes

    def digest(self) -> str:
        """Of everything above."""
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(self))


class LogitReader:
    """Reads chunks that `good_chunks` counted. Raises `CorruptError` for one that is not as it was written."""

    def __init__(self, path: Path) -> None:
        """Raises `NotFoundError`, `RefusedError` for a file of another kind or version, `CorruptError`."""
        self.path = path
        with named_errors(path):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.head, self._seal, self._start = _read_head(path, self._descriptor)
        except BaseException:
            self.close()
            raise
        self._digest, self._next = _hasher(self._seal, 0), (0, 0)

    def good_chunks(self, most: int) -> int:
        """How many chunks from the first on are whole, looking at `most` of them."""
        return next(chunk for chunk in count() if chunk == most or not self._is_good(chunk))

    def read(self, chunk: int, first: int, rows: int) -> torch.Tensor:
        """float32 [rows, vocab_size], from row `first` on. The rows of a chunk are read in order, each once, and the
        last are given out when all of them were right."""
        if not first:
            self._digest, self._next = _hasher(self._seal, chunk), (chunk, 0)
        assert self._next == (chunk, first), (self._next, chunk, first)
        piece = torch.empty(rows, self.head.vocab_size)
        self._read_into(bytes_of(piece), self._offset(chunk) + 4 * first * self.head.vocab_size)
        self._digest.update(bytes_of(piece))
        self._next = chunk, first + rows
        if first + rows == self.head.scored and self._stored_digest(chunk) != self._digest.digest():
            raise CorruptError(f"{self.path}: chunk {chunk} was changed", AGAIN)
        return piece

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_good(self, chunk: int) -> bool:
        """Read in pieces."""
        offset, left, digest = self._offset(chunk), self.head.chunk_bytes, _hasher(self._seal, chunk)
        while left:
            with named_errors(self.path):
                data = os.pread(self._descriptor, min(left, PIECE_BYTES), offset)
            if not data:
                return False
            digest.update(data)
            offset, left = offset + len(data), left - len(data)
        return self._stored_digest(chunk) == digest.digest()

    def _stored_digest(self, chunk: int) -> bytes:
        with named_errors(self.path):
            return os.pread(self._descriptor, DIGEST_BYTES, self._offset(chunk) + self.head.chunk_bytes)

    def _read_into(self, data: memoryview, offset: int) -> None:
        while data:
            with named_errors(self.path):
                read = os.preadv(self._descriptor, [data], offset)
            if not read:
                raise CorruptError(f"{self.path}: cut short", AGAIN)
            data, offset = data[read:], offset + read

    def _offset(self, chunk: int) -> int:
        return self._start + chunk * self.head.record_bytes


def create(path: Path, head: LogitHead) -> None:
    """A file without a chunk, in place of what is there."""
    make_folder(path.parent)
    with replacing(path, PRIVATE) as file:
        file.write(0, _encode(head))


class LogitWriter:
    """Appends to a file that `create` made, behind `chunks` whole ones; what is behind those is cut off."""

    def __init__(self, path: Path, head: LogitHead, chunks: int) -> None:
        self._head, self._chunks = head, chunks
        self._seal = xxhash.xxh3_128_digest(msgspec.json.encode(head))
        self._begin_chunk()
        self._file = BuildFile(path)
        try:
            self._file.truncate(self._offset)
        except BaseException:
            self._file.close()
            raise

    def write(self, piece: torch.Tensor) -> None:
        """More rows of the next chunk, float32 [some, vocab_size]."""
        data = bytes_of(piece)
        self._digest.update(data)
        self._file.write(self._offset, data)
        self._offset += len(data)

    def end_chunk(self) -> None:
        """All its rows are written; on return they are on the disk."""
        written = self._offset - self._head.file_bytes(self._chunks)
        assert written == self._head.chunk_bytes, (written, self._head)
        self._file.write(self._offset, self._digest.digest())
        self._file.sync()
        self._chunks += 1
        self._begin_chunk()

    def _begin_chunk(self) -> None:
        self._digest = _hasher(self._seal, self._chunks)
        self._offset = self._head.file_bytes(self._chunks)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _encode(head: LogitHead) -> bytes:
    body = msgspec.json.encode(head)
    return _PREFIX.pack(MAGIC, FORMAT_VERSION, len(body), xxhash.xxh3_128_digest(body)) + body


def _read_head(path: Path, descriptor: int) -> tuple[LogitHead, bytes, int]:
    """(head, its digest, where chunk 0 begins)"""
    with named_errors(path):
        data = os.pread(descriptor, _PREFIX.size + _MAX_HEAD, 0)
    if len(data) < _PREFIX.size or not data.startswith(MAGIC):
        raise RefusedError(f"{path}: not a file of reference logits", "give --logits another name")
    _, version, nbytes, seal = _PREFIX.unpack_from(data)
    if version != FORMAT_VERSION:
        raise RefusedError(f"{path}: format version {version}; this mixlocal reads {FORMAT_VERSION}", "remove the file")
    body = data[_PREFIX.size : _PREFIX.size + nbytes]
    if xxhash.xxh3_128_digest(body) != seal:
        raise CorruptError(f"{path}: its head is damaged", "remove the file")
    try:
        return msgspec.json.decode(body, type=LogitHead), seal, _PREFIX.size + nbytes
    except msgspec.DecodeError as error:
        raise CorruptError(f"{path}: {error}", "remove the file") from error


def _hasher(seal: bytes, chunk: int) -> xxhash.xxh3_128:
    digest = xxhash.xxh3_128(seal)
    digest.update(chunk.to_bytes(8, "little"))
    return digest
