"""How long work reports on itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of one stage, such as "download" or "quantize"; `what` is being worked on."""

    stage: str
    done: int
    total: int
    what: str = ""


@dataclass(frozen=True, slots=True)
class FileProgress:
    """Bytes of one of several files that are on their way at once; at `total` it is done with."""

    name: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that happened meanwhile: a retry, a file begun again."""

    text: str


Step = Progress | FileProgress | Notice
