"""How often a cache of some of the experts would have held what a text chose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mixlocal.experts.policies import AgedFrequency
from mixlocal.experts.residency import Residency
from mixlocal.experts.trace import Choices, RoutedStep, hit_rates

REPLAYED_TOKENS = 1024  # of a longer text; aged frequency takes 3 ms for each of 30 layers' 8 experts


@dataclass(frozen=True, slots=True)
class CacheHits:
    """Shares of the chosen experts that were held when a token chose them, at each of `slots` experts a layer.

    tokens: that were replayed one by one, from an empty cache.  lru: every layer has its own slots.  aged: all layers
    share theirs, ruled by aged frequency as in our runtime.  uniform: what any cache would find if every expert were
    as likely as the others, slots / E.
    """

    tokens: int
    slots: tuple[int, ...]
    lru: tuple[float, ...]
    aged: tuple[float, ...]
    uniform: tuple[float, ...]


def cache_hits(chosen: Choices, n_experts: int) -> CacheHits:
    """With 1 to E - 1 slots a layer.  chosen: int16 [L, T, K], of which the first `REPLAYED_TOKENS` are replayed."""
    chosen = chosen[:, :REPLAYED_TOKENS]
    slots = tuple(range(1, n_experts))
    return CacheHits(
        chosen.shape[1], slots, lru_hits(chosen, n_experts), aged_hits(chosen, n_experts),
        tuple(count / n_experts for count in slots),
    )  # fmt: skip


def lru_hits(chosen: Choices, n_experts: int) -> tuple[float, ...]:
    """Each layer forgets what was used longest ago; of one token's experts, the better counts as used later.

    All sizes in one pass: a cache of k slots holds the first k of a list that is kept in the order of last use
    (Mattson and others 1970).
    """
    found = np.zeros(n_experts, dtype=np.int64)  # by place in the list
    for layer in chosen.tolist():
        recent: list[int] = []
        for token in layer:
            for expert in token:
                if expert in recent:
                    found[recent.index(expert)] += 1
            recent = token + [expert for expert in recent if expert not in token]
    shares: list[float] = (found.cumsum()[:-1] / chosen.size).tolist()
    return tuple(shares)


def aged_hits(chosen: Choices, n_experts: int) -> tuple[float, ...]:
    """See `experts.policies.AgedFrequency`, which begins with all experts alike."""
    n_layers = len(chosen)
    policy = AgedFrequency(n_layers, n_experts)
    pools = [Residency(n_layers, n_experts, count * n_layers, policy) for count in range(1, n_experts)]
    return tuple(hit_rates(_steps(chosen, n_experts), pools, policy))


def _steps(chosen: Choices, n_experts: int) -> Iterator[RoutedStep]:
    """Layer by layer of each token."""
    for token in range(chosen.shape[1]):
        for layer in range(len(chosen)):
            yield RoutedStep(layer, np.bincount(chosen[layer, token], minlength=n_experts), 1)
