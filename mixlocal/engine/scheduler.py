"""Many sequences at once: continuous batching (Orca, OSDI 2022) over one pool of KV pages (vLLM, arXiv 2309.06180).

    scheduler = Scheduler(model, pool, most_running=16)
    scheduler.add(Generation(prompt, sampler, stop_ids, limit))
    while scheduler.busy:
        for event in scheduler.step():  # one pass through the model
            ...

A pass takes a token of every sequence that is answering, and fills up with tokens of prompts. A sequence is let in
when the pages that it may come to need are promised to nobody else, so memory cannot run out later; it takes them only
as it grows. Its tokens are those it would have alone, wherever a token's logits do not depend on what is beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

import torch

from mixlocal.engine.generate import Finish, Prefilled, Token, check_fits
from mixlocal.engine.sampling import Sampler
from mixlocal.errors import MixlocalError
from mixlocal.model.kv_cache import KVCache, KVPool, page_count
from mixlocal.model.transformer import Piece, Transformer


class Generation:
    """One sequence: `prompt` goes on until an id in `stop_ids`, max_tokens, or `context` tokens in all.

    room: the most tokens that may come. history: prompt and what came so far. cache: while it runs.
    """

    def __init__(self, prompt: list[int], sampler: Sampler, stop_ids: Collection[int], context: int) -> None:
        """Raises `UsageError` for an empty prompt, `ContextOverflowError` if it does not fit."""
        check_fits(prompt, context)
        self.prompt, self.sampler, self.stop_ids = prompt, sampler, stop_ids
        self.room = min(sampler.params.max_tokens, context - len(prompt))
        self.history = list(prompt)
        self.cache: KVCache | None = None

    @property
    def most_tokens(self) -> int:
        return len(self.prompt) + self.room

    @property
    def generated(self) -> int:
        return len(self.history) - len(self.prompt)


@dataclass(frozen=True, slots=True)
class Failed:
    """No token could be chosen, or none was allowed."""

    error: MixlocalError


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a generation. With a `Token` that has a finish, and with `Failed`, it has ended."""

    generation: Generation
    what: Prefilled | Token | Failed


class Scheduler:
    """running: those that take part in every pass. waiting: who will be let in next. read, generated: tokens of all
    prompts and answers so far."""

    def __init__(self, model: Transformer, pool: KVPool, most_running: int) -> None:
        """pool: used by nobody else."""
        self.running: list[Generation] = []
        self.waiting: deque[Generation] = deque()
        self._model, self._pool, self._most_running = model, pool, most_running
        self.read = self.generated = 0
        self._promised = 0  # pages

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, generation: Generation) -> None:
        """generation: with room for a token, and no larger than the pool."""
        assert generation.room > 0
        assert page_count(generation.most_tokens) <= self._pool.pages
        self.waiting.append(generation)
        self._let_in()

    def cancel(self, generation: Generation) -> None:
        """End it, if it has not ended."""
        if generation.cache is not None:
            self._end(generation)
        elif generation in self.waiting:
            self.waiting.remove(generation)
        self._let_in()

    def step(self) -> list[Event]:
        """Run one pass, choose a token for everyone whose prompt is read, and let in who fits then."""
        pieces = self._share_out()
        if not pieces:
            return []
        logits = self._model.forward_many(list(pieces.values()))
        events = [self._advance(*ran) for ran in zip(pieces, logits, strict=True)]
        self._let_in()
        return events

    def _let_in(self) -> None:
        while self.waiting and len(self.running) < self._most_running:
            pages = page_count(self.waiting[0].most_tokens)
            if self._promised + pages > self._pool.pages:
                return
            generation = self.waiting.popleft()
            generation.cache = KVCache(self._pool, generation.most_tokens)
            self._promised += pages
            self.running.append(generation)

    def _share_out(self) -> dict[Generation, Piece]:
        """The next tokens of each, in the order in which they were let in."""
        left = self._model.chunk - sum(generation.generated > 0 for generation in self.running)
        pieces = {}
        for generation in self.running:
            cache = generation.cache
            assert cache is not None
            if not generation.generated:
                ids = generation.prompt[cache.length : cache.length + max(0, left)]
                left -= len(ids)
                self.read += len(ids)
            else:
                ids = generation.history[-1:]
            if ids:
                pieces[generation] = Piece(cache, ids)
        return pieces

    def _advance(self, generation: Generation, logits: torch.Tensor) -> Event:
        """logits [V], behind the last token that was computed."""
        assert generation.cache is not None
        done, total = generation.cache.length, len(generation.prompt)
        if done < total:
            return Event(generation, Prefilled(done, total))
        try:
            choice = generation.sampler.choose(logits, generation.history)
        except MixlocalError as error:
            self._end(generation)
            return Event(generation, Failed(error))
        generation.history.append(choice.id)
        self.generated += 1
        finish: Finish | None = "stop" if choice.id in generation.stop_ids else None
        if generation.generated == generation.room:
            finish = finish or "length"
        if finish is not None:
            self._end(generation)
        return Event(generation, Token(choice, finish))

    def _end(self, generation: Generation) -> None:
        assert generation.cache is not None
        generation.cache.truncate(0)
        generation.cache = None
        self._promised -= page_count(generation.most_tokens)
        self.running.remove(generation)
