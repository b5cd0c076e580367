"""Text from a model, a repository or a server, made safe for a terminal: what could steer or deceive it is shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import lru_cache

MAX_MARKS = 8  # combining characters shown on one base
_JOINER = "\u200d"
_KEPT = frozenset({"\n", "\t", _JOINER})  # the joiner holds emoji together
_SHOWN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
_VIRAMA = 9  # combining class; a joiner after one picks a letter's shape
# What Unicode calls ignorable and no category above holds: fillers and reserved code points, which draw nothing.
_IGNORABLE = (
    (0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x2065, 0x2065), (0x3164, 0x3164), (0xFFA0, 0xFFA0),
    (0xFFF0, 0xFFF8), (0xE0000, 0xE00FF), (0xE01F0, 0xE0FFF), (0xFDD0, 0xFDEF),
)  # fmt: skip
_SELECTORS = ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF), (0x180B, 0x180D), (0x180F, 0x180F))  # they choose a glyph
_JAMO = ((0x1161, 0x11FF), (0xD7B0, 0xD7FB))  # vowels and finals are drawn over the consonant before
_PICTURES = ((0x2190, 0x2BFF), (0x1F000, 0x1FAFF))


def safe_text(text: str) -> str:
    """`text` with every control, bidirectional and invisible format character made visible."""
    return "".join(visible(c) if is_unsafe(c) else c for c in text)


def visible(character: str) -> str:
    """ESC is "^[", DEL is "^?", all others are "<U+202E>"."""
    code = ord(character)
    return f"^{chr(code ^ 64)}" if code < 32 or code == 127 else f"<U+{code:04X}>"


@lru_cache(maxsize=8192)
def is_unsafe(character: str) -> bool:
    """Unassigned characters pass, since the next emoji are among them, unless Unicode reserves them as ignorable."""
    if character in _KEPT:
        return False
    code = ord(character)
    return unicodedata.category(character) in _SHOWN_CATEGORIES or _within(code, _IGNORABLE) or code & 0xFFFE == 0xFFFE


class SafeStream:
    """`safe_text` over pieces, with what needs a memory: any split of a text gives the output of the whole.

    On one base character at most eight combining characters are shown, the rest of a flood is dropped, and one
    variation selector. A joiner is kept after an emoji or a virama, where it may join, and is made visible elsewhere.

    show: how an unsafe character is made visible
    """

    def __init__(self, show: Callable[[str], str] = visible) -> None:
        self._show = show
        self._marks = 0
        self._selected = False
        self._joins = False

    def push(self, piece: str) -> str:
        if piece.isascii() and piece.isprintable():
            if piece:
                self._start_base(joins=False)
            return piece
        return "".join([self._next(character) for character in piece])

    def _next(self, character: str) -> str:
        if character == _JOINER:
            kept, self._joins = self._joins, False
            return character if kept else self._show(character)
        kind = _kind(character)
        if kind == "selector":
            kept, self._selected = not self._selected, True
            return character if kept else self._show(character)
        if kind == "mark":
            self._marks += 1
            self._joins = self._marks <= MAX_MARKS and unicodedata.combining(character) == _VIRAMA
            return character if self._marks <= MAX_MARKS else ""
        self._start_base(joins=kind == "picture")
        return self._show(character) if kind == "unsafe" else character

    def _start_base(self, *, joins: bool) -> None:
        self._marks, self._selected, self._joins = 0, False, joins


@lru_cache(maxsize=8192)
def _kind(character: str) -> str:
    code = ord(character)
    if _within(code, _SELECTORS):
        return "selector"
    if is_unsafe(character):
        return "unsafe"
    if unicodedata.category(character) in ("Mn", "Me") or _within(code, _JAMO):
        return "mark"
    return "picture" if _within(code, _PICTURES) else "base"


def _within(code: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= code <= last for first, last in ranges)
