"""The lines of an input, one at a time, however long or broken they are."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

from mixlocal.errors import UsageError

MAX_LINE_BYTES = 16 << 20
_SKIP = 1 << 20

InputFormat = Literal["openai", "jsonl", "txt"]
_SUFFIXES: dict[str, InputFormat] = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}


@dataclass(frozen=True, slots=True)
class Line:
    """number: counted from 1, blank lines too. data: without the line end; None of one that is too long."""

    number: int
    data: bytes | None


def read_lines(file: BinaryIO, where: str) -> Iterator[Line]:
    """All but blank ones, without a byte-order mark. where: names the file. Raises `UsageError` for UTF-16."""
    number = 0
    while piece := file.readline(MAX_LINE_BYTES + 2):
        number += 1
        if number == 1:
            if piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UsageError(f"{where} is UTF-16, not UTF-8", "convert it: iconv -f UTF-16 -t UTF-8")
            piece = piece.removeprefix(codecs.BOM_UTF8)
        data = piece.removesuffix(b"\n").removesuffix(b"\r")
        if len(data) > MAX_LINE_BYTES:
            if not piece.endswith(b"\n"):
                _skip_line(file)
            yield Line(number, None)
        elif data.strip():
            yield Line(number, data)


def guess_format(suffix: str, first: Line | None) -> InputFormat:
    """Of a file by the end of its name and its first line: OpenAI's lines have a custom_id."""
    known = _SUFFIXES.get(suffix.lower())
    if known == "txt" or first is None or first.data is None:
        return known or "txt"
    if b'"custom_id"' in first.data:
        return "openai"
    return "jsonl" if known or first.data.lstrip().startswith(b"{") else "txt"


def _skip_line(file: BinaryIO) -> None:
    while (piece := file.readline(_SKIP)) and not piece.endswith(b"\n"):
        pass
