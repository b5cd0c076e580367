"""Engines for Ray's workers that need no model: an answer is a function of its request. Workers get them by value."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field

from mixlocal.app.batch.engine import Pulse, Reply, Request
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import MemoryBudgetError

TICK = 0.02


@dataclass
class RayDouble:
    """delay: seconds that a row takes. Prompts that begin with "die" kill the process, with "hang" they hang in the
    first one that gets them, with "refuse" they break the engine. log: a file that tells who began which row."""

    log: str
    concurrency: int = 3
    delay: float = 0.2
    identity: Mapping[str, str] = field(default_factory=lambda: {"model": "double"})
    defaults: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.5))

    def answer(self, requests: Iterator[Request]) -> Generator[Reply | Pulse, None, None]:
        flight: dict[str, tuple[Request, float]] = {}
        open_, generated = True, 0
        while open_ or flight:
            while open_ and len(flight) < self.concurrency:
                request = next(requests, None)
                open_ = request is not None
                if request is not None:
                    self._begin(request)
                    flight[request.id] = (request, time.monotonic() + self.delay)
            time.sleep(TICK)
            for request in [request for request, due in flight.values() if due <= time.monotonic()]:
                del flight[request.id]
                generated += 3
                yield reply_to(request)
            yield Pulse(len(flight), generated, generated, {"ram": generated})

    def close(self) -> None:
        self._write("closed")

    def _begin(self, request: Request) -> None:
        prompt = str(request.prompt)
        hangs = prompt.startswith("hang") and request.id not in begun(self.log)
        self._write(request.id)
        if prompt.startswith("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.startswith("refuse"):
            raise MemoryBudgetError("no memory for this", "give it more")
        if hangs:
            time.sleep(600)

    def _write(self, what: str) -> None:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {what}\n")


def reply_to(request: Request) -> Reply:
    return Reply(request.id, f"{str(request.prompt)[::-1]} {request.params.seed}", "stop", 3, 3)


def request(n: int, prompt: str = "") -> Request:
    return Request(f"row-{n}", prompt or f"question {n}", SamplingParams(seed=n))


def begun(log: str) -> list[str]:
    """The rows that were begun, as often as they were."""
    try:
        with open(log) as file:
            return [line.split()[1] for line in file if not line.endswith("closed\n")]
    except FileNotFoundError:
        return []
