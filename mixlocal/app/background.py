"""Blocking work on a thread of its own, so that who waits for it can be interrupted and hears how it goes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")
News = TypeVar("News")
POLL_SECONDS = 0.05


def in_background(work: Callable[[Callable[[News], None]], Result]) -> Generator[News, None, Result]:
    """Run `work(tell)`; yields what it tells, and returns or raises what it does. The thread dies with the process."""
    news: deque[News] = deque()
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(work(news.append))
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() or news:
        while news:
            yield news.popleft()
        thread.join(POLL_SECONDS)
    return outcome.result()
