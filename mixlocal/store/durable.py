"""The only code that writes files: what it publishes is complete and on disk, or not there at all.

A file becomes visible by temp name, fsync, rename, fsync of the folder. A folder is built under another name and
renamed when whole. Every system call that changes the disk passes `_call`, so a test can stop the process, fail the
call or shorten the write at the k-th of them (`on_call`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from mixlocal.errors import CorruptError, DiskFullError, MixlocalError, NotFoundError, PermissionDeniedError

Result = TypeVar("Result")
Buffer = bytes | bytearray | memoryview

# For tests: gets the name and byte count of each changing system call; may raise, kill, or return a smaller count.
on_call: Callable[[str, int], int] | None = None

TEMP_SUFFIX = ".part"  # of a file that is being written under another name

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP}
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG}


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn an OSError on `path` into the MixlocalError with the right exit code."""
    try:
        yield
    except OSError as error:
        raise named_error(error, path) from error


def named_error(error: OSError, path: Path) -> MixlocalError:
    reason = (error.strerror or str(error)).lower()
    if error.errno in _FULL:
        return DiskFullError(f"{path}: {reason}", "free some space and run the same command again: it resumes")
    if error.errno in _FORBIDDEN:
        return PermissionDeniedError(
            f"{path}: {reason}", "check the owner and mode, or choose another folder with --home"
        )
    if error.errno in _ABSENT:
        return NotFoundError(f"{path}: {reason}")
    return CorruptError(f"{path}: {reason}", "check the disk")


def make_folder(path: Path) -> None:
    """Create a folder and its parents; an existing one is fine."""
    with named_errors(path):
        _call("mkdir", 0, lambda _: path.mkdir(parents=True, exist_ok=True))


def write_file(path: Path, data: Buffer) -> None:
    """Replace `path` by `data`: entirely old or entirely new, and durable on return."""
    with replacing(path) as file:
        file.write(0, data)


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o644) -> Iterator[BuildFile]:
    """A file to be written piece by piece, which replaces `path` if nothing was raised, and is gone otherwise."""
    temp = path.with_name(f".{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    with named_errors(path):
        try:
            with BuildFile(temp, exclusive=True, mode=mode) as file:
                yield file
                file.sync()
            _call("rename", 0, lambda _: os.replace(temp, path))
        finally:
            temp.unlink(missing_ok=True)
        sync_folder(path.parent)


def create_private(path: Path) -> None:
    """Make sure of a file that only its owner can read; an existing one is left as it is and is not even opened, for
    to close it would end this process's locks on it. A symbolic link is refused."""
    make_folder(path.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with named_errors(path):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "is a symbolic link")
        if path.exists():
            return
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.close(_call("open", 0, lambda _: os.open(path, flags, 0o600)))
        sync_folder(path.parent)


def move_file(source: Path, target: Path) -> None:
    """Move a finished file that another program wrote to `target`, on the same disk, and make it durable."""
    with named_errors(target):
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("fsync", 0, lambda _: os.fsync(descriptor))
        finally:
            os.close(descriptor)
        _call("rename", 0, lambda _: os.replace(source, target))
        sync_folder(target.parent)


def publish_folder(building: Path, final: Path) -> None:
    """Rename a finished folder into place. Its files must have been synced."""
    with named_errors(final):
        sync_folder(building)
        _call("rename", 0, lambda _: os.rename(building, final))
        sync_folder(final.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder: it stops being visible at once, then its files go. A symbolic link is refused."""
    grave = path.with_name(f".{path.name}.{os.getpid()}.removed")
    with named_errors(path):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "is a symbolic link")
        if grave.exists():  # of a process that died with our number
            _call("rmtree", 0, lambda _: shutil.rmtree(grave))
        _call("rename", 0, lambda _: os.rename(path, grave))
        _call("rmtree", 0, lambda _: shutil.rmtree(grave))
        sync_folder(path.parent)


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    with named_errors(path):
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove_file(path: Path) -> None:
    """Remove a file; an absent one is fine."""
    with named_errors(path):
        _call("unlink", 0, lambda _: path.unlink(missing_ok=True))


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _call("fsync", 0, lambda _: os.fsync(descriptor))
    finally:
        os.close(descriptor)


class BuildFile:
    """A file under construction inside a folder that is not published yet.

    Writes go to given offsets. A symbolic link at `path` is refused, so nobody can redirect what we write.
    """

    def __init__(self, path: Path, *, exclusive: bool = False, mode: int = 0o644) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_EXCL if exclusive else 0)
        self.path = path
        with named_errors(path):
            if exclusive:
                path.unlink(missing_ok=True)
            self._descriptor = _call("open", 0, lambda _: os.open(path, flags, mode))

    def write(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        with named_errors(self.path):
            while view:
                written = _call("write", len(view), lambda n: os.pwrite(self._descriptor, view[:n], offset))  # noqa: B023
                if not written:
                    raise OSError(errno.EIO, "nothing was written")
                view, offset = view[written:], offset + written

    def append(self, data: Buffer) -> None:
        self.write(self.size(), data)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def fileno(self) -> int:
        return self._descriptor

    def read_all(self) -> bytes:
        with named_errors(self.path):
            return os.pread(self._descriptor, self.size(), 0)

    def truncate(self, size: int) -> None:
        with named_errors(self.path):
            _call("truncate", 0, lambda _: os.ftruncate(self._descriptor, size))

    def allocate(self, size: int) -> None:
        """Reserve `size` bytes now, so a full disk is found before the work and not during it."""
        with named_errors(self.path):
            if hasattr(os, "posix_fallocate"):
                _call("allocate", 0, lambda _: os.posix_fallocate(self._descriptor, 0, size))
            self.truncate(size)

    def sync(self) -> None:
        with named_errors(self.path):
            _call("fsync", 0, lambda _: os.fsync(self._descriptor))

    def close(self) -> None:
        """Once is enough, and twice does no harm."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with named_errors(self.path):
                os.close(descriptor)

    def __enter__(self) -> BuildFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _call(name: str, nbytes: int, action: Callable[[int], Result]) -> Result:
    if on_call is not None:
        nbytes = on_call(name, nbytes)
    return action(nbytes)
