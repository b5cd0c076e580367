"""Threads that ask a server, one request each at a time, and the loop that feeds them."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, repeat

from mixlocal.app.batch.engine import Pulse, Reply, Request
from mixlocal.app.batch.openai_answer import decode
from mixlocal.app.batch.openai_request import encode
from mixlocal.app.batch.openai_retries import Reception, Retries, UnansweredError
from mixlocal.errors import ContextOverflowError, MixlocalError, NotFoundError, RefusedError, UsageError
from mixlocal.store.chat_api import ApiAddress, ChatApi
from mixlocal.store.patience import Cancellation, CancelledError, Patience, TryAgainError

PULSE_SECONDS, NOTE_SECONDS = 1.0, 10.0
PROBE_SECONDS, LEAVE_SECONDS = 10.0, 2.0
MAX_ASIDE = 8


@dataclass(frozen=True, slots=True)
class Service:
    """What to ask, and how patiently."""

    address: ApiAddress
    model: str
    patience: Patience
    strikes: int


@dataclass(frozen=True, slots=True)
class _Task:
    """taken: when. error: why it was put aside, if it was; once the server has answered others since, its next failure
    is its `last`."""

    request: Request
    taken: float
    error: MixlocalError | None = None
    last: bool = False


class Crew:
    """A request that the server fails with while it answers nobody is put aside, until it is known whose fault that is:
    it is asked again once others are answered, or at the end."""

    def __init__(self, service: Service, concurrency: int) -> None:
        self._service, self._concurrency = service, concurrency
        self._cancellation, self._reception = Cancellation(), Reception()
        self._api = ChatApi(service.address, self._cancellation, service.patience, concurrency)
        self._retries = Retries(self._api, self._reception, service.strikes, self._tell)
        self._inbox: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[_Task, Reply | BaseException]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._aside: deque[_Task] = deque()
        self._answered_then = 0  # when the last one was put aside
        self._running = self._read = self._generated = 0
        self._note, self._noted, self._pulsed = "", float("-inf"), time.monotonic()

    def run(self, requests: Iterator[Request]) -> Generator[Reply | Pulse, None, None]:
        """As `BatchEngine.answer`."""
        more = chain(requests, repeat(None))
        while True:
            self._fill(more)
            if self._running:
                yield from self._listen()
            elif not self._aside:
                return
            elif self._is_alive():
                yield from (Reply(task.request.id, error=task.error) for task in self._aside)
                self._aside.clear()
            else:
                self._again(len(self._aside))

    def dismiss(self) -> None:
        """Give up on what is in flight; the server sees its connections close."""
        self._cancellation.cancel()
        self._api.close()
        for _ in self._threads:
            self._inbox.put(None)
        deadline = time.monotonic() + LEAVE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # The loop

    def _fill(self, more: Iterator[Request | None]) -> None:
        while self._running < self._concurrency:
            if self._aside and self._reception.answered > self._answered_then:
                self._aside = deque(replace(task, last=True) for task in self._aside)
                self._again(1)
            elif len(self._aside) >= MAX_ASIDE:
                self._again(1)
            elif (request := next(more)) is not None:
                self._start(_Task(request, time.monotonic()))
            else:
                return

    def _again(self, count: int) -> None:
        for _ in range(count):
            self._start(self._aside.popleft())

    def _start(self, task: _Task) -> None:
        self._running += 1
        self._inbox.put(task)
        if len(self._threads) < min(self._running, self._concurrency):
            self._threads.append(threading.Thread(target=self._work, name="batch-openai", daemon=True))
            self._threads[-1].start()

    def _listen(self) -> Iterator[Reply | Pulse]:
        """Until something is answered, or it is time to say that nothing was."""
        wait = self._pulsed + PULSE_SECONDS - time.monotonic()
        if wait <= 0:
            yield self._pulse()
            return
        try:
            task, outcome = self._outbox.get(timeout=wait)
        except queue.Empty:
            return
        self._running -= 1
        yield from self._settle(task, outcome)

    def _settle(self, task: _Task, outcome: Reply | BaseException) -> Iterator[Reply]:
        if isinstance(outcome, UnansweredError):
            if outcome.doubtful and not task.last:
                self._aside.append(replace(task, error=outcome))
                self._answered_then = self._reception.answered
                return
            outcome = Reply(task.request.id, error=outcome)
        if isinstance(outcome, BaseException):
            raise outcome
        self._read += outcome.prompt_tokens
        self._generated += outcome.completion_tokens
        yield replace(outcome, total_s=time.monotonic() - task.taken)

    def _pulse(self) -> Pulse:
        """With what was told last, though not every time: a server that is away has a line for each request."""
        self._pulsed, note = time.monotonic(), ""
        if self._note and self._pulsed >= self._noted + NOTE_SECONDS:
            note, self._note, self._noted = self._note, "", self._pulsed
        return Pulse(self._running, self._read, self._generated, note=note)

    def _tell(self, note: str) -> None:
        self._note = note

    def _is_alive(self) -> bool:
        """Whether the server answers anything at all."""
        patience = replace(self._service.patience, read=min(PROBE_SECONDS, self._service.patience.read))
        try:
            with closing(ChatApi(self._service.address, self._cancellation, patience, 1)) as api:
                api.models()
        except (RefusedError, NotFoundError):
            return True
        except TryAgainError:
            return False
        return True

    # In the threads

    def _work(self) -> None:
        while (task := self._inbox.get()) is not None:
            try:
                outcome: Reply | BaseException = self._ask(task.request)
            except CancelledError:
                return
            except BaseException as error:  # noqa: BLE001 - raised again by `_settle`
                outcome = error
            self._outbox.put((task, outcome))

    def _ask(self, request: Request) -> Reply:
        try:
            path, body = encode(request, self._service.model)
            return self._retries.ask(lambda: decode(request, self._api.post(path, body)))
        except (RefusedError, ContextOverflowError) as error:
            return Reply(request.id, error=error)
        except NotFoundError as error:
            if self._reception.answered:
                return Reply(request.id, error=error)
            raise UsageError(  # it is not this request that is not there
                f"{self._service.address.host}: {error.message}",
                f"check --base-url (most end in /v1) and --api-model ({self._service.model})",
            ) from error
