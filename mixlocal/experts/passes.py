"""What every runtime with tiers learns from the passes through a model."""

from __future__ import annotations

import time

import numpy as np

from mixlocal.experts.policies import AgedFrequency
from mixlocal.experts.prefetch import Lookahead
from mixlocal.experts.profile import RoutingProfile
from mixlocal.experts.runtime import ExpertCounts, Guess, Routing
from mixlocal.experts.trace import RoutingTrace


class Passes:
    """Feeds policy, trace and lookahead, layer by layer."""

    def __init__(
        self, n_layers: int, n_experts: int, counts: ExpertCounts, profile: RoutingProfile | None, *, lookahead: bool
    ) -> None:
        self.policy = AgedFrequency(n_layers, n_experts, profile.array() if profile else None)
        self.trace = RoutingTrace(n_layers, n_experts)
        self._n_layers, self._n_experts, self._counts = n_layers, n_experts, counts
        self._lookahead = Lookahead(lookahead)
        self._guessed: set[int] = set()  # of the layer that comes next
        self._began = 0.0

    @property
    def last_layer(self) -> int:
        return self._n_layers - 1

    @property
    def looks_ahead(self) -> bool:
        return self._lookahead.on

    def begin_layer(self, layer: int, routing: Routing) -> list[int]:
        """The distinct keys that were chosen, ascending."""
        tokens = routing.experts.shape[0]
        if layer == 0:
            self._lookahead.begin(tokens)
            self._began = time.perf_counter()
        chosen = routing.experts.flatten().tolist()
        if tokens == 1:
            self.policy.use_once(layer, chosen)
        else:
            self.policy.use(layer, np.bincount(chosen, minlength=self._n_experts), tokens)
        self.trace.add(layer, chosen, tokens)
        keys = sorted({layer * self._n_experts + expert for expert in chosen})
        if self._guessed and layer > 0:  # a pass that was interrupted leaves a guess behind
            self._counts.chosen += len(keys)
            self._counts.guessed += len(self._guessed.intersection(keys))
        self._guessed = set()
        return keys

    def guess_next(self, layer: int, guess: Guess) -> list[int]:
        """The keys that `layer`, the next one, is thought to choose: those that most tokens choose first."""
        wanted, counts = np.unique(guess().cpu().numpy(), return_counts=True)
        order = np.argsort(-counts, kind="stable")
        keys: list[int] = (layer * self._n_experts + wanted[order]).tolist()
        self._guessed = set(keys)
        return keys

    def end_layer(self, layer: int) -> None:
        if layer == self.last_layer:
            self._lookahead.end(time.perf_counter() - self._began)
