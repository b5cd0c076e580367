"""One loaded model: text in, text out.

with Session.open("smolmix") as session:
    for chunk in session.stream("Why is the sky blue?"):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypedDict, Unpack

from mixlocal.app.batch.engine import Reply, Request
from mixlocal.app.budgets import RunOptions
from mixlocal.app.catalog import DEFAULT_MODEL, find_entry, sampling_defaults
from mixlocal.app.encoding import encode_prompt
from mixlocal.app.expert_usage import Usage, usage
from mixlocal.app.installed import find_store
from mixlocal.app.model_run import ModelRun
from mixlocal.app.run_stats import Clock, RunStats
from mixlocal.app.template import ChatTemplate, Message
from mixlocal.app.templates import load_template
from mixlocal.app.text_stream import AnswerText
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.engine.generate import Finish, Prefilled, generate
from mixlocal.engine.params import SamplingParams
from mixlocal.engine.sampling import Choice, Constraint, Sampler
from mixlocal.errors import RefusedError
from mixlocal.model.kv_cache import KVCache
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home, home


class RunKeywords(TypedDict, total=False):
    """`RunOptions` as keywords."""

    context: int | None
    experts_per_token: int | None
    threads: int | None
    kv_dtype: str
    ram: int | str | None
    device: str
    vram: int | str | None
    lookahead: bool
    sequences: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer. text: safe to show, may be empty. choice: the token behind it, if one was generated.
    prefilled: progress on the prompt. finish and stats: on the last chunk only."""

    text: str = ""
    choice: Choice | None = None
    prefilled: Prefilled | None = None
    finish: Finish | None = None
    stats: RunStats | None = None


class Session:
    """Tokenizer, chat template, transformer. `warnings` are for the user; `defaults` are the model's own sampling."""

    def __init__(self, store: ModelStore, options: RunOptions, folders: Home | None = None) -> None:
        """Load and check everything. Raises `MixlocalError`s of many kinds; nothing of a damaged store is used.

        folders: see `ModelRun`.
        """
        start = time.perf_counter()
        self.run = ModelRun(store, options, folders)
        self.name, self.variant = store.manifest.name, store.manifest.variant
        self.config, self.context = self.run.config, self.run.context
        self.defaults: SamplingParams = sampling_defaults(find_entry(self.name))
        self.tokenizer: Tokenizer = load_tokenizer(store.folder)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise RefusedError(
                f"{store.folder}: the tokenizer knows {self.tokenizer.vocab_size} tokens, "
                f"config.json only vocab_size = {self.config.vocab_size}"
            )
        self.template: ChatTemplate = load_template(store.folder, store.manifest.template)
        self.model = self.run.load()
        self.warnings = self.run.warnings
        self.load_s = time.perf_counter() - start

    @classmethod
    def open(cls, model: str = DEFAULT_MODEL, *, folders: Home | None = None, **options: Unpack[RunKeywords]) -> Self:
        """Load an installed model by name, name:variant or folder. options: the fields of `RunOptions`; `ram` also as
        people write it ("4G", "80%"). Raises `NotFoundError` if it is not installed.
        """
        return cls.load(model, RunOptions(**options), folders or home())

    @classmethod
    def load(cls, model: str, options: RunOptions, folders: Home) -> Self:
        """As `open`."""
        return cls(ModelStore.open(find_store(model, folders)), options, folders)

    def encode(self, prompt: str | Sequence[Message], *, raw: bool = False, prefill: str = "") -> list[int]:
        """Token ids of a conversation in the model's chat format, or of plain text with `raw`."""
        return encode_prompt(prompt, self.template, self.tokenizer, raw=raw, prefill=prefill)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, b"" for a control token or a row of the embedding that is no token."""
        return b"" if token_id >= self.tokenizer.vocab_size else self.tokenizer.token_bytes(token_id)

    def stream(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        prefill: str = "",
        constraint: Constraint | None = None,
    ) -> Iterator[Chunk]:
        """Answer piece by piece. Text that could begin a stop string is held back until it is known not to."""
        ids = self.encode(prompt, raw=raw, prefill=prefill)
        return self.stream_ids(ids, params, continuation=raw or bool(prefill), constraint=constraint)

    def stream_ids(
        self,
        ids: list[int],
        params: SamplingParams | None = None,
        *,
        continuation: bool = False,
        constraint: Constraint | None = None,
        cache: KVCache | None = None,
    ) -> Generator[Chunk, None, None]:
        """As `stream`, for a prompt that is token ids already. continuation: the answer goes on in the same text.
        cache: of `new_cache`; what it holds of the prompt's beginning is not computed again.
        """
        params = params or self.defaults
        sampler = Sampler(with_seed(params), constraint)
        cache = cache or self.new_cache()
        clock = Clock(self.load_s, len(ids), self.model.experts.counts)
        text = AnswerText(self.tokenizer, params.stop, continuation=continuation)
        for event in generate(self.model, ids, cache, sampler, self.tokenizer.eos_ids):
            if isinstance(event, Prefilled):
                clock.prefilled(event)
                yield Chunk(prefilled=event)
                continue
            if event.choice.id not in self.tokenizer.eos_ids:
                clock.token()
            piece, stopped = text.push(event.choice.id)
            finish = "stop" if stopped else event.finish
            if finish is not None:
                if not stopped:
                    piece += text.rest()
                yield Chunk(piece, event.choice, finish=finish, stats=clock.stats())
                return
            yield Chunk(piece, event.choice)
        yield Chunk(finish="length", stats=clock.stats())

    def batch(self, rows: Iterable[Request | str]) -> Iterator[Reply]:
        """Answer many prompts, as many at once as `sequences` of `open` allows; replies come as they are ready.

        rows: taken when there is room. A text stands for a message of a user, has the model's own sampling, and its
        number for an id. What is wrong with one row is its reply's error.
        """
        from mixlocal.app.batch.local import LocalEngine

        requests = (_request(number, row, self.defaults) for number, row in enumerate(rows))
        return (event for event in LocalEngine(self).answer(requests) if isinstance(event, Reply))

    def expert_usage(self) -> Usage | None:
        """How the tokens computed lately used the experts, in the order of computing; None before there are two."""
        trace = self.model.experts.trace
        chosen = trace.choices()
        return usage(chosen, trace.n_experts) if chosen.shape[1] > 1 else None

    def new_cache(self) -> KVCache:
        """An empty KV cache for the whole context."""
        return self.run.new_cache(self.context)

    def close(self) -> None:
        """Free the weights, and keep what was learnt of the routing for the next start.

        Raises what writing a small file can raise; nothing else is lost then.
        """
        vars(self).pop("model", None)
        self.run.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _request(number: int, row: Request | str, defaults: SamplingParams) -> Request:
    return Request(str(number), row, with_seed(defaults)) if isinstance(row, str) else row


def with_seed(params: SamplingParams) -> SamplingParams:
    """`params` with a seed: its own, or one drawn now, so that every run can be replayed."""
    return params if params.seed is not None else replace(params, seed=secrets.randbelow(1 << 31))
