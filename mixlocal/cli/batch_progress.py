"""How far a batch is: one line on a terminal, drawn again and again; elsewhere a line every 10 s."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mixlocal.cli.loading import WIPED
from mixlocal.cli.options import Globals
from mixlocal.cli.render import PLAIN_PROGRESS_SECONDS, safe_text, say

if TYPE_CHECKING:
    from mixlocal.app.batch.job import Progress

REDRAW_SECONDS = 0.2
SETTLING_SECONDS = 3.0  # before that a speed says little
_TIERS = {"gpu": "GPU", "ram": "RAM", "disk": "disk"}


class BatchMeter:
    def __init__(self, options: Globals) -> None:
        self._options = options
        self._redraws = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._told = time.monotonic() - (REDRAW_SECONDS if self._redraws else 0.0)
        self._drawn = False

    def show(self, progress: Progress) -> None:
        if progress.note:
            self.say(progress.note)
        wait = REDRAW_SECONDS if self._redraws else PLAIN_PROGRESS_SECONDS
        now = time.monotonic()
        if self._options.quiet or now - self._told < wait:
            return
        self._told = now
        if self._redraws:
            print(f"{WIPED}{safe_text(line(progress))[: _columns() - 1]}", end="", file=sys.stderr, flush=True)
            self._drawn = True
        else:
            say(self._options, line(progress))

    def say(self, text: str) -> None:
        """A line of its own."""
        self.clear()
        say(self._options, text)

    def say_amid(self, text: str) -> None:
        """As `say`, whatever is being printed at this moment: for a signal's handler, which may not use print."""
        if not self._options.quiet:
            wiped = WIPED if self._drawn else ""
            with contextlib.suppress(OSError):
                buffer = sys.stderr.buffer
                getattr(buffer, "raw", buffer).write(f"{wiped}{text}\n".encode())  # no raw below PYTHONUNBUFFERED

    def clear(self) -> None:
        if self._drawn:
            print(WIPED, end="", file=sys.stderr, flush=True)
            self._drawn = False


def line(progress: Progress) -> str:
    """ "412/1000 rows · 3 failed · 1.9 rows/s · 171 tok/s · experts RAM 92% disk 8% · ETA 5 min"."""
    parts = [f"{progress.done}/{progress.total} rows"]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    if progress.seconds >= SETTLING_SECONDS:
        parts += speeds(progress)
    if tiers := _tiers(progress.found):
        parts.append(f"experts {tiers}")
    if progress.seconds >= SETTLING_SECONDS and progress.answered:
        left = progress.total - progress.done
        parts.append(f"ETA {span(left * progress.seconds / progress.answered)}")
    return " · ".join(parts)


def speeds(progress: Progress) -> list[str]:
    """Rows and generated tokens a second, in this run."""
    if not progress.seconds:
        return []
    rows = progress.answered / progress.seconds
    shown = f"{rows:.1f} rows/s" if rows >= 0.1 or not rows else f"a row every {1 / rows:.0f} s"
    return [shown, f"{progress.generated / progress.seconds:.0f} tok/s"]


def span(seconds: float) -> str:
    """ "40 s", "5 min", "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _tiers(found: Mapping[str, int] | None) -> str:
    total = sum(found.values()) if found else 0
    if not found or not total:
        return ""
    return " ".join(f"{_TIERS.get(name, name)} {100 * n / total:.0f}%" for name, n in found.items() if n)


def _columns() -> int:
    with contextlib.suppress(OSError, ValueError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    return 80
