"""The architectures we compute, by config.json's model_type. One file each."""

from __future__ import annotations

from typing import Any, Protocol

from mixlocal.errors import RefusedError
from mixlocal.model.arch import mixtral
from mixlocal.model.config import ModelConfig


class Architecture(Protocol):
    """What an architecture's module offers."""

    def read_config(self, raw: dict[str, Any], where: str) -> ModelConfig:
        """config.json -> blueprint. Raises `RefusedError` naming file and field."""

    def trunk_source(self, name: str) -> str:
        """The checkpoint's name for one of our trunk tensors."""

    def expert_source(self, layer: int, expert: int, part: str) -> str:
        """The checkpoint's name for w1, w2 or w3 of an expert."""


ARCHITECTURES: dict[str, Architecture] = {"mixtral": mixtral}


def find_architecture(raw: dict[str, Any], where: str) -> tuple[str, Architecture]:
    """Name and module for a config.json. Raises `RefusedError` if we cannot compute it."""
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise RefusedError(f"{where}: model_type = {repr(name)[:60]} is not supported", f"mixlocal runs: {supported}")
    return name, ARCHITECTURES[name]


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    return find_architecture(raw, where)[1].read_config(raw, where)
