"""Saved chats, one sqlite file: a turn that `put` has returned from is on the disk.

Text is kept as bytes, so that no character a model can say is refused or changed.
"""

from __future__ import annotations

import difflib
import secrets
import sqlite3
import struct
import time
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from mixlocal.errors import CorruptError, NotFoundError, RefusedError, UsageError
from mixlocal.store.session_names import free_name, new_name
from mixlocal.store.sqlite_file import SqliteFile

Role = Literal["user", "assistant"]

SCHEMA_VERSION = 1
_SHORT = 80  # characters of the first words as they are shown
_LAST_SECOND = 4e9  # of times that a damaged file may hold
_SCHEMA = (
    """CREATE TABLE session (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, model TEXT NOT NULL, variant TEXT NOT NULL,
        system BLOB NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, params TEXT NOT NULL)""",
    """CREATE TABLE turn (
        session TEXT NOT NULL REFERENCES session (id) ON DELETE CASCADE, n INTEGER NOT NULL CHECK (n >= 0),
        role TEXT NOT NULL CHECK (role IN ('user', 'assistant')), content BLOB NOT NULL, ids BLOB NOT NULL,
        interrupted INTEGER NOT NULL, seed INTEGER, PRIMARY KEY (session, n))""",
)
_TEXT = "CAST(content AS BLOB)"  # in a damaged file it may have become something else
_HEADS = f"""
    SELECT id, name, model, variant, CAST(system AS BLOB), CAST(created AS REAL), CAST(updated AS REAL),
        (SELECT count(*) FROM turn WHERE session = id),
        (SELECT {_TEXT} FROM turn WHERE session = id AND role = 'user' ORDER BY n LIMIT 1), params FROM session"""
