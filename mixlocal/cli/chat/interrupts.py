"""Ctrl-C in a chat."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self, TypeVar

Item = TypeVar("Item")
PAUSE_SECONDS = 0.3  # a second signal so soon after the first finds that one still being dealt with


class Interrupts:
    """What SIGINT does within `with`: raise KeyboardInterrupt where work may be left at any line, be remembered where
    it may not, as where a turn is printed or saved."""

    def __init__(self) -> None:
        self._heard = self._raises = False
        self._raised = -PAUSE_SECONDS

    def forget(self) -> None:
        """What was remembered is over."""
        self._heard = False

    @contextmanager
    def raising(self, wanted: bool) -> Iterator[None]:
        """Whether the signal raises in the block."""
        former, self._raises = self._raises, wanted
        try:
            yield
        finally:
            self._raises = former

    def steps(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; computing one may be interrupted, what is done with it may not. Raises KeyboardInterrupt
        instead of the one that would come after a signal, which may have come before the first."""
        while True:
            try:
                with self.raising(True):
                    if self._heard:
                        raise KeyboardInterrupt
                    item = next(items)
            except StopIteration:
                return
            yield item

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = True
        now = time.monotonic()
        if self._raises and now - self._raised > PAUSE_SECONDS:
            self._raised = now
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        self._former = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._former)
