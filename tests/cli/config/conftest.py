"""A home whose config.toml a test may write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from mixlocal.cli.options import Globals
from mixlocal.cli.prompt import prompt

Seen = dict[str, Any]


@pytest.fixture
def own(run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own with the models of the shared one; no variable of whoever runs the tests counts."""
    for name in [name for name in os.environ if name.startswith("MIXLOCAL_")]:
        monkeypatch.delenv(name)
    (tmp_path / "models").symlink_to(home / "models")
    monkeypatch.setenv("MIXLOCAL_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def write(own: Path) -> Callable[[str], Path]:
    def written(text: str) -> Path:
        (own / "config.toml").write_text(text)
        return own / "config.toml"

    return written


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What `prompt` is given, with the flags before it; no model is loaded."""
    found: Seen = {}

    def callback(**given: Any) -> None:
        options = click.get_current_context().obj
        assert isinstance(options, Globals)
        found.update(given, quiet=options.quiet, json=options.as_json)

    monkeypatch.setattr(prompt, "callback", callback)
    return found
