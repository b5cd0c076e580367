"""config.toml: what the user set once for all runs.

Top-level keys are the long flags of every command that has them; a table holds those of one command alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlocal.errors import NotFoundError, RefusedError
from mixlocal.store.durable import named_error

MAX_BYTES = 1_000_000
MAX_DEPTH = 4  # more than any command has subcommands
MAX_SHOWN = 60  # characters of a value that an error repeats
EDIT = "change it with: mixlocal config edit"

Key = tuple[str, ...]  # ("temperature",) at the top, ("prompt", "temperature") in a table


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What stands in the file. Keys have dashes, as flags do, however they are written. tables: the empty ones too."""

    path: Path
    values: dict[Key, Any]
    tables: tuple[Key, ...] = ()

    def first(self, keys: Iterable[Key]) -> tuple[Key, Any] | None:
        """The first of `keys` that is in the file, and its value."""
        return next(((key, self.values[key]) for key in keys if key in self.values), None)

    def refuse(self, key: Key, why: str, hint: str = "") -> RefusedError:
        return RefusedError(f"{self.path}: {dotted(key)}{why}", hint or EDIT)


def read_config(path: Path, *, required: bool = False) -> ConfigFile:
    """An absent file is an empty one unless it is `required`.

    Raises `RefusedError` naming line and column where it is no TOML, `PermissionDeniedError` where we may not read it.
    """
    values: dict[Key, Any] = {}
    tables: list[Key] = []
    _flatten(path, parse_toml(path, read_text(path, required=required)), (), values, tables)
    return ConfigFile(path, values, tuple(tables))


def read_text(path: Path, *, required: bool = False) -> str:
    """Raises `RefusedError` for a folder, for a file that is too large, and for what is not UTF-8."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise RefusedError(f"{path}: is a folder and no file", "move it away") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        if required:
            raise NotFoundError(f"{path}: no such file") from error
        return ""
    except OSError as error:
        raise named_error(error, path) from error
    if len(data) > MAX_BYTES:
        raise RefusedError(f"{path}: larger than {MAX_BYTES // 10**6} MB, so not a file of settings")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path}: not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error


def parse_toml(path: Path, text: str) -> dict[str, Any]:
    import tomllib  # `--help` reads no file

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RefusedError(f"{path}: {why}", EDIT) from error


def dotted(key: Key) -> str:
    return ".".join(key)


def normal(name: str) -> str:
    """max_tokens, as Python writes it, is --max-tokens."""
    return name.replace("_", "-")


def literal(value: Any) -> str:
    """`value` as TOML writes it. A JSON string is a TOML string, but for DEL."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(literal(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def shown(value: Any) -> str:
    """`value` as an error repeats it."""
    text = literal(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a name that nothing has."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else "see all of them with: mixlocal config show"


def _flatten(path: Path, table: dict[str, Any], above: Key, values: dict[Key, Any], tables: list[Key]) -> None:
    for name, value in table.items():
        key = (*above, normal(name))
        if key in values or key in tables:
            raise RefusedError(f"{path}: {dotted(key)} is there twice, with a dash and with an underscore", EDIT)
        if not isinstance(value, dict):
            if not _is_toml(value):
                raise RefusedError(f"{path}: {dotted(key)}: a whole number of more than 64 bits", EDIT)
            values[key] = value
        elif len(key) > MAX_DEPTH:
            raise RefusedError(f"{path}: {dotted(key)}: nested too deeply", EDIT)
        else:
            tables.append(key)
            _flatten(path, value, key, values, tables)


def _is_toml(value: Any) -> bool:
    """Whether its whole numbers have 64 bits, as TOML says and Python does not care."""
    if isinstance(value, list | dict):
        return all(_is_toml(item) for item in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 63
