"""Changes one line of config.toml and leaves the others, with their comments, as they are.

No TOML is written anew: what the changed text means is compared with what it should mean, and an edit that does not
come out so (a value over several lines, dotted keys, ...) is refused.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from mixlocal.app.config import Key, dotted, literal, normal, parse_toml
from mixlocal.errors import NotFoundError, RefusedError

_HEADER = re.compile(r"\s*\[\s*(?P<name>[^\[\]#]*?)\s*\]\s*(#.*)?$")
_ENTRY = re.compile(r"(?P<before>\s*(?P<name>[A-Za-z0-9_-]+|\"[A-Za-z0-9_-]+\"|'[A-Za-z0-9_-]+')\s*=\s*)(?P<value>.*)$")
_COMMENTED = re.compile(r"\s*#\s*(?P<name>[A-Za-z0-9_-]+)\s*=")


def with_value(path: Path, text: str, key: Key, value: Any) -> str:
    """`text` with `key` set, in its own line. Raises `RefusedError` if that cannot be done safely."""
    wanted = _with(parse_toml(path, text), key, value)
    lines = text.splitlines(keepends=True)
    end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    start, stop = _section(lines, key[:-1])
    if start is None:
        lines = [*_ended(lines, end), *([end] if lines else []), f"[{dotted(key[:-1])}]{end}"]
        start = stop = len(lines)
    at = _line_of(lines, start, stop, key[-1])
    if at is not None:
        lines[at] = _changed(lines[at], value, end)
    else:
        at = _place(lines, start, stop, key[-1])
        lines = [*_ended(lines[:at], end), f"{key[-1]} = {literal(value)}{end}", *lines[at:]]
    return _checked(path, "".join(lines), key, wanted)


def without(path: Path, text: str, key: Key) -> str:
    """`text` without the line of `key`. Raises `NotFoundError` if there is none."""
    data = parse_toml(path, text)
    if not _has(data, key):
        raise NotFoundError(f"{path}: {dotted(key)} is not set", "see: mixlocal config show")
    lines = text.splitlines(keepends=True)
    start, stop = _section(lines, key[:-1])
    at = _line_of(lines, start, stop, key[-1]) if start is not None else None
    if at is not None:
        del lines[at]
    return _checked(path, "".join(lines), key, _without(data, key))


def _checked(path: Path, text: str, key: Key, wanted: dict[str, Any]) -> str:
    try:
        right = repr(tomllib.loads(text)) == repr(wanted) or tomllib.loads(text) == wanted
    except ValueError:
        right = False
    if not right:
        raise RefusedError(
            f"{path}: {dotted(key)} is written in a way that cannot be changed by line", "use: mixlocal config edit"
        )
    return text


def _section(lines: list[str], table: Key) -> tuple[int | None, int]:
    """Where the lines of `table` begin and end; None: there is no such table. The top one is always there."""
    headers = [(n, match["name"]) for n, line in enumerate(lines) if (match := _HEADER.match(line))]
    starts = [(0, ()), *((n + 1, tuple(normal(part.strip(" \"'")) for part in name.split("."))) for n, name in headers)]
    ends = [*(n for n, _ in headers), len(lines)]
    return next(((start, end) for (start, name), end in zip(starts, ends, strict=True) if name == table), (None, 0))


def _line_of(lines: list[str], start: int, stop: int, name: str) -> int | None:
    found = ((n, _ENTRY.match(lines[n])) for n in range(start, stop))
    return next((n for n, match in found if match and normal(match["name"].strip("\"'")) == name), None)


def _changed(line: str, value: Any, end: str) -> str:
    match = _ENTRY.match(line.rstrip("\r\n"))
    assert match is not None
    return f"{match['before']}{literal(value)}{_comment(match['value'])}{end}"


def _comment(rest: str) -> str:
    """The comment behind a value, with the spaces before it."""
    for at in (n for n, character in enumerate(rest) if character == "#"):
        try:
            tomllib.loads(f"x = {rest[:at]}")
        except ValueError:
            continue  # inside a string
        return rest[len(rest[:at].rstrip()) :]
    return ""


def _place(lines: list[str], start: int, stop: int, name: str) -> int:
    """Where a new line goes: below its commented default, else below the last entry, else below the header."""
    for n in range(start, stop):
        if (match := _COMMENTED.match(lines[n])) and normal(match["name"]) == name:
            return n + 1
    entries = [n for n in range(start, stop) if lines[n].strip() and not lines[n].lstrip().startswith("#")]
    if entries:
        return entries[-1] + 1
    if start == 0 and stop == len(lines):
        return stop  # nothing but comments
    return start


def _ended(lines: list[str], end: str) -> list[str]:
    return [*lines[:-1], lines[-1].rstrip("\r\n") + end] if lines else []


def _spelling(table: dict[str, Any], name: str) -> str:
    return next((written for written in table if normal(written) == name), name)


def _has(data: Any, key: Key) -> bool:
    for name in key:
        if not isinstance(data, dict) or (written := _spelling(data, name)) not in data:
            return False
        data = data[written]
    return True


def _with(data: dict[str, Any], key: Key, value: Any) -> dict[str, Any]:
    name = _spelling(data, key[0])
    if len(key) == 1:
        return data | {name: list(value) if isinstance(value, tuple) else value}
    below = data.get(name, {})
    return data | {name: _with(below if isinstance(below, dict) else {}, key[1:], value)}


def _without(data: dict[str, Any], key: Key) -> dict[str, Any]:
    name = _spelling(data, key[0])
    if len(key) == 1:
        return {other: value for other, value in data.items() if other != name}
    return data | {name: _without(data[name], key[1:])}
