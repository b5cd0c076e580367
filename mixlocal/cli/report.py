"""Rows of measurements on stdout as they come: a Markdown table, CSV, or a JSON array when all are there."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from mixlocal.cli.render import print_json, safe_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Row = TypeVar("Row", bound=DataclassInstance)
else:
    Row = TypeVar("Row")
Row_contra = TypeVar("Row_contra", contravariant=True)


@dataclass(frozen=True, slots=True)
class Column(Generic[Row]):
    """cell: the text of a row. width: of its widest cell, where that is known beforehand."""

    title: str
    cell: Callable[[Row], str]
    width: int = 0
    right: bool = True


class Report(Protocol[Row_contra]):
    def add(self, row: Row_contra) -> None: ...
    def end(self) -> None: ...


def report(output: str, columns: Sequence[Column[Row]]) -> Report[Row]:
    """output: "md" shows `columns`; "csv" and "json" hold every field of the rows, unrounded."""
    if output == "md":
        return _Markdown(columns)
    return _Csv() if output == "csv" else _Json()


class _Markdown(Generic[Row]):
    def __init__(self, columns: Sequence[Column[Row]]) -> None:
        self._columns = columns
        self._started = False

    def add(self, row: Row) -> None:
        if not self._started:
            self._line([column.title for column in self._columns])
            self._line([self._rule(column) for column in self._columns])
            self._started = True
        self._line([safe_text(column.cell(row)).replace("|", "\\|") for column in self._columns])

    def end(self) -> None:
        pass

    def _line(self, cells: list[str]) -> None:
        padded = [
            cell.rjust(self._width(column)) if column.right else cell.ljust(self._width(column))
            for cell, column in zip(cells, self._columns, strict=True)
        ]
        print(f"| {' | '.join(padded)} |", flush=True)

    def _rule(self, column: Column[Row]) -> str:
        return "-" * (self._width(column) - 1) + (":" if column.right else "-")

    def _width(self, column: Column[Row]) -> int:
        return max(column.width, len(column.title))


class _Csv(Generic[Row]):
    """A list is one cell, its numbers with spaces between."""

    def __init__(self) -> None:
        self._writer = csv.writer(sys.stdout, lineterminator="\n")
        self._started = False

    def add(self, row: Row) -> None:
        fields = asdict(row)
        if not self._started:
            self._writer.writerow(fields)
            self._started = True
        self._writer.writerow([_csv_cell(value) for value in fields.values()])
        sys.stdout.flush()

    def end(self) -> None:
        pass


class _Json(Generic[Row]):
    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, row: Row) -> None:
        self._rows.append(asdict(row))

    def end(self) -> None:
        print_json(self._rows)


def _csv_cell(value: object) -> object:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return safe_text(value) if isinstance(value, str) else value
