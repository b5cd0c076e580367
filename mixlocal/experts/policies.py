"""Which expert is needed again soonest? Eviction takes the one whose next use lies farthest ahead.

A policy learns from every routing and answers in applied layers: a pass through L layers is L of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

SLOW = 0.02  # weight of the newest token in a lasting rate: half of it is of the last 34 tokens
FAST = 0.7  # in a momentary one: half of it is of the last token
FORGET = 0.999  # of what was learnt about the two, per applied layer
LEAST_RATE = 1e-3
NEVER = 1e15  # applied layers ahead
TOGETHER = 8  # layers that a rate may lag behind: a handful of numbers at a time cost more to fetch than to add


class Policy(Protocol):
    def use(self, layer: int, counts: Ints, tokens: int) -> None:
        """`counts[e]` of `tokens` chose expert e of `layer`, which is applied now."""

    def distance(self, keys: Ints) -> Floats:
        """How far ahead the next use of each key is thought to be; a key is layer * n_experts + expert."""


class AgedFrequency:
    """Expected distance from how often an expert was chosen, older tokens counting less, and from where its layer is.

    Two rates are kept of each expert, both the share of tokens that chose it, aged exponentially, one slowly and one
    fast; how much the fast one counts is learnt by least squares from what was chosen next, since models and texts
    differ in how often consecutive tokens share an expert. A pass of T tokens uses an expert of rate r with
    p = 1 - (1 - r)^T, so its next use is expected L (1/p - 1) applied layers after its layer's next turn. LFRU's
    f / (age + 1) has the same two ingredients; for large passes, which use nearly every expert in a cycle, the layer
    just applied goes first, which is Belady's choice for a cycle and where LRU would miss every time.
    """

    def __init__(self, n_layers: int, n_experts: int, rates: Floats | None = None) -> None:
        """rates: float64 [n_layers, n_experts], what is known beforehand; else all alike."""
        self._n_layers, self._n_experts = n_layers, n_experts
        self._slow = np.full((n_layers, n_experts), 1 / n_experts) if rates is None else rates.copy()
        self._fast = self._slow.copy()
        self._covered, self._spread = 0.1, 1.0  # sums of the regression; their quotient is the fast rate's weight
        self._layer = n_layers - 1
        self._waiting: list[tuple[int, list[int]]] = []
        self._extra = self._extra_distance(self._slow, 1).reshape(-1)
        layers = np.arange(n_layers * n_experts) // n_experts
        self._turn = [((layers - now - 1) % n_layers + 1).astype(float) for now in range(n_layers)]  # of each key

    def use(self, layer: int, counts: Ints, tokens: int) -> None:
        """See `Policy.use`."""
        self._learn_waiting()
        self._layer = layer
        self._learn([layer], counts[None], tokens)

    def use_once(self, layer: int, chosen: list[int]) -> None:
        """As `use`, of one token that chose these experts. What it teaches is taken in a few layers at a time."""
        if len(self._waiting) >= TOGETHER or (self._waiting and layer <= self._layer):
            self._learn_waiting()
        self._layer = layer
        self._waiting.append((layer, chosen))

    def distance(self, keys: Ints) -> Floats:
        """See `Policy.distance`."""
        distance: Floats = (self._turn[self._layer] + self._extra)[keys]
        return distance

    def _learn_waiting(self) -> None:
        if self._waiting:
            layers = [layer for layer, _ in self._waiting]
            counts = np.zeros((len(layers), self._n_experts), dtype=np.int64)
            for row, (_, chosen) in enumerate(self._waiting):
                counts[row, chosen] = 1
            self._waiting.clear()
            self._learn(layers, counts, 1)

    def _learn(self, layers: list[int], counts: Ints, tokens: int) -> None:
        """counts: [layers, n_experts] of distinct layers."""
        slow, fast = self._slow[layers], self._fast[layers]
        if tokens == 1:
            ahead, kept = fast - slow, FORGET ** len(layers)
            self._covered = kept * self._covered + float(np.vdot(ahead, counts - slow))
            self._spread = kept * self._spread + float(np.vdot(ahead, ahead))
        share = counts / tokens
        slow += (share - slow) * (1 - (1 - SLOW) ** tokens)
        fast += (share - fast) * (1 - (1 - FAST) ** tokens)
        self._slow[layers], self._fast[layers] = slow, fast
        weight = min(1.0, max(0.0, self._covered / self._spread))
        extra = self._extra_distance(slow + weight * (fast - slow), tokens)
        self._extra.reshape(self._n_layers, -1)[layers] = extra

    def _extra_distance(self, rates: Floats, tokens: int) -> Floats:
        """Applied layers beyond a layer's next turn until an expert of it is used."""
        rates = np.maximum(rates, LEAST_RATE)
        used = rates if tokens == 1 else 1 - (1 - rates) ** tokens
        extra: Floats = self._n_layers / used - self._n_layers
        return extra


class LeastRecentlyUsed:
    """The longer ago its last use, the farther its next: for comparison."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._n_experts = n_experts
        self._last = np.zeros(n_layers * n_experts)
        self._clock = 0

    def use(self, layer: int, counts: Ints, tokens: int) -> None:
        self._clock += 1
        self._last[layer * self._n_experts + counts.nonzero()[0]] = self._clock

    def distance(self, keys: Ints) -> Floats:
        return self._clock - self._last[keys]


class Belady:
    """Knows the future: the optimum that no policy can beat (Belady 1966), from a recorded trace. For comparison."""

    def __init__(self, n_layers: int, n_experts: int, trace: Sequence[tuple[int, Ints]]) -> None:
        """trace: (layer, the chosen experts) of every applied layer, in order."""
        self._n_experts, self._step = n_experts, 0
        self._next = np.full(n_layers * n_experts, NEVER)
        self._after: list[tuple[Ints, Floats]] = []  # of each step: its keys, and the steps of their next uses
        upcoming = np.full(n_layers * n_experts, NEVER)
        for step in range(len(trace) - 1, -1, -1):
            layer, experts = trace[step]
            keys = layer * n_experts + experts
            self._after.append((keys, upcoming[keys]))
            upcoming[keys] = step
        self._after.reverse()

    def use(self, layer: int, counts: Ints, tokens: int) -> None:
        keys, after = self._after[self._step]
        assert np.array_equal(np.sort(keys), layer * self._n_experts + counts.nonzero()[0]), "not the recorded trace"
        self._next[keys] = after
        self._step += 1

    def distance(self, keys: Ints) -> Floats:
        return self._next[keys] - self._step
