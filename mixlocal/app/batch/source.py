"""The input of a batch, read as often as it is needed and never held as a whole."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import xxhash

from mixlocal.app.batch.lines import InputFormat, guess_format, read_lines
from mixlocal.app.batch.read_row import read_row
from mixlocal.app.batch.row import Row
from mixlocal.app.batch.setup import Setup
from mixlocal.errors import RefusedError, UsageError
from mixlocal.store.durable import named_errors

MAX_MODELS = 3  # other models that rows name, of those that are told


@dataclass(frozen=True, slots=True)
class Survey:
    """What a first look at the input found. keys: each row's, with its place among the rows. bad: places of those that
    cannot be asked. models: names that rows give, some of them."""

    sha256: str
    keys: dict[bytes, int]
    bad: frozenset[int]
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """path: of a file that can be read more than once; name: as the user calls it. limit: only the first so many
    rows."""

    path: Path
    name: str
    setup: Setup
    limit: int | None = None

    def rows(self) -> Iterator[Row]:
        with named_errors(self.path), self.path.open("rb") as file:
            for line in islice(read_lines(file, self.name), self.limit):
                yield read_row(line, self.setup)

    def survey(self) -> Survey:
        """Raises `RefusedError` if two rows have the same id: nobody could tell their answers apart."""
        look = _Look()
        for row in self.rows():
            look.add(row)
        with named_errors(self.path), self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return Survey(sha256, look.keys, frozenset(look.bad), tuple(look.models))


@dataclass(slots=True)
class _Look:
    keys: dict[bytes, int] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)
    models: dict[str, None] = field(default_factory=dict)
    lines: dict[bytes, int] = field(default_factory=dict)  # hash of an id -> its line

    def add(self, row: Row) -> None:
        if row.id is not None:
            former = self.lines.setdefault(xxhash.xxh3_128_digest(row.id.encode()), row.number)
            if former != row.number:
                raise RefusedError(
                    f"lines {former} and {row.number} have the same id, {row.id[:80]!r}",
                    "give each row an id of its own; a row without one is called by its line number",
                )
        place = len(self.keys)
        self.keys[row.key] = place
        if row.asked is None:
            self.bad.add(place)
        elif row.asked.model is not None and len(self.models) < MAX_MODELS:
            self.models[row.asked.model] = None


def detect_format(path: Path, name: str) -> InputFormat:
    """By the end of the file's name and its first line. Raises `UsageError` for UTF-16."""
    with named_errors(path), path.open("rb") as file:
        return guess_format(Path(name).suffix, next(read_lines(file, name), None))


def check_input(path: Path, name: str) -> None:
    """Raises `NotFoundError`, `PermissionDeniedError`, or `UsageError` for a folder."""
    with named_errors(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"{name} is a folder, not a file")
        if stat.S_ISREG(mode):  # a pipe can be opened only once
            path.open("rb").close()
