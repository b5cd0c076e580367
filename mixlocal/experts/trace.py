"""What the routers chose lately, and what a cache of another size or policy would have made of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixlocal.experts.policies import Floats, Ints, Policy
from mixlocal.experts.residency import NOWHERE, Residency

KEPT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class RoutedStep:
    """One applied layer: counts[e] of `tokens` chose expert e."""

    layer: int
    counts: Ints
    tokens: int


class RoutingTrace:
    """The last `tokens` passes. Adding is cheap: it happens in every layer of every token."""

    def __init__(self, n_layers: int, n_experts: int, tokens: int = KEPT_TOKENS) -> None:
        self.n_layers, self.n_experts = n_layers, n_experts
        self._last: deque[tuple[int, list[int] | Ints, int]] = deque(maxlen=n_layers * tokens)

    def add(self, layer: int, chosen: list[int], tokens: int) -> None:
        """chosen: the ids of all `tokens`, each as often as it was chosen."""
        kept = chosen if tokens == 1 else np.bincount(chosen, minlength=self.n_experts)
        self._last.append((layer, kept, tokens))

    def steps(self) -> list[RoutedStep]:
        """Oldest first."""
        return [
            RoutedStep(layer, np.bincount(kept, minlength=self.n_experts) if tokens == 1 else np.asarray(kept), tokens)
            for layer, kept, tokens in self._last
        ]


def mean_rates(steps: Sequence[RoutedStep], n_layers: int, n_experts: int) -> tuple[Floats, int]:
    """float64 [n_layers, n_experts], the share of tokens that chose each expert, and of how many tokens."""
    counts, tokens = np.zeros((n_layers, n_experts)), np.zeros(n_layers, dtype=np.int64)
    for step in steps:
        counts[step.layer] += step.counts
        tokens[step.layer] += step.tokens
    return counts / np.maximum(tokens, 1)[:, None], int(tokens.min(initial=1 << 30))


def hit_rate(
    steps: Sequence[RoutedStep], residency: Residency, policy: Policy, warm: Sequence[int] = ()
) -> float:
    """Share of the distinct experts of all steps that an empty `residency`, ruled by `policy`, would have held.

    warm: keys that it holds beforehand, as far as there is room.
    """
    for key in warm[: residency.free]:
        residency.place(key, ())
        residency.fill(key)
    hits = total = 0
    for step in steps:
        policy.use(step.layer, step.counts, step.tokens)
        keys = (step.layer * len(step.counts) + step.counts.nonzero()[0]).tolist()
        total += len(keys)
        for key in keys:
            if residency.find(key) != NOWHERE:
                hits += 1
            else:
                residency.place(key, keys)
                residency.fill(key)
    return hits / total if total else 0.0
