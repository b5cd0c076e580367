"""What answers the rows of a batch, and the values that pass between a batch and what answers it.

    for event in engine.answer(requests):     # takes requests as it has room for them
        match event:
            case Reply(): ...                 # one for each, in any order
            case Pulse(): ...                 # how it goes meanwhile

Torch-free: a batch that is answered by a server loads none.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from mixlocal.app.json_form import JsonForm
from mixlocal.app.template import Message
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import MixlocalError


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to answer. id: tells it from all others of its batch.

    prompt: a conversation, or a text, which with `raw` is continued as it is and else is a user's message.
    params: with a seed; form: the JSON that the answer must be.
    """

    id: str
    prompt: str | tuple[Message, ...]
    params: SamplingParams
    raw: bool = False
    form: JsonForm | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A generated token's text, log probability, and the likeliest ones at its place with theirs."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a request: an answer, or why there is none.

    token_ids: empty where an engine does not tell. logprobs: empty unless asked for. ttft_s, total_s: seconds from
    when the engine took the request up to its first token and its end.
    """

    id: str
    text: str = ""
    finish: Literal["stop", "length"] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    ttft_s: float = 0.0
    total_s: float = 0.0
    error: MixlocalError | None = None


@dataclass(frozen=True, slots=True)
class Pulse:
    """How it goes, since `answer` was called. running: requests in flight. read, generated: tokens of prompts and of
    answers so far. found: experts looked up, by where they were found ("gpu", "ram", "disk"); empty if not known.
    note: something that happened, for the user."""

    running: int = 0
    read: int = 0
    generated: int = 0
    found: Mapping[str, int] | None = None
    note: str = ""


class BatchEngine(Protocol):
    """Answers requests, several at once."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Whatever decides an answer besides the request, by name, for people and for the fingerprint of a batch."""

    @property
    def defaults(self) -> SamplingParams:
        """The model's own sampling."""

    @property
    def concurrency(self) -> int:
        """The most requests in flight at once."""

    def answer(self, requests: Iterator[Request]) -> Generator[Reply | Pulse, None, None]:
        """A `Reply` for each request, as they finish, and a `Pulse` at least every second or so.

        Takes the next request only when it has room for it, so that at most `concurrency` are in flight; once
        `requests` has ended, finishes those. What is wrong with one request is its reply's error; what is wrong with
        all of them is raised. Closing the generator gives up on what is in flight.
        """

    def close(self) -> None:
        """Let go of models, workers, connections."""
