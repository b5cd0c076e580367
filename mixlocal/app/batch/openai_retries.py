"""When to ask a server again, and when to stop: what ails one request is told from what ails the server.

A request that fails alone becomes an error of its own. Where nobody is answered it cannot be the request's fault, and
ten thousand of them are not to fail because a server was down.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from mixlocal.errors import ContextOverflowError, NetworkError, RefusedError
from mixlocal.store.chat_api import ChatApi, NotTakenError
from mixlocal.store.patience import TryAgainError

Result = TypeVar("Result")
STRIKES = 6  # times that a server may fail with the same request
TOLD_FROM = 3  # the first tries are nobody's worry
FIRST_WAIT, WAIT_LIMIT = 0.5, 30.0


class UnansweredError(NetworkError):
    """There is no use in asking for this one again. doubtful: nobody else was answered meanwhile, so it may not be the
    request's fault."""

    def __init__(self, message: str, *, doubtful: bool) -> None:
        super().__init__(message)
        self.doubtful = doubtful


class Reception:
    """How the server receives all that we ask, whatever thread asks it. answered: how many requests so far."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failing_since: float | None = None
        self.answered = 0

    def note_answer(self) -> None:
        with self._lock:
            self.answered += 1
            self._failing_since = None

    def note_failure(self) -> float:
        """Seconds since the first failure after the last answer."""
        with self._lock:
            now = time.monotonic()
            if self._failing_since is None:
                self._failing_since = now
            return now - self._failing_since


@dataclass(slots=True)
class _Attempts:
    """Those made of one request. answered: requests that the server had answered before the first."""

    answered: int
    started: float = field(default_factory=time.monotonic)
    tries: int = 0
    strikes: int = 0

    @property
    def so_far(self) -> str:
        return f"asked {self.tries} times over {time.monotonic() - self.started:.0f} s"


class Retries:
    """tell: gets a line for people whenever something is asked again."""

    def __init__(self, api: ChatApi, reception: Reception, strikes: int, tell: Callable[[str], None]) -> None:
        self._api, self._reception, self._strikes, self._tell = api, reception, strikes, tell

    def ask(self, exchange: Callable[[], Result]) -> Result:
        """What `exchange` brings. Raises `UnansweredError`; `NetworkError` if nobody is answered; what it raises."""
        attempts = _Attempts(self._reception.answered)
        while True:
            try:
                result = exchange()
            except TryAgainError as error:
                self._wait(attempts, error)
            except (RefusedError, ContextOverflowError):
                self._reception.note_answer()
                raise
            else:
                self._reception.note_answer()
                return result

    def _wait(self, attempts: _Attempts, error: TryAgainError) -> None:
        """Before the next attempt, if there is to be one."""
        host, silence = self._api.address.host, self._reception.note_failure()
        taken = not isinstance(error, NotTakenError)
        attempts.tries += 1
        attempts.strikes += taken
        is_last = self._is_last(attempts)
        if (is_last or not taken) and silence > self._limit:
            raise NetworkError(
                f"{host}: {error.reason}; no request was answered for {silence:.0f} s",
                "run the same command again: it goes on where it was",
            ) from error
        if is_last:
            doubtful = attempts.answered == self._reception.answered
            raise UnansweredError(f"{host}: {error.reason} ({attempts.so_far})", doubtful=doubtful) from error
        seconds = self._seconds(attempts.tries, error.wait)
        if attempts.tries >= TOLD_FROM:
            self._tell(f"{host}: {error.reason}; again in {seconds:.0f} s")
        self._api.cancellation.wait(seconds)

    def _is_last(self, attempts: _Attempts) -> bool:
        waited, patience = time.monotonic() - attempts.started, self._api.patience
        return attempts.strikes >= self._strikes or waited > max(2 * patience.read, patience.give_up)

    @property
    def _limit(self) -> float:
        patience = self._api.patience
        return patience.give_up if self._api.reached else patience.reach

    def _seconds(self, tries: int, asked: float | None) -> float:
        """Not all at the same moment, and never sooner than a server asks for, within reason."""
        backoff = min(FIRST_WAIT * 2.0 ** min(tries - 1, 10), WAIT_LIMIT) * random.uniform(0.75, 1.25)
        return min(max(backoff, (asked or 0.0) * random.uniform(1.0, 1.1)), self._api.patience.longest_wait)
