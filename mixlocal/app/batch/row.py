"""A row of the input: what it asks, or why it cannot be asked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

from mixlocal.app.batch.engine import Request
from mixlocal.app.batch.lines import Line
from mixlocal.app.json_form import JsonForm
from mixlocal.app.template import Message
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import MixlocalError, UsageError

MAX_MESSAGE = 400  # characters of what is said of a row; the row itself may be in it
SEED_BITS = 53  # so many are a whole number in every reader of JSON


@dataclass(frozen=True, slots=True)
class Asked:
    """prompt, raw, form: as of a `Request`. sampling: what row and command line say of the fields of
    `SamplingParams`; the model's own defaults hold for the others. model: the name in the row, if it names one."""

    prompt: str | tuple[Message, ...]
    sampling: dict[str, Any] = field(default_factory=dict)
    raw: bool = False
    form: JsonForm | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` naming a value out of range."""
        SamplingParams(**self.sampling)


@dataclass(frozen=True, slots=True)
class Row:
    """id: the row's own, or its line number; None where a broken line does not tell. key: changes with whatever of the
    row its answer depends on. Of `asked` and `error` there is one."""

    number: int
    id: str | None
    key: bytes
    asked: Asked | None = None
    error: MixlocalError | None = None


def good_row(line: Line, name: str, asked: Asked) -> Row:
    """Raises `UsageError` for text that is none."""
    schema = asked.form.schema if asked.form else None
    prompt = asked.prompt if isinstance(asked.prompt, str) else [(m.role, m.content) for m in asked.prompt]
    facts = json.dumps([name, prompt, asked.raw, schema, asked.sampling], ensure_ascii=False, sort_keys=True)
    try:
        return Row(line.number, name, hashlib.sha256(facts.encode()).digest(), asked)
    except UnicodeEncodeError as error:
        character = ord(facts[error.start])
        raise UsageError(f"has \\u{character:04x} without its other half: that is no text") from error


def bad_row(line: Line, name: str | None, error: MixlocalError) -> Row:
    facts = b"%d\0%s\0%s" % (line.number, error.message.encode(errors="surrogatepass"), line.data or b"")
    message = error.message if len(error.message) <= MAX_MESSAGE else f"{error.message[:MAX_MESSAGE]}..."
    told = UsageError(f"line {line.number}: {message}", error.hint)
    return Row(line.number, name, hashlib.sha256(facts).digest(), error=told)


def request(row: Row, defaults: SamplingParams, seed: int) -> Request:
    """What an engine is asked. defaults: the model's own. seed: of the batch; a row without one gets hers from it and
    the row's id, so that every run draws the same."""
    assert row.asked is not None
    assert row.id is not None
    asked = row.asked
    params = replace(defaults, **asked.sampling)
    if params.seed is None:
        params = replace(params, seed=row_seed(seed, row.id))
    return Request(row.id, asked.prompt, params, asked.raw, asked.form)


def row_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)
