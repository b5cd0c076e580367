"""How far long work is that counts tokens or repetitions."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

from mixlocal.cli.render import PLAIN_PROGRESS_SECONDS, say

if TYPE_CHECKING:
    from mixlocal.app.measure import Running
    from mixlocal.cli.options import Globals

Result = TypeVar("Result")


def follow(options: Globals, work: Generator[Running, None, Result]) -> Result:
    """Run `work` to its end, tell how it goes, and return its result. What has a total of 0 is not counted."""
    line = RunningLine(options)
    try:
        while True:
            event = next(work)
            line.show(f"{event.what}, {event.done} of {event.total}" if event.total else event.what)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        line.clear()
        work.close()  # an interrupt may have struck between two steps


class RunningLine:
    """One line of stderr: rewritten on a terminal, elsewhere a new one every 10 s."""

    def __init__(self, options: Globals) -> None:
        self._options = options
        self._rewrites = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not options.quiet
        self._said = -PLAIN_PROGRESS_SECONDS

    def show(self, text: str) -> None:
        if self._rewrites:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._said >= PLAIN_PROGRESS_SECONDS:
            say(self._options, text)
            self._said = time.monotonic()

    def clear(self) -> None:
        if self._rewrites:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
