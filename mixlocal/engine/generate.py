"""The loop: prefill, then one token at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from mixlocal.engine.sampling import Choice, Sampler
from mixlocal.errors import ContextOverflowError, UsageError
from mixlocal.model.kv_cache import KVCache
from mixlocal.model.transformer import Transformer

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """`done` of `total` prompt tokens are in the cache; `kept` of them were there before."""

    done: int
    total: int
    kept: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. finish: set on the last, which may be an end-of-sequence token."""

    choice: Choice
    finish: Finish | None = None


def generate(
    model: Transformer, prompt: list[int], cache: KVCache, sampler: Sampler, stop_ids: Collection[int]
) -> Iterator[Prefilled | Token]:
    """Continue `prompt` until an id in `stop_ids`, max_tokens or the context's end.

    What the cache holds of the prompt's beginning is not computed again, and what it holds beyond is forgotten. Raises
    `UsageError` for an empty prompt, `ContextOverflowError` if it does not fit.
    """
    check_fits(prompt, cache.limit)
    cache.keep(prompt[:-1])  # the last one is computed in any case: its logits are needed
    logits = torch.empty(0)
    yield Prefilled(cache.length, len(prompt), cache.length)
    for progress, logits in prefill(model, prompt[cache.length :], cache):  # noqa: B007  the last ones are needed
        yield progress
    history = list(prompt)
    room = min(sampler.params.max_tokens, cache.limit - cache.length)
    for index in range(room):
        choice = sampler.choose(logits, history)
        history.append(choice.id)
        if choice.id in stop_ids:
            yield Token(choice, "stop")
            return
        yield Token(choice, "length" if index == room - 1 else None)
        if index < room - 1:
            logits = decode_step(model, choice.id, cache)


def prefill(model: Transformer, ids: list[int], cache: KVCache) -> Iterator[tuple[Prefilled, torch.Tensor]]:
    """Run `ids`, which follow what the cache holds, through the model in chunks; yields progress and the logits [V]."""
    kept = cache.length
    for start in range(0, len(ids), model.chunk):
        logits = model.forward(torch.tensor(ids[start : start + model.chunk]), cache)
        yield Prefilled(cache.length, kept + len(ids), kept), logits


def decode_step(model: Transformer, token: int, cache: KVCache) -> torch.Tensor:
    """Logits [V] after one more token."""
    return model.forward(torch.tensor([token]), cache)


def check_fits(prompt: list[int], context: int) -> None:
    if not prompt:
        raise UsageError("the prompt is empty", "give some text")
    if len(prompt) > context:
        raise ContextOverflowError(
            f"the prompt has {len(prompt)} tokens and the context holds {context}", "shorten it, or raise --ctx"
        )
