"""A server that speaks as much of OpenAI's API as a batch needs, and fails as it is told to.

    def fault(ask: Ask) -> Answer | None: ...       # None: as it should be
    with OpenAIDouble(fault=fault) as server:
        OpenAIEngine(server.base_url)

python tests/openai_double.py --port 8000 --model NAME serves until it is ended.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from hub_answer import Answer, Request, json_answer
from hub_origin import Origin

MODEL = "test/mixtral"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request for an answer. attempt: 1 for the first with this prompt. good: the answer it should get."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    attempt: int
    good: Answer

    @property
    def prompt(self) -> str:
        return prompt_of(self.body)


class OpenAIDouble:
    """asks: all so far, in order. answered: whole answers that were sent, by prompt. peak: the most at a time."""

    def __init__(
        self,
        models: Sequence[str] = (MODEL,),
        fault: Callable[[Ask], Answer | None] = lambda ask: None,
        *,
        seconds: float = 0.0,
        listing: Answer | None = None,
        port: int = 0,
    ) -> None:
        """seconds: that an answer takes. listing: what is said instead of the list of models."""
        self.models, self.fault, self.seconds, self.listing = models, fault, seconds, listing
        self.asks: list[Ask] = []
        self.requests: list[Request] = []
        self.answered: Counter[str] = Counter()
        self._attempts: Counter[str] = Counter()
        self.peak = self.busy = 0
        self.closing, self.rate, self._lock = threading.Event(), 0, threading.Lock()
        self._origin: Origin | None = Origin("openai", ("127.0.0.1", port), self)  # type: ignore[arg-type]
        self.port = self._origin.listener.getsockname()[1]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def connections(self) -> int:
        """Open ones."""
        return len(self._origin._connections) if self._origin else 0

    def stop(self) -> None:
        """From now on connections are refused."""
        self.closing.set()
        if self._origin:
            self._origin.close()
            self._origin = None

    def start(self) -> None:
        """Again, at the same port."""
        self.closing.clear()
        self._origin = Origin("openai", ("127.0.0.1", self.port), self)  # type: ignore[arg-type]

    def __enter__(self) -> OpenAIDouble:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answer(self, request: Request) -> Answer:
        """What `Origin` asks for each request."""
        with self._lock:
            self.requests.append(request)
        if request.path in ("/v1/models", "/health"):
            return self.listing or json_answer({"data": [{"id": name} for name in self.models]})
        if len(request.body) < int(request.headers.get("content-length", 0)):  # the client went away
            return Answer(0, {}, ending="fin")
        if request.path not in ("/v1/chat/completions", "/v1/completions"):
            return complaint(404, "Not Found")
        return self._answer(request)

    def _answer(self, request: Request) -> Answer:
        body = json.loads(request.body)
        with self._lock:
            self._attempts[prompt_of(body)] += 1
            attempt = self._attempts[prompt_of(body)]
            ask = Ask(request.path, request.headers, body, attempt, good_answer(request.path, body))
            self.asks.append(ask)
            self.busy += 1
            self.peak = max(self.peak, self.busy)
        answer = self.fault(ask) or replace(ask.good, wait=self.seconds)
        return replace(answer, then=lambda: self._sent(ask, answer))

    def _sent(self, ask: Ask, answer: Answer) -> None:
        with self._lock:
            self.busy -= 1
            if answer.body == ask.good.body and answer.ending == "keep":
                self.answered[ask.prompt] += 1


def prompt_of(body: dict[str, Any]) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


def expected(prompt: str, seed: int | None) -> str:
    """What the double answers."""
    return f"{prompt[::-1]} ({seed})"


def good_answer(path: str, body: dict[str, Any]) -> Answer:
    prompt = prompt_of(body)
    text = '{"a": 1}' if "response_format" in body else expected(prompt, body.get("seed"))
    return chat_answer(text, len(prompt)) if path.endswith("chat/completions") else text_answer(text, len(prompt))


def chat_answer(text: str | None, prompt_tokens: int = 1, finish: str | None = "stop", **choice: Any) -> Answer:
    message = {"role": "assistant", "content": text}
    given = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None, **choice}
    return _answer("chat.completion", given, prompt_tokens, len(text or ""))


def text_answer(text: str, prompt_tokens: int = 1, finish: str | None = "stop", **choice: Any) -> Answer:
    given = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None, **choice}
    return _answer("text_completion", given, prompt_tokens, len(text))


def _answer(kind: str, choice: dict[str, Any], read: int, generated: int) -> Answer:
    usage = {"prompt_tokens": read, "completion_tokens": generated, "total_tokens": read + generated}
    return json_answer({"id": "x-1", "object": kind, "created": 1, "model": MODEL, "choices": [choice], "usage": usage})


def complaint(status: int, message: str = "no", code: object = None, **headers: str) -> Answer:
    """As vLLM words it, whose code is the status."""
    error = {"message": message, "type": "BadRequestError", "param": None, "code": code or status}
    told = {name.replace("_", "-"): value for name, value in headers.items()}
    return json_answer({"error": error}, status, told)


def dropped() -> Answer:
    """The connection is reset before anything is said."""
    return Answer(0, {}, ending="rst")


def cut(good: Answer, ending: str = "fin") -> Answer:
    """Half of it, under a head that tells the whole length."""
    body = good.body[0]
    return replace(good, body=(body[: len(body) // 2],), ending=ending)


def silent() -> Answer:
    """Takes the request and never answers."""
    return Answer(0, {}, ending="stall")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--seconds", type=float, default=0.0, help="that an answer takes")
    given = parser.parse_args()
    with OpenAIDouble([given.model], seconds=given.seconds, port=given.port) as server, suppress(KeyboardInterrupt):
        print(server.base_url, flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
