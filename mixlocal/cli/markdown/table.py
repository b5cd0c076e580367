"""A table: columns where they fit, rows of words where the screen is too narrow for them."""

from __future__ import annotations

import re
from typing import Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.table import Table as Columns
from rich.text import Text

from mixlocal.cli.markdown.flow import Flow
from mixlocal.cli.markdown.inert import revive
from mixlocal.cli.markdown.inline import Inline
from mixlocal.cli.safe_text import SafeStream

NARROWEST = 8  # columns a cell is wrapped to
MOST_COLUMNS = 100
_PLAIN = Style()
_HEADER = Style(bold=True)
_FRAME = Style(dim=True)
_GAP = 3  # between columns
_SEPARATOR = re.compile(r"(?<!\\)\|")
_DELIMITERS = re.compile(r"\|?( *:?-+:? *\|)*( *:?-+:? *)?")

_Cell = list[tuple[str, Style]]


class _CellText:
    """Where a cell's text goes until the table is complete."""

    def __init__(self) -> None:
        self.fragments: _Cell = []
        self._safe = SafeStream()

    def text(self, text: str, style: Style) -> None:
        self.fragments.append((re.sub(r"[\t\n]", " ", self._safe.push(revive(text))), style))

    def line_break(self) -> None:
        self.fragments.append((" ", _PLAIN))


class Table:
    """Holds the rows; a cell more than the header has is shown too."""

    def __init__(self, header: str, delimiters: str) -> None:
        self._justify = [_justify(cell) for cell in _split(delimiters)]
        self._rows = [_cells(header, _HEADER)]

    def add(self, row: str) -> None:
        self._rows.append(_cells(row, _PLAIN))

    def show(self, flow: Flow) -> None:
        columns = max(map(len, self._rows))
        least = sum(min(self._width(index), NARROWEST) for index in range(columns)) + _GAP * (columns - 1)
        if least <= flow.room():
            self._show_columns(flow, columns)
        else:
            self._show_rows(flow)

    def _width(self, column: int) -> int:
        return max(cell_len("".join(text for text, _ in row[column])) for row in self._rows if column < len(row))

    def _show_columns(self, flow: Flow, columns: int) -> None:
        table = Columns(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, border_style=_FRAME)
        for index in range(columns):
            justify = self._justify[index] if index < len(self._justify) else "left"
            header = self._rows[0][index] if index < len(self._rows[0]) else []
            table.add_column(Text.assemble(*header), justify=justify, overflow="fold")
        for row in self._rows[1:]:
            table.add_row(*(Text.assemble(*cell) for cell in row))
        layout = Console(width=flow.room(), force_terminal=True, legacy_windows=False)
        for line in layout.render_lines(table, pad=False):
            flow.row([(segment.text, segment.style or _PLAIN) for segment in line])

    def _show_rows(self, flow: Flow) -> None:
        for row in self._rows:
            for index, cell in enumerate(row):
                if index:
                    flow.text(" │ ", _FRAME)
                for text, style in cell:
                    flow.text(text, style)
            flow.end()


def is_header(line: str, delimiters: str) -> bool:
    """Whether two lines begin a table."""
    if not _DELIMITERS.fullmatch(delimiters.strip(" ")):
        return False
    return 0 < len(_split(delimiters)) == len(_split(line)) <= MOST_COLUMNS


def _split(row: str) -> list[str]:
    row = row.strip(" ").removeprefix("|")
    cells = [cell.strip(" ").replace("\\|", "|") for cell in _SEPARATOR.split(row)]
    return cells if cells[-1] else cells[:-1]  # the last "|" ends a cell


def _cells(row: str, style: Style) -> list[_Cell]:
    return [_cell(text, style) for text in _split(row)]


def _cell(text: str, style: Style) -> _Cell:
    sink = _CellText()
    inline = Inline(sink, style)
    inline.feed(text)
    inline.finish()
    return sink.fragments


def _justify(delimiter: str) -> Literal["left", "center", "right"]:
    if delimiter.endswith(":"):
        return "center" if delimiter.startswith(":") else "right"
    return "left"
