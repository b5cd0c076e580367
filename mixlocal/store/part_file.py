"""The first bytes of a file that is being fetched: they outlive the process that fetched them.

Bytes that were written survive a kill, for the page cache is the system's. A power loss takes what was not synced; so
the note beside the file says up to where it was, and during which run of the system (its boot id).
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec

from mixlocal.store.checkpoint import read_exactly
from mixlocal.store.digest import PIECE, Hasher
from mixlocal.store.durable import BuildFile, move_file, named_errors, remove_file, write_file
from mixlocal.store.listing import RepoFile
from mixlocal.store.manifest import UNDECODABLE

SYNC_BYTES = 64 << 20
MAX_NOTE = 1 << 16
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class _Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    commit: str
    path: str
    nbytes: int
    digest: str
    synced: int
    boot: str
    etag: str | None = None


class PartFile:
    """`folder/<name>.part` and its note. One process uses it at a time; `landed` bytes of it are there."""

    def __init__(self, folder: Path, file: RepoFile, commit: str) -> None:
        self.file, self._commit = file, commit
        self.path = folder / f"{file.path}.part"
        self._note_path = folder / f"{file.path}.part.json"
        self._boot = _boot_id()
        self.etag: str | None = None
        self.landed = self._kept()
        self._synced = self._asked = 0  # bytes that are on the disk; that are, or are being synced
        self._syncing: Future[None] | None = None
        self._syncer = ThreadPoolExecutor(1)
        self._file, self._wrong = BuildFile(self.path), list[BuildFile]()
        self._file.truncate(self.landed)
        self._write_note()

    def append(self, data: bytes | bytearray | memoryview) -> None:
        self._file.write(self.landed, data)
        self.landed += len(data)
        if self.landed - self._asked >= SYNC_BYTES:
            self._await_sync()
            self._asked = self.landed
            self._syncing = self._syncer.submit(self._sync_to, self.landed)

    def sync(self) -> None:
        """What has landed is on disk."""
        self._await_sync()
        self._sync_to(self.landed)

    def _sync_to(self, landed: int) -> None:
        self._file.sync()
        self._synced = self._asked = landed
        self._write_note()

    def _await_sync(self) -> None:
        """Raises what went wrong with a sync on the way: its bytes must be taken for lost."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    def read_into(self, offset: int, view: memoryview) -> None:
        """Raises `CorruptError` beyond what has landed."""
        with named_errors(self.path):
            read_exactly(self._file.fileno(), self.path, offset, view)

    def rewind(self) -> None:
        """Begin again at the first byte."""
        self._await_sync()
        self._file.truncate(0)
        self.landed = self._synced = self._asked = 0
        self.etag = None
        self._write_note()

    def quarantine(self, value: str) -> Path:
        """Put the wrong bytes aside, under the hash they have, and begin again."""
        self._await_sync()
        bad = self.path.with_name(f"{self.file.path}.bad-{value[:12]}")
        move_file(self.path, bad)
        self._wrong.append(self._file)  # somebody may be reading it: a closed number could be another file's by then
        self._file = BuildFile(self.path)
        self.landed = self._synced = self._asked = 0
        self.etag = None
        self._write_note()
        return bad

    def rehash(self) -> Hasher:
        """The hash of what has landed, read back."""
        hasher, done = self.file.digest.start(self.file.nbytes), 0
        buffer = memoryview(bytearray(PIECE))
        while done < self.landed:
            piece = buffer[: min(PIECE, self.landed - done)]
            self.read_into(done, piece)
            hasher.update(piece)
            done += len(piece)
        return hasher

    def keep(self) -> None:
        """The file is whole and wanted: give it its own name."""
        self.close()
        move_file(self.path, self.path.with_name(self.file.path))
        remove_file(self._note_path)

    def remove(self) -> None:
        self.close()
        remove_file(self.path)
        remove_file(self._note_path)

    def close(self) -> None:
        self._syncer.shutdown()
        for file in (self._file, *self._wrong):
            file.close()

    def _kept(self) -> int:
        """Bytes of an earlier run that can be gone on from."""
        with named_errors(self.path):
            size = self.path.lstat().st_size if self.path.is_file() and not self.path.is_symlink() else 0
        note = self._read_note()
        if note is None or (note.commit, note.path, note.nbytes, note.digest) != self._identity:
            return 0
        self.etag = note.etag
        most = size if note.boot == self._boot and self._boot else min(size, note.synced)
        return min(most, self.file.nbytes)

    @property
    def _identity(self) -> tuple[str, str, int, str]:
        return self._commit, self.file.path, self.file.nbytes, self.file.digest.value

    def _read_note(self) -> _Note | None:
        data = _read_small(self._note_path, MAX_NOTE)
        try:
            return msgspec.json.decode(data, type=_Note) if data is not None else None
        except UNDECODABLE:
            return None

    def _write_note(self) -> None:
        note = _Note(*self._identity, synced=self._synced, boot=self._boot, etag=self.etag)
        write_file(self._note_path, msgspec.json.encode(note))


class AdoptedFile:
    """A file that is whole already, in a place that is not ours: it is read, and never changed."""

    def __init__(self, file: RepoFile, path: Path) -> None:
        self.file, self.path = file, path
        self.landed = 0  # until its hash has been checked; bytes before are as good as those of a download
        with named_errors(path):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, offset: int, view: memoryview) -> None:
        with named_errors(self.path):
            read_exactly(self._descriptor, self.path, offset, view)

    def close(self) -> None:
        """Once is enough, and twice does no harm."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _boot_id() -> str:
    """Changes whenever the system starts; empty where that cannot be told, and only synced bytes are trusted."""
    data = _read_small(BOOT_ID, 64)
    return data.decode("ascii", "replace").strip() if data else ""


def _read_small(path: Path, max_bytes: int) -> bytes | None:
    """None if there is no such file."""
    with named_errors(path):
        try:
            with path.open("rb") as file:
                return file.read(max_bytes)
        except FileNotFoundError:
            return None
