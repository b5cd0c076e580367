"""What a line begins: CommonMark's block starts, each as a question to the line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixlocal.cli.markdown.line import Line

LONGEST_FENCE = 200  # characters of a line that opens code
LONGEST_HEADER = 1000  # characters of a table's first and second line
LONGEST_RULE = 200
CODE_INDENT = 4


@dataclass(frozen=True)
class Fence:
    sign: str
    length: int
    indent: int
    language: str


@dataclass(frozen=True)
class Marker:
    """Of a list item. kind: what the items of one list share. offset: columns from here to its text."""

    kind: str
    number: int
    offset: int
    is_empty: bool


def heading_level(line: Line) -> int:
    """1 to 6, or 0 where the line, at its first sign, is no heading."""
    level = line.run("#") if line.peek() == "#" else 0
    return level if level <= 6 and line.peek(level) in (" ", "") else 0


def is_rule(line: Line) -> bool:
    """Three or more of one sign, and spaces."""
    sign, count, ahead = line.peek(), 0, 0
    if sign not in ("-", "*", "_"):
        return False
    while following := line.peek(ahead):
        if following not in (sign, " ") or ahead >= LONGEST_RULE:
            return False
        count += following == sign
        ahead += 1
    return count >= 3


def fence(line: Line, indent: int) -> Fence | None:
    sign = line.peek()
    if sign not in ("`", "~") or (length := line.run(sign)) < 3:
        return None
    if sign == "`" and "`" in line.text[line.at + length :]:
        return None
    text = line.rest(LONGEST_FENCE)
    if text is None:
        return None
    words = re.split(r"[ ,{:]+", text[length:].strip(" "))
    return Fence(sign, length, indent, words[0])


def closes(line: Line, opened: Fence) -> bool:
    indent = line.spaces()
    if indent >= CODE_INDENT or line.peek(indent) != opened.sign:
        return False
    length = line.run(opened.sign, indent)
    if length < opened.length:
        return False
    return not line.peek(indent + length + line.run(" ", indent + length))


def marker(line: Line, indent: int) -> Marker | None:
    """A bullet or a number, a space, and the text; `indent` columns lie before it."""
    sign = line.peek()
    digits = 0
    if sign in ("-", "*", "+"):
        width, kind = 1, sign
    else:
        while digits < 10 and line.peek(digits) in _DIGITS:
            digits += 1
        if not 0 < digits < 10 or line.peek(digits) not in (".", ")"):
            return None
        width, kind = digits + 1, line.peek(digits)
    if line.peek(width) not in (" ", ""):
        return None
    spaces = line.run(" ", width)
    is_empty = not line.peek(width + spaces)
    number = int(line.text[line.at : line.at + digits]) if digits else 0
    gap = spaces if 1 <= spaces <= CODE_INDENT and not is_empty else 1
    return Marker(kind, number, indent + width + gap, is_empty)


_DIGITS = tuple("0123456789")
