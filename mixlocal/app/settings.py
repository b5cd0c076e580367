"""Sampling settings as people type them: `temperature 0.2`, `stop END`, `seed none`."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import Any

from mixlocal.engine.params import SamplingParams
from mixlocal.errors import UsageError

NAMES = tuple(field.name for field in fields(SamplingParams) if field.name != "logprobs")
_WHOLE = {"top_k", "max_tokens", "seed"}
_OFF = {"none", "off", ""}


def change(params: SamplingParams, name: str, value: str) -> SamplingParams:
    """`params` with one setting changed. Raises `UsageError` for an unknown name or a value that makes no sense."""
    key = name.replace("-", "_")
    if key not in NAMES:
        near = difflib.get_close_matches(key, NAMES, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
        raise UsageError(f"no setting {name!r}", hint)
    if key == "stop":
        return replace(params, stop=() if value in _OFF else (*params.stop, value))
    if key == "seed" and value in _OFF:
        return replace(params, seed=None)
    try:
        number = int(value) if key in _WHOLE else float(value)
    except ValueError as error:
        kind = "a whole number" if key in _WHOLE else "a number"
        raise UsageError(f"{name} takes {kind}, not {value!r}") from error
    changed: dict[str, Any] = {key: number}
    return replace(params, **changed)


def show(params: SamplingParams) -> list[tuple[str, str]]:
    """(name, value) of every setting."""
    values = {name: getattr(params, name) for name in NAMES}
    values["seed"] = "drawn for each answer" if params.seed is None else params.seed
    values["stop"] = ", ".join(map(repr, params.stop)) or "only the model's own"
    return [(name, str(value)) for name, value in values.items()]
