"""JSON from outside, read with suspicion: no NaN, no duplicate keys, no bombs."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any, NoReturn

from mixlocal.errors import RefusedError
from mixlocal.store.durable import named_errors

MAX_BYTES = 1 << 20


def read_json_object(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file. Raises `RefusedError` naming the file for anything else."""
    with named_errors(path), path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise RefusedError(f"{path}: larger than {max_bytes} bytes")
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """`data` as a JSON object; `where` begins the error message."""
    try:
        text = data.decode()  # json would also accept UTF-16 and UTF-32
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise RefusedError(f"{where}: nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of too many digits, our own two
        raise RefusedError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RefusedError(f"{where}: not a JSON object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {reprlib.repr(twice)} stands twice")
    return result
