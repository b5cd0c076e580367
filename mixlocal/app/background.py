"""Blocking work on a thread of its own, so that who waits for it can be interrupted and hears how it goes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

Result = TypeVar("Result")
News = TypeVar("News")
POLL_SECONDS = 0.05


class _Outcome(Generic[Result]):
    """What a thread came to."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._value: list[Result] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._value.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            self._error = error

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._value[0]


def in_background(work: Callable[[Callable[[News], None]], Result]) -> Generator[News, None, Result]:
    """Run `work(tell)`; yields what it tells, and returns or raises what it does. The thread dies with the process."""
    news: deque[News] = deque()
    outcome = _Outcome(lambda: work(news.append))
    thread = threading.Thread(target=outcome.run, daemon=True)
    thread.start()
    while thread.is_alive() or news:
        while news:
            yield news.popleft()
        thread.join(POLL_SECONDS)
    return outcome.result()
