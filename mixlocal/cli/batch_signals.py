"""Ctrl-C and SIGTERM in a batch: an answer is written whole or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, Self, TypeVar

Item = TypeVar("Item")
_WATCHED = (signal.SIGINT, signal.SIGTERM)
_AT_ONCE = 3  # interrupts after which nothing is waited for any more


class BatchSignals:
    """What the two signals do within `with`. The first Ctrl-C calls `drain`. The second, as SIGTERM, leaves `steps` at
    any line, so that what is done with a step is never torn apart; a third ends the program where it is.

    One that came to this process ignored stays so.
    """

    def __init__(self, drain: Callable[[], None]) -> None:
        self._drain = drain
        self._interrupts = 0
        self._terminated = self._raises = False
        self._former: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def steps(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; computing one may be left, what is done with it may not."""
        while True:
            try:
                with self.leaving():
                    item = next(items)
            except StopIteration:
                return
            yield item

    @property
    def heard(self) -> bool:
        return self._terminated or self._interrupts > 0

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """A block that may be left at any line."""
        self._raises = True
        try:
            if self._is_over():
                self._leave()
            yield
        finally:
            self._raises = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._terminated |= number == signal.SIGTERM
        self._interrupts += number == signal.SIGINT
        if self._interrupts == _AT_ONCE:
            os._exit(128 + number)
        if self._is_over():
            if self._raises:
                self._leave()
        else:
            self._drain()

    def _is_over(self) -> bool:
        return self._terminated or self._interrupts > 1

    def _leave(self) -> NoReturn:
        self._raises = False  # the next signal finds this one still being dealt with
        former = self._former.get(signal.SIGTERM)
        if self._terminated and callable(former):
            former(signal.SIGTERM, None)  # raises what the program takes for it
        raise KeyboardInterrupt

    def __enter__(self) -> Self:
        for number in _WATCHED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
