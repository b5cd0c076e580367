"""How long a download waits, and how it is stopped."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

GIVE_UP, REACH, READ = 600.0, 30.0, 10.0


@dataclass(frozen=True, slots=True)
class Patience:
    """Bounds in seconds, so that no wait is without end.

    give_up: without one new byte.  reach: as give_up, as long as the other side has never answered.  read: for a
    connection, an answer or its next bytes.  longest_wait: between two attempts, whatever a server asks for.
    window: a connection that brings less than `slowest` bytes/s for so long is replaced by another.
    """

    give_up: float = GIVE_UP
    reach: float = REACH
    read: float = READ
    longest_wait: float = 300.0
    slowest: float = 1000.0
    window: float = 30.0


class CancelledError(Exception):
    """The work was told to stop; whoever told it does not need to hear it."""


class TryAgainError(Exception):
    """Something that may go better next time. wait: seconds the other side asked for.

    odd: the answer made no sense, so a few such in a row are enough.
    """

    def __init__(self, reason: str, wait: float | None = None, *, odd: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.wait, self.odd = reason, wait, odd


class Cancellation:
    """Stops threads that wait or read: those asleep wake up, and a read that is going on ends."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._reads: list[Callable[[], None]] = []

    def cancel(self) -> None:
        self._event.set()
        with self._lock:
            for stop in self._reads:
                with contextlib.suppress(ValueError, RuntimeError, OSError):  # it ended by itself
                    stop()

    def check(self) -> None:
        if self._event.is_set():
            raise CancelledError

    def wait(self, seconds: float) -> None:
        """Sleep. Raises `CancelledError`."""
        if self._event.wait(seconds):
            raise CancelledError

    @contextlib.contextmanager
    def reading(self, stop: Callable[[], None]) -> Iterator[None]:
        """While in this block, `cancel` calls `stop`."""
        with self._lock:
            self._reads.append(stop)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._reads.remove(stop)


class RateLimit:
    """Bytes per second over all threads; None for no limit."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    @property
    def piece(self) -> int | None:
        """Bytes to take at a time so that the pace looks even."""
        return max(1024, int(self._rate / 10)) if self._rate else None

    def delay(self, nbytes: int) -> float:
        """Seconds to wait after `nbytes` more."""
        if not self._rate:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + nbytes / self._rate
            return self._free_at - now
