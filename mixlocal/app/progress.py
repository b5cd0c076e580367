"""How long work reports on itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` bytes of one stage ("download", "build", "quantize", "verify"); `what` is being worked on."""

    stage: str
    done: int
    total: int
    what: str = ""
