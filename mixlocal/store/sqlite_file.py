"""One sqlite database as this program keeps them: private, never a symbolic link, its failures told apart.

A write-ahead log with synchronous=FULL: what a transaction wrote is on the disk when it returns, so neither kill -9 nor
a power cut takes it. That costs one fsync; NORMAL would spare it and lose the last transactions in a power cut.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mixlocal.errors import (
    CorruptError,
    DiskFullError,
    LockedError,
    MemoryBudgetError,
    MixlocalError,
    PermissionDeniedError,
    RefusedError,
)
from mixlocal.store.durable import create_private

Result = TypeVar("Result")

WAIT_SECONDS = 10.0  # for another process to finish its write
POLL_SECONDS = 0.2  # sqlite waits so long by itself, deaf to Ctrl-C
PRAGMAS = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON")

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_FORBIDDEN = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH}
# sqlite says FULL for ENOSPC alone, and these for a quota, for ulimit -f, and for a log that cannot grow.
_NO_ROOM = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_SHMOPEN,
}  # fmt: skip


class SqliteFile:
    """Threads may share it: one statement or transaction at a time. Both methods raise what `sqlite_error` makes."""

    def __init__(self, path: Path, schema: tuple[str, ...], version: int) -> None:
        """Open, or create by the statements of `schema`.

        Raises `RefusedError` for a newer format or another program's file, `CorruptError` for a damaged one.
        """
        self.path = path
        self._lock = threading.RLock()
        create_private(path)  # sqlite gives its -wal and -shm the same mode
        with named_sqlite_errors(path):
            self._connection = sqlite3.connect(
                path.absolute(), timeout=POLL_SECONDS, isolation_level=None, check_same_thread=False
            )
        self._connection.text_factory = lambda data: data.decode(errors="replace")  # of a damaged file, what is there
        try:
            self._prepare(schema, version)
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """The last process to do so empties the log. Twice does no harm."""
        with self._lock:
            self._connection.close()

    def read(self, query: str, *values: object) -> list[Any]:
        """All rows of one statement outside of a transaction."""
        with self._lock, named_sqlite_errors(self.path):
            return _patiently(lambda: self._connection.execute(query, values).fetchall())

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is executed in it, or nothing where anything was raised."""
        with self._lock, named_sqlite_errors(self.path):
            try:
                _patiently(lambda: self._connection.execute("BEGIN IMMEDIATE"))
                yield self._connection
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.rollback()

    def _prepare(self, schema: tuple[str, ...], version: int) -> None:
        found = self.read("PRAGMA user_version")[0][0]
        if found > version:
            raise RefusedError(
                f"{self.path}: format version {found}; this mixlocal reads {version}", "upgrade mixlocal"
            )
        if found == 0 and self.read("SELECT 1 FROM sqlite_master WHERE (SELECT * FROM pragma_user_version) = 0"):
            raise RefusedError(f"{self.path}: the database of another program", "move it aside")
        for pragma in PRAGMAS:
            self.read(f"PRAGMA {pragma}")
        if found == 0:
            self._create(schema, version)

    def _create(self, schema: tuple[str, ...], version: int) -> None:
        with self.transaction() as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:  # no other process was faster
                for statement in (*schema, f"PRAGMA user_version = {version}"):
                    connection.execute(statement)


@contextmanager
def named_sqlite_errors(path: Path) -> Iterator[None]:
    """Turn what sqlite raises into the MixlocalError with the right exit code."""
    try:
        yield
    except MemoryError as error:
        raise MemoryBudgetError(f"{path}: memory ran out", "close other programs") from error
    except sqlite3.ProgrammingError:  # our own bug
        raise
    except sqlite3.DatabaseError as error:
        raise sqlite_error(error, path) from error


def sqlite_error(error: sqlite3.DatabaseError, path: Path) -> MixlocalError:
    """LockedError, DiskFullError, PermissionDeniedError; CorruptError for all else, tables that are not ours too."""
    code = _code(error)
    codes = {code, code & 0xFF}
    if codes & _BUSY:
        return LockedError(f"{path}: in use by another process", "wait for it to finish, or stop it")
    if codes & _NO_ROOM:
        return DiskFullError(f"{path}: no room to write: the disk is full, or a quota", "free some space")
    if codes & _FORBIDDEN:
        return PermissionDeniedError(f"{path}: {error}", "check the owner and mode of the file and its folder")
    return CorruptError(
        f"{path}: {error}",
        "move it and the -wal file beside it aside to begin anew; sqlite3's command .recover may save what is in them",
    )


def _patiently(action: Callable[[], Result]) -> Result:
    """`action`, again while another process holds the file: for `WAIT_SECONDS`, and Ctrl-C ends the wait."""
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            if _code(error) & 0xFF not in _BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


def _code(error: sqlite3.Error) -> int:
    """sqlite's extended code; Python's own errors, as for text that is no UTF-8, have none."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
