"""A stand-in for what answers a batch: an answer is a function of its request. Slow, failing or breaking on demand.

    BATCH_DOUBLE='{"delay": 0.01}' python tests/batch_double.py batch IN -o OUT

is the real program with it in the place of the model on this machine.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import re
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice

from mixlocal.app.batch.engine import Pulse, Reply, Request, TokenLogprob
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import ContextOverflowError, NetworkError

VARIABLE = "BATCH_DOUBLE"


@dataclass
class Behaviour:
    """delay: seconds that a row takes, more or less. fails: a pattern of the ids of rows that fail. raises_after: so
    many replies the whole engine breaks. log: a file that the id of every row is appended to when it is taken."""

    delay: float = 0.0
    concurrency: int = 4
    pulse: float = 0.05
    fails: str = "$^"
    raises_after: int | None = None
    log: str = ""
    identity: dict[str, str] = field(default_factory=lambda: {"engine": "double", "model": "double", "variant": "v1"})


class Double:
    """A `BatchEngine`, and what chooses one. taken, replied: counts; most_in_flight: requests at once."""

    def __init__(self, behaviour: Behaviour | None = None) -> None:
        self.behaviour = behaviour or Behaviour()
        self.taken = self.replied = self.most_in_flight = self.opened = 0
        self.requests: list[Request] = []
        self.closed = False

    @property
    def identity(self) -> Mapping[str, str]:
        return self.behaviour.identity

    @property
    def defaults(self) -> SamplingParams:
        return SamplingParams(temperature=0.5)

    @property
    def concurrency(self) -> int:
        return self.behaviour.concurrency

    def open(self) -> Double:
        self.opened += 1
        return self

    def answer(self, requests: Iterator[Request]) -> Generator[Reply | Pulse, None, None]:
        flight: list[tuple[float, int, Request]] = []
        pulsed, ended = time.monotonic(), False
        while True:
            fresh = [] if ended else list(islice(requests, self.concurrency - len(flight)))
            ended = ended or len(flight) + len(fresh) < self.concurrency
            for request in fresh:
                self._take(request)
                share = hashlib.sha256(request.id.encode()).digest()[0] / 255  # some take longer than others
                heapq.heappush(flight, (time.monotonic() + self.behaviour.delay * (0.5 + share), self.taken, request))
            self.most_in_flight = max(self.most_in_flight, len(flight))
            if not flight:
                return
            now = time.monotonic()
            if now - pulsed >= self.behaviour.pulse:
                pulsed = now
                yield Pulse(len(flight), 10 * self.taken, 5 * self.replied, {"ram": 92 * self.taken, "disk": 8})
            if flight[0][0] > now:
                time.sleep(min(flight[0][0] - now, self.behaviour.pulse))
                continue
            if self.replied == self.behaviour.raises_after:
                raise NetworkError("the double gave up")
            yield self._reply(heapq.heappop(flight)[2])

    def _take(self, request: Request) -> None:
        self.taken += 1
        self.requests.append(request)
        if self.behaviour.log:
            descriptor = os.open(self.behaviour.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{request.id}\n".encode(errors="replace"))
            os.close(descriptor)

    def _reply(self, request: Request) -> Reply:
        self.replied += 1
        if re.search(self.behaviour.fails, request.id):
            return Reply(request.id, error=ContextOverflowError("too long", "shorten it"))
        logprobs = (TokenLogprob(b"an", -0.5, ((b"an", -0.5),)), TokenLogprob(b"\xff", float("-inf")))
        return Reply(
            request.id, text_of(request), "stop", prompt_tokens=10, completion_tokens=5, token_ids=(1, 2, 3, 4, 5),
            logprobs=logprobs if request.params.logprobs else (), ttft_s=0.1, total_s=0.2,
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True


def text_of(request: Request) -> str:
    """What it answers: all that it was asked counts."""
    asked = json.dumps([request.prompt, asdict(request.params), request.raw, request.form], default=str)
    return f"answer {hashlib.sha256(asked.encode()).hexdigest()[:12]} to\n{str(request.prompt)[-20:]}"


def main() -> None:
    from mixlocal.app.batch import engines
    from mixlocal.cli import batch, main

    behaviour = Behaviour(**json.loads(os.environ.get(VARIABLE, "{}")))
    engines.ENGINES["local"] = lambda _: Double(behaviour)
    batch.install_default = lambda *_: None
    main()


if __name__ == "__main__":
    main()
