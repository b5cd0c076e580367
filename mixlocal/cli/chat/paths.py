"""Completes paths as a shell does."""

from __future__ import annotations

import os
from collections.abc import Iterator


def complete_path(typed: str) -> Iterator[str]:
    """What the last word of `typed` may become; folders end with a slash, hidden files are offered when asked for."""
    folder, _, begun = typed.rpartition(" ")[2].rpartition("/")
    prefix = typed.rpartition(" ")[2][: len(typed.rpartition(" ")[2]) - len(begun)]
    try:
        with os.scandir(os.path.expanduser(folder) or ("/" if prefix else ".")) as entries:
            names = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError:
        return
    for name, is_folder in names:
        if name.startswith(begun) and (begun or not name.startswith(".")):
            yield f"{prefix}{name}{'/' if is_folder else ''}"
