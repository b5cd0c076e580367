"""Experts in a bounded part of memory; the others are read from disk when they are chosen, or a little before."""

from __future__ import annotations

import torch

from mixlocal.experts.host_tier import HostTier, add_up
from mixlocal.experts.passes import Passes
from mixlocal.experts.profile import RoutingProfile
from mixlocal.experts.runtime import ExpertCounts, Guess, Routing
from mixlocal.kernels import Kernels
from mixlocal.store.expert_file import ExpertFile
from mixlocal.store.memory import page_memory


class TieredExperts:
    """`n_slots` records in memory, allocated once. Reads of all that is missing start as soon as the router has chosen;
    what is here is computed meanwhile, then what arrives. Each distinct expert is read at most once per pass.
    """

    def __init__(
        self,
        file: ExpertFile,
        kernels: Kernels,
        n_slots: int,
        profile: RoutingProfile | None = None,
        *,
        lookahead: bool = True,
    ) -> None:
        """profile: what to begin with; its hottest experts are read while there is nothing else to read.

        Raises `MemoryBudgetError` if the memory cannot be had.
        """
        manifest = file.manifest
        assert manifest.n_experts <= n_slots
        self.counts = ExpertCounts()
        self._passes = Passes(manifest.n_layers, manifest.n_experts, self.counts, profile, lookahead=lookahead)
        self.trace = self._passes.trace
        memory = page_memory(n_slots * manifest.stride)
        self.host = HostTier(file, kernels, memory, self._passes.policy, self.counts)
        self._broken = False  # a layer was left half done
        self.host.preload(profile.hottest() if profile else ())

    def apply(self, layer: int, x: torch.Tensor, routing: Routing, guess: Guess | None = None) -> torch.Tensor:
        """See `ExpertRuntime.apply`."""
        if self._broken:
            self.host.recover()
        self._broken = True  # until the end is reached: an interrupt may come between any two steps
        keys = self._passes.begin_layer(layer, routing)
        reads = self.host.demand(keys)
        if self.host.most_prefetches and guess is not None and self._passes.looks_ahead:
            self.host.look_ahead(self._passes.guess_next(layer + 1, guess), keys)
        if reads:
            late = {read.key for read in reads}
            parts = {key: self.host.part(key, x, routing) for key in keys if key not in late}
            parts |= {key: self.host.part(key, x, routing) for key in self.host.arrivals(reads)}
            out = add_up(x, parts)
        else:
            out = self.host.layer(x, routing, keys)
        if layer == self._passes.last_layer:
            self.host.confirm()
        self._passes.end_layer(layer)
        self._broken = False
        return out

    def close(self) -> None:
        """See `ExpertRuntime.close`."""
        self.host.close()
