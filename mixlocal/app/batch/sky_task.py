"""A batch on a rented GPU: a task of SkyPilot's, ready to launch."""

from __future__ import annotations

from pathlib import Path

TASK = Path(__file__).parents[2] / "data" / "sky_task.yaml"


def sky_task() -> str:
    """The task as YAML, comments and all; how to launch it stands at its top."""
    return TASK.read_text(encoding="utf-8")
