"""OUT.batch, the folder beside the output of a batch: what the batch is, and its answers until all are there.

manifest.json is written before the first answer and says what every answer depends on; `journal` holds the answers;
`input` what was read from standard input.
"""

from __future__ import annotations

import errno
import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from mixlocal.errors import CorruptError, MixlocalError, RefusedError
from mixlocal.store.batch_journal import BatchJournal
from mixlocal.store.durable import (
    TEMP_SUFFIX,
    BuildFile,
    make_folder,
    named_error,
    named_errors,
    remove_file,
    remove_folder,
    replacing,
    write_file,
)
from mixlocal.store.lock import locked

FORMAT_VERSION = 1
LOCK_SECONDS = 1.0  # whoever runs the same batch will not be done soon
_CHUNK = 1 << 20
_UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class InputNote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was read when the batch began, for people: rows may come, go and change."""

    name: str
    sha256: str
    rows: int


class BatchManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """fingerprint: what all answers depend on, by name. seed: of the rows that have none of their own are made of it.
    owns_output: what lies at the output's place is ours to replace."""

    fingerprint: dict[str, str]
    seed: int
    input: InputNote
    owns_output: bool = False


class _Version(msgspec.Struct, frozen=True):
    format_version: int


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: a manifest and the sha256 of its bytes."""

    format_version: int
    batch: msgspec.Raw
    sha256: str


class BatchFolder:
    """Of the batch whose output is `out`. For the one process that has locked it."""

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out.with_name(f"{out.name}.batch")
        self._manifest_path, self._spool_path = self.path / "manifest.json", self.path / "input"

    def read_manifest(self) -> BatchManifest | None:
        """None: nothing has begun. Raises `CorruptError` for a changed one, `RefusedError` for a newer format."""
        if not self._manifest_path.is_file():
            return None
        with named_errors(self._manifest_path):
            data = self._manifest_path.read_bytes()
        try:
            version = msgspec.json.decode(data, type=_Version).format_version
            if version == FORMAT_VERSION:
                sealed = msgspec.json.decode(data, type=_Sealed)
                if hashlib.sha256(sealed.batch).hexdigest() == sealed.sha256:
                    return msgspec.json.decode(sealed.batch, type=BatchManifest)
        except _UNDECODABLE as error:
            raise self._corrupt(str(error)) from error
        if version != FORMAT_VERSION:
            raise RefusedError(
                f"{self._manifest_path}: format version {version}; this mixlocal reads {FORMAT_VERSION}",
                "upgrade mixlocal, or give --fresh to start over",
            )
        raise self._corrupt("checksum does not match")

    def write_manifest(self, manifest: BatchManifest) -> None:
        body = msgspec.json.encode(manifest)
        sealed = _Sealed(FORMAT_VERSION, msgspec.Raw(body), hashlib.sha256(body).hexdigest())
        write_file(self._manifest_path, msgspec.json.encode(sealed) + b"\n")

    def begin(self, manifest: BatchManifest) -> None:
        """A new batch, without any answer."""
        make_folder(self.path)
        remove_file(self.path / "journal")
        self.write_manifest(manifest)

    def open_journal(self) -> BatchJournal:
        return BatchJournal(self.path / "journal")

    def keep_input(self, stream: BinaryIO) -> Path:
        """Copy what can be read only once; returns where it is, for only its owner to read."""
        make_folder(self.path)
        remove_file(self._spool_path)
        offset = 0
        with BuildFile(self._spool_path, exclusive=True, mode=0o600) as file:
            while chunk := stream.read(_CHUNK):
                file.write(offset, chunk)
                offset += len(chunk)
        return self._spool_path

    def publish(self, lines: Callable[[], Iterable[bytes]]) -> bool:
        """Make `lines` the output; False if that is what it is already."""
        if self._is_published(lines()):
            return False
        with replacing(self.out) as file:
            offset = 0
            for chunk in _in_chunks(lines()):
                file.write(offset, chunk)
                offset += len(chunk)
        return True

    def sweep(self) -> None:
        """Remove outputs that killed processes left half written."""
        for path in self.out.parent.glob(f".{glob.escape(self.out.name)}.*{TEMP_SUFFIX}"):
            remove_file(path)

    def leave(self) -> None:
        """Done for now: what was kept of standard input goes, and a folder in which nothing began."""
        with suppress(MixlocalError):
            remove_file(self._spool_path)
            if self.path.is_dir() and not self._manifest_path.exists():
                remove_folder(self.path)

    def _is_published(self, lines: Iterable[bytes]) -> bool:
        if self.out.is_symlink() or not self.out.is_file():
            return False
        with named_errors(self.out), self.out.open("rb") as file:
            return all(file.read(len(chunk)) == chunk for chunk in _in_chunks(lines)) and not file.read(1)

    def _corrupt(self, what: str) -> MixlocalError:
        return CorruptError(f"{self._manifest_path}: {what}", "give --fresh to start over")


@contextmanager
def batch_folder(out: Path) -> Iterator[BatchFolder]:
    """Locked. Raises `LockedError` if another process works on this output, `PermissionDeniedError` for a symbolic
    link where the folder is to be, `NotFoundError` if there is no folder to write to."""
    folder = BatchFolder(out)
    with named_errors(out.parent):
        if not out.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder")
    if folder.path.is_symlink():
        raise named_error(OSError(errno.ELOOP, "is a symbolic link"), folder.path)
    with locked(folder.path, LOCK_SECONDS):
        folder.sweep()
        try:
            yield folder
        finally:
            folder.leave()


def _in_chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Joined, with a newline behind each, in pieces that are worth a system call."""
    pending = bytearray()
    for line in lines:
        pending += line
        pending += b"\n"
        if len(pending) >= _CHUNK:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)
