"""What the command line of a chat asked for, and the model it wants."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixlocal.cli.options import sampling_params

if TYPE_CHECKING:
    from mixlocal.app.budgets import RunOptions
    from mixlocal.app.conversation import Overflow
    from mixlocal.engine.params import SamplingParams
    from mixlocal.store.paths import Home


@dataclass(frozen=True, slots=True)
class Start:
    """sampling: what was given over the model's own settings. files: texts for the first message. history: keep what
    is typed on disk."""

    folders: Home
    model: str
    run: RunOptions
    system: str = ""
    sampling: dict[str, object] = field(default_factory=dict)
    overflow: Overflow = "drop-oldest"
    files: tuple[str, ...] = ()
    stats: bool = True
    markdown: bool = True
    history: bool = True

    def with_model(self, model: str) -> Start:
        return replace(self, model=model)

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """What was given over `defaults`. Raises `UsageError` naming a value out of range."""
        return sampling_params(defaults, self.sampling)

    def check(self, model: str) -> None:
        """Raises `NotFoundError` if it is not installed."""
        from mixlocal.app.installed import find_store

        find_store(model, self.folders)

    def history_file(self) -> Path | None:
        """Made for its owner's eyes only, before the editor writes to it."""
        if not self.history:
            return None
        from mixlocal.store.durable import create_private

        create_private(self.folders.history)
        return self.folders.history

