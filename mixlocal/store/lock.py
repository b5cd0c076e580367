"""One writer per store. The lock is the kernel's, so it ends with the process that held it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from mixlocal.errors import DiskFullError, LockedError
from mixlocal.store.durable import BuildFile, make_folder, named_errors

WAIT_SECONDS = 10.0


@contextlib.contextmanager
def locked(folder: Path, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the writer's lock beside `folder`. Raises `LockedError` naming the holder after `wait` seconds."""
    make_folder(folder.parent)
    path = folder.with_name(f".{folder.name}.lock")
    lock = filelock.FileLock(path, timeout=wait)
    with named_errors(path):
        try:
            lock.acquire()
        except filelock.Timeout as error:  # an OSError too
            raise LockedError(
                f"{folder.name}: in use by process {_holder(path)}", "wait for it to finish, or stop it"
            ) from error
    try:
        with contextlib.suppress(DiskFullError), BuildFile(path) as file:  # the number only helps others to find us
            file.truncate(0)
            file.write(0, f"{os.getpid()}\n".encode())
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "unknown"
    except OSError:
        return "unknown"
