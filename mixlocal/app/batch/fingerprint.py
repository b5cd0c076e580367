"""What every answer of a batch depends on, besides its row: a batch goes on only where all of it is as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from mixlocal import __version__
from mixlocal.app.batch.setup import Setup
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import RefusedError

MAX_TEXT = 4000  # characters that are kept of a text, for people to compare; of a longer one its hash
MAX_SHOWN = 60
_ENGINE = "engine: "


def fingerprint(setup: Setup, identity: Mapping[str, str], defaults: SamplingParams) -> dict[str, str]:
    """By name, in an order to be read in. defaults: the model's own sampling."""
    sampling = replace(defaults, **setup.sampling)
    names = [field.name for field in fields(sampling) if field.name != "seed"]
    texts = {
        "system": setup.system,
        "template": setup.template.source if setup.template else "",
        "schema": setup.form.schema if setup.form else "",
    }
    return {
        "mixlocal": __version__.partition(".")[0],
        "input format": setup.format,
        **_engine(identity),
        **{name.replace("_", "-"): _plain(getattr(sampling, name)) for name in names},
        **{name: _kept(text) for name, text in texts.items()},
    }


def _engine(identity: Mapping[str, str]) -> dict[str, str]:
    return {_ENGINE + name: _kept(value) for name, value in identity.items()}


def check_same(before: Mapping[str, str], now: Mapping[str, str], place: Path) -> None:
    """Raises `RefusedError` naming all that differs, with both values."""
    names = dict.fromkeys((*before, *now))
    changed = [
        f"{name.removeprefix(_ENGINE)} was {_shown(before.get(name))} and is {_shown(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise RefusedError(
            f"{place} was begun otherwise: {'; '.join(changed)}",
            "run it as it was begun, choose another output, or give --fresh to throw those answers away",
        )


def check_identity(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """What the engine says of itself once it is open, against what was known of it before. Raises `RefusedError`."""
    differs = [name for name in dict.fromkeys((*expected, *found)) if expected.get(name) != found.get(name)]
    if differs:
        name = differs[0]
        raise RefusedError(
            f"the engine's {name} is {_shown(found.get(name))} and not {_shown(expected.get(name))}, as was known of it"
        )


def _plain(value: object) -> str:
    return " ".join(map(repr, value)) if isinstance(value, tuple) else str(value)


def _kept(text: str) -> str:
    data = text.encode(errors="surrogateescape")  # bytes of a command line may be no text
    if len(text) <= MAX_TEXT:
        return data.decode(errors="backslashreplace")
    return f"{len(text)} characters, sha256 {hashlib.sha256(data).hexdigest()}"


def _shown(value: str | None) -> str:
    if not value:
        return "not set"
    return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."