_NEWEST = " ORDER BY updated DESC, session.rowid DESC"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message as it is kept. ids: the tokens an answer was generated as."""

    role: Role
    content: str
    ids: tuple[int, ...] = ()
    interrupted: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class SavedSession:
    """One chat without its turns. created, updated: seconds since 1970. turns: how many. first: one short line of what
    the user said first. params: JSON of what the user set."""

    id: str
    name: str
    model: str
    variant: str
    system: str
    created: float
    updated: float
    turns: int
    first: str
    params: str


class SessionDb:
    """Every change is one transaction. Methods that get a session's id raise `NotFoundError` if another process removed
    it meanwhile, and all of them what `sqlite_error` makes."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises `RefusedError` for a newer format, `CorruptError` for a damaged file."""
        self._file = SqliteFile(path, _SCHEMA, SCHEMA_VERSION)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, name: str | None, model: str, variant: str, system: str, *, first: str = "") -> SavedSession:
        """A session without turns. Without `name` it is called after its `first` words, or after the date.

        Raises `UsageError` for a name that is taken or cannot be one.
        """
        with self._file.transaction() as connection:
            name = free_name(connection, first) if name is None else new_name(connection, name)
            session, now = secrets.token_hex(8), time.time()
            row = (session, name, model, variant, _encoded(system), now, now, "{}")
            connection.execute("INSERT INTO session VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        return self.get(session)

    def find(self, reference: str) -> SavedSession:
        """By name, else by what one name or id alone begins with. NotFoundError tells near names, UsageError all that
        it may be."""
        reference = unicodedata.normalize("NFC", reference.strip())
        known = self._file.read("SELECT name, id FROM session ORDER BY updated DESC")
        begun = [pair for pair in known if reference and any(text.startswith(reference) for text in pair)]
        found = [pair for pair in known if reference == pair[0]] or begun
        if not found:
            near = difflib.get_close_matches(reference, [name for name, _ in known])
            raise NotFoundError(
                f"no chat is called {reference!r}", f"did you mean {_some(near)}?" if near else "see: mixlocal sessions"
            )
        if len(found) > 1:
            raise UsageError(f"{reference!r} may be {_some([name for name, _ in found])}", "write more of the name")
        return self.get(found[0][1])

    def get(self, session_id: str) -> SavedSession:
        rows = self._file.read(f"{_HEADS} WHERE id = ?", session_id)
        if not rows:
            raise _gone()
        return _saved(rows[0])

    def latest(self) -> SavedSession | None:
        return next(iter(self.list(1)), None)

    def turns(self, session_id: str) -> list[Turn]:
        """Raises `CorruptError` where one cannot be told from the file any more."""
        query = f"SELECT role, {_TEXT}, CAST(ids AS BLOB), interrupted, seed FROM turn WHERE session = ? ORDER BY n"
        rows = self._file.read(query, session_id)
        if any(role not in get_args(Role) or not isinstance(seed, int | None) for role, *_, seed in rows):
            raise CorruptError(f"{self._file.path}: a chat is damaged", f"remove it: mixlocal sessions rm {session_id}")
        return [Turn(role, _decoded(text), _unpacked(ids), bool(cut), seed) for role, text, ids, cut, seed in rows]

    def put(self, session_id: str, n: int, turn: Turn) -> None:
        """Turn number `n`, from 0, becomes `turn`, whether new or in place of another; later ones stay.

        Raises `RefusedError` if another process has removed turns before it.
        """
        row = (session_id, n, turn.role, _encoded(turn.content), _packed(turn.ids), turn.interrupted, turn.seed)
        with self._file.transaction() as connection:
            _touch(connection, session_id)
            if n > connection.execute("SELECT count(*) FROM turn WHERE session = ?", (session_id,)).fetchone()[0]:
                raise RefusedError("another mixlocal has shortened this chat meanwhile", "begin a new one: /new")
            connection.execute("INSERT OR REPLACE INTO turn VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def truncate(self, session_id: str, count: int) -> None:
        """Keep the first `count` turns."""
        with self._file.transaction() as connection:
            _touch(connection, session_id)
            connection.execute("DELETE FROM turn WHERE session = ? AND n >= ?", (session_id, count))

    def describe(
        self, session_id: str, *, name: str | None = None, model: str | None = None, variant: str | None = None,
        system: str | None = None, params: str | None = None,
    ) -> None:  # fmt: skip
        """Change what is given. Raises `UsageError` for a name that is taken or cannot be one."""
        with self._file.transaction() as connection:
            name = None if name is None else new_name(connection, name, session_id)
            text = None if system is None else _encoded(system)
            fields = ("name", "model", "variant", "system", "params")
            changes = ", ".join(f"{field} = coalesce(?, {field})" for field in fields)
            values = (name, model, variant, text, params, session_id)
            _expect_one(connection.execute(f"UPDATE session SET {changes} WHERE id = ?", values))

    def copy(self, session_id: str, name: str) -> SavedSession:
        """The same turns under another name, as of now."""
        head = "SELECT ?, ?, model, variant, system, ?, ?, params FROM session WHERE id = ?"
        turns = "SELECT ?, n, role, content, ids, interrupted, seed FROM turn WHERE session = ?"
        with self._file.transaction() as connection:
            new, now = secrets.token_hex(8), time.time()
            values = (new, new_name(connection, name), now, now, session_id)
            _expect_one(connection.execute(f"INSERT INTO session {head}", values))
            connection.execute(f"INSERT INTO turn {turns}", (new, session_id))
        return self.get(new)

    def remove(self, session_id: str) -> None:
        """Its text is overwritten in the file too; in the log, once no other process reads it."""
        with self._file.transaction() as connection:
            _expect_one(connection.execute("DELETE FROM session WHERE id = ?", (session_id,)))
        self._file.read("PRAGMA wal_checkpoint(TRUNCATE)")

    def list(self, limit: int | None = None, search: str = "") -> list[SavedSession]:
        """Newest first; with `search`, those in whose name and turns each of its words occurs, in any case."""
        words = _folded(_encoded(search)).split()
        most = -1 if limit is None or words else limit
        saved = [_saved(row) for row in self._file.read(f"{_HEADS} {_NEWEST} LIMIT ?", most)]
        found = self._having(words) if words else None
        return [session for session in saved if found is None or session.id in found][:limit]

    def _having(self, words: Iterable[str]) -> set[str]:
        """A plain scan: no index holds a second copy of what was said, and words are found inside others and in
        languages that put no spaces between them."""
        missing: dict[str, set[str]] = {}
        texts = f"SELECT id, CAST(name AS BLOB) FROM session UNION ALL SELECT session, {_TEXT} FROM turn"
        for session, content in self._file.read(texts):
            left = missing.setdefault(session, set(words))
            if left:
                text = _folded(content)
                left -= {word for word in left if word in text}
        return {session for session, left in missing.items() if not left}


def _touch(connection: sqlite3.Connection, session_id: str) -> None:
    _expect_one(connection.execute("UPDATE session SET updated = ? WHERE id = ?", (time.time(), session_id)))


def _expect_one(cursor: sqlite3.Cursor) -> None:
    if cursor.rowcount != 1:
        raise _gone()


def _gone() -> NotFoundError:
    return NotFoundError("this chat was removed by another mixlocal", "begin a new one: /new")


def _saved(row: tuple[Any, ...]) -> SavedSession:
    session, name, model, variant, system, created, updated, turns, first, params = row
    line = " ".join(_decoded(first or b"").split())[:_SHORT]
    created, updated = (min(max(seconds or 0.0, 0.0), _LAST_SECOND) for seconds in (created, updated))
    return SavedSession(session, name, model, variant, _decoded(system), created, updated, turns, line, params)


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # half of an emoji is no text, but a model may say it


def _decoded(data: bytes) -> str:
    """The inverse, and of damaged bytes what can be read: sqlite has no checksums."""
    try:
        return data.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return data.decode(errors="replace")


def _folded(data: bytes) -> str:
    return unicodedata.normalize("NFKC", data.decode(errors="replace")).casefold()


def _packed(ids: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def _unpacked(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
