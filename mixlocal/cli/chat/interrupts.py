"""Ctrl-C in a chat."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self, TypeVar

Item = TypeVar("Item")


class Interrupts:
    """What SIGINT does within `with`: it is remembered, so that where a turn is printed or saved nothing is torn apart.
    In a block of `raising`, where work may be left at any line, it raises KeyboardInterrupt at once; in one of
    `heard_by` it is somebody else's."""

    def __init__(self) -> None:
        self.heard = self._raises = False
        self._listener: Callable[[], None] | None = None

    def forget(self) -> None:
        """What was remembered is over."""
        self.heard = False

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raises KeyboardInterrupt at the beginning too, for what is remembered."""
        self._raises = True
        try:
            if self.heard:
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    @contextmanager
    def heard_by(self, listener: Callable[[], None]) -> Iterator[None]:
        """listener: called when the signal comes, between any two lines of the block; it may `forget` it."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def steps(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; computing one may be interrupted, what is done with it may not. Raises KeyboardInterrupt
        instead of the one that would come after a signal, which may have come before the first."""
        while True:
            try:
                with self.raising():
                    item = next(items)
            except StopIteration:
                return
            yield item

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        if self._listener is not None:
            self._listener()
        elif self._raises:
            self._raises = False  # a second signal finds this one still being dealt with
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        self._former = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._former)
