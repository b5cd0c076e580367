"""The blocks that hold text: paragraphs, headings, code, tables, rules."""

from __future__ import annotations

import re
from typing import Protocol

from rich.style import Style

from mixlocal.cli.markdown.flow import Flow
from mixlocal.cli.markdown.highlight import Highlighter
from mixlocal.cli.markdown.inline import Inline
from mixlocal.cli.markdown.table import Table

PLAIN = Style()
RULE = Style(dim=True)
RULE_TEXT = "─" * 20
LONGEST_CODE_LINE = 1000  # more is shown before the line ends
_HEADINGS = (Style(bold=True, underline=True), Style(bold=True), Style(bold=True, italic=True))
_CLOSING = re.compile(r"(^| +)#+ *$")


class Leaf(Protocol):
    def feed(self, text: str) -> None:
        """More of a line."""

    def end_line(self) -> None: ...

    def close(self) -> None: ...


class Paragraph:
    """Text as it arrives; it goes on at the next line."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._inline = Inline(flow, PLAIN)
        self._is_new_line = False

    def feed(self, text: str) -> None:
        if self._is_new_line:
            self._inline.feed("\n")  # only now: the last newline is no part of the text
        self._is_new_line = False
        self._inline.feed(text)

    def end_line(self) -> None:
        self._is_new_line = True

    def close(self) -> None:
        self._inline.finish()
        self._flow.end()


class Heading:
    """One line; the signs that may close it are held back."""

    def __init__(self, flow: Flow, level: int) -> None:
        self._flow = flow
        self._inline = Inline(flow, _HEADINGS[min(level, len(_HEADINGS)) - 1])
        self._held = ""
        self._has_text = False

    def feed(self, text: str) -> None:
        self._held += text
        shown = len(self._held.rstrip("# "))
        if shown or self._has_text:
            gap = self._held.find(" ", shown)  # signs right after a word are part of it
            shown = gap if gap >= 0 else len(self._held)
            self._inline.feed(self._held[:shown])
            self._held = self._held[shown:]
            self._has_text = True

    def end_line(self) -> None:
        self._inline.feed(_CLOSING.sub("", self._held))
        self._held = ""

    def close(self) -> None:
        self._inline.finish()
        self._flow.end()


class Code:
    """Lines as they are, each when it is complete."""

    def __init__(self, flow: Flow, language: str = "") -> None:
        self._flow = flow
        self._highlighter = Highlighter(language if flow.has_colour else "")
        self._line = ""
        self._blanks = 0

    def feed(self, text: str) -> None:
        self._line += text
        while len(self._line) > LONGEST_CODE_LINE:
            self._flow.raw([(self._line[:LONGEST_CODE_LINE], PLAIN)], ends=False)
            self._line = self._line[LONGEST_CODE_LINE:]

    def blank(self) -> None:
        """A blank line that counts if code follows."""
        self._blanks += 1

    def end_line(self) -> None:
        for _ in range(self._blanks):
            self._flow.raw([])
        self._blanks = 0
        self._flow.raw(self._highlighter.line(self._line))
        self._line = ""

    def close(self) -> None:
        self._flow.mark()


class TableRows:
    """Rows, shown when the table is complete."""

    def __init__(self, flow: Flow, header: str, delimiters: str) -> None:
        self._flow = flow
        self._table = Table(header, delimiters)

    def feed(self, text: str) -> None:
        self._table.add(text)

    def end_line(self) -> None:
        pass

    def close(self) -> None:
        self._table.show(self._flow)


class Rule:
    """A word of dashes: it is as long on every screen."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def feed(self, text: str) -> None:
        pass

    def end_line(self) -> None:
        pass

    def close(self) -> None:
        self._flow.text(RULE_TEXT, RULE)
        self._flow.end()
