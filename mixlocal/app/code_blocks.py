"""Fenced code blocks of an answer (CommonMark 0.31, section 4.5)."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(r"( *)(`{3,}(?=[^`]*$)|~{3,})[ \t]*(.*?)[ \t]*")


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """text: its lines, without the fences. language: the first word behind the opening fence. closed: whether it ends
    before the answer does."""

    text: str
    language: str
    closed: bool


def code_blocks(text: str) -> list[CodeBlock]:
    """All of them in order. Unlike CommonMark's a fence may stand at any depth, as those of list items do."""
    blocks: list[CodeBlock] = []
    lines = iter(text.splitlines(keepends=True))
    for line in lines:
        opened = _FENCE.fullmatch(line.rstrip("\r\n"))
        if opened is None:
            continue
        indent, fence, info = len(opened[1]), opened[2], opened[3]
        inside: list[str] = []
        closed = False
        for inner in lines:
            closed = _closes(inner, fence)
            if closed:
                break
            inside.append(_unindent(inner, indent))
        blocks.append(CodeBlock("".join(inside), info.split(maxsplit=1)[0] if info else "", closed))
    return blocks


def _closes(line: str, fence: str) -> bool:
    """Only the same characters, at least as many."""
    mark = line.strip()
    return len(mark) >= len(fence) and not mark.strip(fence[0])


def _unindent(line: str, depth: int) -> str:
    """Without as many of its first spaces as the fence has."""
    return line[min(depth, len(line) - len(line.lstrip(" "))) :]
