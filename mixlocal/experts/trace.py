"""What the routers chose lately, and what a cache of another size or policy would have made of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixlocal.experts.policies import Floats, Ints, Policy
from mixlocal.experts.residency import NOWHERE, Residency

Choices = npt.NDArray[np.int16]  # [L, T, K]: the experts that T tokens chose in L layers, best first

KEPT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class RoutedStep:
    """One applied layer: counts[e] of `tokens` chose expert e."""

    layer: int
    counts: Ints
    tokens: int


class RoutingTrace:
    """The last `tokens` passes, and what each of the last `tokens` tokens chose. Adding is cheap: it happens in every
    layer of every token."""

    def __init__(self, n_layers: int, n_experts: int, tokens: int = KEPT_TOKENS) -> None:
        self.n_layers, self.n_experts = n_layers, n_experts
        self._last: deque[tuple[int, list[int] | Ints, int]] = deque(maxlen=n_layers * tokens)
        self._kept = tokens
        self._orders: list[deque[list[int]]] = [deque(maxlen=tokens) for _ in range(n_layers)]

    def add(self, layer: int, chosen: list[int], tokens: int) -> None:
        """chosen: the ids of all `tokens`, one token's behind the other's, each token's best first."""
        order = self._orders[layer]
        if tokens == 1:
            kept: list[int] | Ints = chosen
            order.append(chosen)
        else:
            kept = np.bincount(chosen, minlength=self.n_experts)
            top_k = len(chosen) // tokens
            late = chosen[-self._kept * top_k :]
            order.extend(late[i : i + top_k] for i in range(0, len(late), top_k))
        self._last.append((layer, kept, tokens))

    def choices(self) -> Choices:
        """Of the last tokens, in the order in which they were computed; as many as every layer has."""
        count = min(map(len, self._orders), default=0)
        rows = [list(order)[len(order) - count :] for order in self._orders]
        return np.array(rows, dtype=np.int16).reshape(self.n_layers, count, -1 if count else 0)

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


def hit_rate(steps: Iterable[RoutedStep], residency: Residency, policy: Policy, warm: Sequence[int] = ()) -> float:
    """Share of the distinct experts of all steps that an empty `residency`, ruled by `policy`, would have held.

    warm: keys that it holds beforehand, as far as there is room.
    """
    for key in warm[: residency.free]:
        residency.place(key, ())
        residency.fill(key)
    return hit_rates(steps, [residency], policy)[0]


def hit_rates(steps: Iterable[RoutedStep], residencies: Sequence[Residency], policy: Policy) -> list[float]:
    """As `hit_rate`, of several at once: what the policy learns does not depend on what is held."""
    hits, total = [0] * len(residencies), 0
    for step in steps:
        policy.use(step.layer, step.counts, step.tokens)
        keys = (step.layer * len(step.counts) + step.counts.nonzero()[0]).tolist()
        total += len(keys)
        for index, residency in enumerate(residencies):
            hits[index] += _look_up(residency, keys)
    return [found / total if total else 0.0 for found in hits]


def _look_up(residency: Residency, keys: list[int]) -> int:
    """How many of `keys` are held; the others are put there, as far as there is room for all at once."""
    hits = 0
    for key in keys:
        if residency.find(key) != NOWHERE:
            hits += 1
        elif residency.place(key, keys) != NOWHERE:
            residency.fill(key)
    return hits
