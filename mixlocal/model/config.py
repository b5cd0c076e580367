"""The blueprint of a model, and the careful reading of a config.json."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mixlocal.errors import RefusedError


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Softmax over `n_experts`, the `top_k` largest kept and renormalised to sum to one."""

    n_experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Blueprint of a mixture-of-experts transformer. Grouped-query attention where n_kv_heads < n_heads."""

    architecture: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    expert_hidden: int
    router: RouterConfig
    norm_eps: float
    rope_theta: float
    max_context: int
    sliding_window: int | None
    tied_embeddings: bool


@dataclass(slots=True)
class ConfigFields:
    """Typed, checked access to one JSON object; remembers what was asked for, so that the rest can be refused.

    `where` names the file in errors. Every getter raises `RefusedError` naming file, field, value and allowed range.
    """

    raw: dict[str, Any]
    where: str
    _asked: set[str] = field(default_factory=set)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.refusal(name, f"must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._get(name, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.refusal(name, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if type(value) is not bool:
            raise self.refusal(name, "must be true or false")
        return value

    def given(self, name: str) -> bool:
        self._asked.add(name)
        return self.raw.get(name) is not None

    def section(self, name: str) -> ConfigFields:
        value = self._get(name, None)
        if not isinstance(value, dict):
            raise self.refusal(name, "must be an object")
        return ConfigFields(value, f"{self.where}: {name}")

    def require(self, name: str, *allowed: object) -> None:
        """Refuse any other value; an absent field is fine."""
        self._asked.add(name)
        value = self.raw.get(name)
        if value is not None and not any(value == option and type(value) is type(option) for option in allowed):
            only = f"; only {' or '.join(map(repr, allowed))}" if allowed else ""
            raise self.refusal(name, f"is not supported{only}")

    def refuse_unknown(self, harmless: Iterable[str]) -> None:
        """Refuse every field that was never asked for, is not in `harmless` and is not null."""
        unknown = sorted(k for k in self.raw.keys() - self._asked - set(harmless) if self.raw[k] is not None)
        if unknown:
            raise RefusedError(
                f"{self.where}: {_shown(unknown[0])} is not a setting we compute", "this model needs a newer mixlocal"
            )

    def refusal(self, name: str, reason: str) -> RefusedError:
        return RefusedError(f"{self.where}: {name} = {_shown(self.raw.get(name))} {reason}")

    def _get(self, name: str, default: object) -> Any:
        self._asked.add(name)
        value = self.raw.get(name, default)
        if value is None and default is None:
            raise RefusedError(f"{self.where}: {name} is missing")
        return default if value is None else value


def _shown(value: object) -> str:
    """A value from outside in an error message: short, one line, and nested ones not followed to the bottom."""
    return reprlib.repr(value)[:60]
