"""A saved chat as Markdown for people and as JSON for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from mixlocal.store.session_db import SavedSession, Turn

FORMAT, FORMAT_VERSION = "mixlocal-chat", 1
_LINE_END = re.compile(r"\r\n|\r|\n")  # as Markdown sees it
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")  # all of ASCII's, any of which Markdown lets one escape
_SURROGATES = re.compile("[\ud800-\udfff]")


def as_markdown(head: SavedSession, turns: Sequence[Turn]) -> str:
    """A heading for each turn and its text as a quotation: whatever fence, heading or HTML it opens ends with it."""
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", "\n\n".join(_blocks(head, turns)) + "\n")


def as_json(head: SavedSession, turns: Sequence[Turn], *, ids: bool = False) -> str:
    """One object in ASCII. ids: with the tokens of the answers."""
    chat = {"format": FORMAT, "version": FORMAT_VERSION, **head_fields(head)}
    return json.dumps(chat | {"turns": [_turn_fields(turn, ids) for turn in turns]}, indent=2) + "\n"


def head_fields(head: SavedSession) -> dict[str, Any]:
    """What JSON tells of a chat besides its turns. params: what the user set, null where it cannot be read."""
    try:
        params = json.loads(head.params)
    except ValueError:
        params = None
    times = {"created": _utc(head.created), "updated": _utc(head.updated)}
    return asdict(head) | times | {"params": params}


def speaker(turn: Turn, head: SavedSession) -> str:
    return "You" if turn.role == "user" else head.model


def _turn_fields(turn: Turn, ids: bool) -> dict[str, Any]:
    fields = asdict(turn)
    return fields if ids else {name: value for name, value in fields.items() if name != "ids"}


def _blocks(head: SavedSession, turns: Sequence[Turn]) -> Iterator[str]:
    yield f"# {_escaped(head.name)}"
    begun = datetime.fromtimestamp(head.created).astimezone()
    yield f"{_escaped(f'{head.model}:{head.variant}')}, {begun:%Y-%m-%d %H:%M}"
    if head.system:
        yield from ("## System", _quoted(head.system))
    for turn in turns:
        yield from (f"## {_escaped(speaker(turn, head))}", _quoted(turn.content))
        if turn.interrupted:
            yield "*(interrupted)*"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" if line else ">" for line in _LINE_END.split(text))


def _escaped(text: str) -> str:
    return _PUNCTUATION.sub(r"\\\1", " ".join(text.split()))


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
