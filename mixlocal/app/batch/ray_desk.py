"""An engine on a thread of its own, asked for one request at a time by other threads.

desk = Desk(make_engine)
desk.opened.result()
reply = desk.ask(request)    # a future; many of these are answered together
desk.no_more(1)              # so that the engine does not wait for a second one to go on with the first
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from mixlocal.app.batch.engine import BatchEngine, Pulse, Reply, Request
from mixlocal.app.batch.ray_tally import Tally

AHEAD = 4  # one more request for every so many that an engine answers at once, so that none of its places is empty


def capacity(concurrency: int) -> int:
    """Requests to have at a desk at once: those that its engine answers, and a few that wait for a place."""
    return concurrency + max(1, concurrency // AHEAD)


class Desk:
    """opened: the engine, or why there is none. All methods may be called from any thread."""

    def __init__(self, make_engine: Callable[[], BatchEngine]) -> None:
        self.opened: Future[BatchEngine] = Future()
        self._make = make_engine
        self._changed = threading.Condition()
        self._inbox: deque[Request] = deque()
        self._asked: dict[str, Future[Reply]] = {}
        self._received = 0
        self._no_more_after = 0
        self._capacity = 0
        self._closed = False
        self._failure: Exception | None = None
        self._tally = Tally()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> Future[Reply]:
        """Its reply, once there is one. Raises there what the engine raised, now or before."""
        future: Future[Reply] = Future()
        with self._changed:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            self._asked[request.id] = future
            self._inbox.append(request)
            self._received += 1
            self._changed.notify()
        return future

    def no_more(self, count: int) -> None:
        """After `count` requests in all, none follows soon. Without that, an engine with room waits for the next one.

        The number makes this true whichever of this call and those of `ask` comes first.
        """
        with self._changed:
            self._no_more_after = count
            self._changed.notify()

    def news(self) -> list[Pulse]:
        """What went on since the last call: one pulse with the counts, then one for each note."""
        with self._changed:
            return self._tally.take()

    def close(self) -> None:
        """Returns when the engine is closed. What is still asked for gets no answer."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            engine = self._make()
        except Exception as error:  # noqa: BLE001 - raised again by `opened`
            self.opened.set_exception(error)
            return
        self._capacity = capacity(engine.concurrency)
        self.opened.set_result(engine)
        try:
            while self._wait():
                self._answer(engine)
        except Exception as error:  # noqa: BLE001 - raised again by every reply that is waited for
            self._fail(error)
        finally:
            engine.close()

    def _answer(self, engine: BatchEngine) -> None:
        events = engine.answer(self._requests())
        self._tally.begin()
        for event in events:
            if self._closed:
                events.close()
                return
            with self._changed:
                if isinstance(event, Pulse):
                    self._tally.add(event)
                    continue
                future = self._asked.pop(event.id)
            future.set_result(event)
        with self._changed:
            forgotten = self._asked.keys() - {request.id for request in self._inbox}
        if forgotten:
            raise AssertionError(f"the engine ended without a reply to {sorted(forgotten)}")

    def _requests(self) -> Iterator[Request]:
        while self._wait(ends=True):
            yield self._inbox.popleft()

    def _wait(self, *, ends: bool = False) -> bool:
        """Wait for a request. False when the desk is closed or, with `ends`, when none follows soon: what asks us does
        not before it has an answer to what it asked, or said so."""
        with self._changed:
            while not self._inbox and not self._closed:
                full = len(self._asked) >= self._capacity
                if ends and (full or self._received == self._no_more_after):
                    return False
                self._changed.wait()
            return not self._closed

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failure = error
            asked = list(self._asked.values())
            self._asked.clear()
        for future in asked:
            future.set_exception(error)
