"""Text to the clipboard: through the desktop's own program, else through the terminal."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys

from mixlocal.errors import UsageError

_PROGRAMS = (
    ("WAYLAND_DISPLAY", ("wl-copy",)), ("DISPLAY", ("xclip", "-selection", "clipboard")),
    ("DISPLAY", ("xsel", "--clipboard", "--input")), ("", ("pbcopy",)),
)  # fmt: skip
PATIENCE_SECONDS = 5
MOST_BYTES = 70_000  # of text, that terminals take in one sequence


def copy(text: str) -> str:
    """Returns what was done. Raises `UsageError` where there is no clipboard."""
    data = text.encode(errors="replace")
    for variable, command in _PROGRAMS:
        if (not variable or os.environ.get(variable)) and shutil.which(command[0]) and _ran(command, data):
            return f"{len(text):,} characters copied"
    if not sys.stdout.isatty() or len(data) > MOST_BYTES:
        raise UsageError("there is no clipboard here for so much text", "/export writes the chat to a file")
    sys.stdout.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")  # xterm's control sequences, "OSC 52"
    sys.stdout.flush()
    return f"{len(text):,} characters handed to the terminal's clipboard, if it has one"


def _ran(command: tuple[str, ...], data: bytes) -> bool:
    try:
        quiet = subprocess.DEVNULL
        done = subprocess.run(command, input=data, timeout=PATIENCE_SECONDS, stdout=quiet, stderr=quiet, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
