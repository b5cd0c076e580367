"""Experts on a GPU, in this computer's memory and on disk: hot, cold, coldest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from mixlocal.experts.balance import MOVE_ALL, Costs, measure_costs, worth_moving
from mixlocal.experts.device import Copy, Device
from mixlocal.experts.host_tier import FIRST, HostTier, Part, add_up
from mixlocal.experts.passes import Passes
from mixlocal.experts.profile import RoutingProfile
from mixlocal.experts.residency import NOWHERE, Residency
from mixlocal.experts.runtime import ExpertCounts, Guess, Routing
from mixlocal.experts.slots import BoundSlots
from mixlocal.kernels import Kernels
from mixlocal.store.expert_file import ExpertFile

KEEN = 2.0  # an expert takes another's place on the device if its next use is so many times nearer


@dataclass(frozen=True, slots=True)
class TierSlots:
    """Experts that stay on the device, that pass through it (1 or more), and on the host (a layer's or more)."""

    staying: int
    passing: int
    host: int


class OffloadedExperts:
    """The hottest experts stay on the device and are computed there. One in host memory is computed by the host, or
    copied and computed on the device, whichever ends sooner beside all else (`balance`); where the two would not give
    the same bits, it is always copied, for where an expert lies must not decide a token. A copy that turns out much
    hotter than a resident takes its place: the host's slot is then free, and the one that goes is dropped.
    """

    def __init__(
        self,
        file: ExpertFile,
        kernels: Kernels,
        device: Device,
        slots: TierSlots,
        profile: RoutingProfile | None = None,
        *,
        lookahead: bool = True,
        costs: Costs | None = None,
    ) -> None:
        """kernels: the host's.  costs: None to measure them.

        Raises `MemoryBudgetError` if the memory cannot be had, and what reading can raise.
        """
        manifest = file.manifest
        assert slots.passing > 0
        self.counts = ExpertCounts()
        self._n_experts, self._n_passing, self._device = manifest.n_experts, slots.passing, device
        self._passes = Passes(manifest.n_layers, manifest.n_experts, self.counts, profile, lookahead=lookahead)
        self.trace = self._passes.trace
        policy, n_slots = self._passes.policy, slots.staying + slots.passing
        self._slots = device.memory(n_slots * manifest.stride).view(n_slots, manifest.stride)
        self._bound = BoundSlots(manifest.layouts, list(self._slots), device.bind)
        self._residency = Residency(manifest.n_layers, manifest.n_experts, n_slots, policy, floor=False)
        self._host = HostTier(file, kernels, device.host_memory(slots.host * manifest.stride), policy, self.counts)
        self._copies: dict[int, Copy] = {}  # of this layer, by key
        self._broken = False
        keys = range(manifest.n_layers * manifest.n_experts)
        hottest = profile.hottest() if profile else sorted(keys, key=lambda key: key % manifest.n_experts)
        specs = {layout.spec_of(part) for layout in manifest.layouts.formats for part in layout.shapes}
        self._host_computes = all(device.computes_as(kernels, spec) for spec in specs)
        self._costs = (costs or self._measure(manifest.dim, hottest[0])) if self._host_computes else MOVE_ALL
        self._fill(hottest[: slots.staying])
        self._host.preload(hottest[slots.staying :])

    def apply(self, layer: int, x: torch.Tensor, routing: Routing, guess: Guess | None = None) -> torch.Tensor:
        """See `ExpertRuntime.apply`; x, routing and the result are on the device."""
        if self._broken:
            self._recover()
        self._broken = True  # until the end is reached: an interrupt may come between any two steps
        chosen = Routing(routing.experts.cpu(), routing.weights.cpu())
        keys = self._passes.begin_layer(layer, chosen)
        resident = [key for key in keys if self._residency.find(key) != NOWHERE]
        others = [key for key in keys if key not in resident]
        self.counts.gpu_hits += len(resident)
        reads = self._host.demand(others)
        late = {read.key for read in reads}
        tokens = {key: int((chosen.experts == key % self._n_experts).sum()) for key in others}
        moved = self._move({key: tokens[key] for key in others if key not in late}, keys)
        parts = {key: self._device_part(key, x, routing, chosen) for key in (*resident, *moved)}
        if guess is not None and self._host.most_prefetches and self._passes.looks_ahead:
            guessed = self._passes.guess_next(layer + 1, guess)
            self._host.look_ahead([key for key in guessed if self._residency.find(key) == NOWHERE], others)
        here = x.cpu() if self._host_computes and len(others) > len(moved) else x
        for key in others:
            if key not in late and key not in moved:
                parts[key] = self._stayed_part(key, here, routing, chosen)
        for key in self._host.arrivals(reads):
            moves = self._move({key: tokens[key]}, keys)
            parts[key] = (
                self._device_part(key, x, routing, chosen) if moves else self._stayed_part(key, here, routing, chosen)
            )
        out = add_up(x, parts)
        self._host.confirm()  # before a copy becomes the only one
        self._settle_copies()
        self._passes.end_layer(layer)
        self._broken = False
        return out

    def close(self) -> None:
        """See `ExpertRuntime.close`."""
        self._device.synchronize()
        self._host.close()

    def _move(self, tokens: dict[int, int], keep: Collection[int]) -> list[int]:
        """Begin to copy those experts of the host that are better computed on the device, as far as slots go."""
        moved = []
        for key in worth_moving(self._costs, tokens)[: self._residency.free]:
            self._copies[key] = self._copy(key, keep)
            self.counts.copies += 1
            moved.append(key)
        return moved

    def _copy(self, key: int, keep: Collection[int]) -> Copy:
        slot = self._residency.place(key, keep)
        assert slot != NOWHERE
        copy = self._device.copy(self._host.slots[self._host.residency.find(key)], self._slots[slot])
        self._residency.fill(key)  # what is computed with it waits for the copy
        return copy

    def _settle_copies(self) -> None:
        """Of all that is on the device, as many go as must pass through. What stays frees its host slot."""
        while self._residency.free < self._n_passing:
            self._residency.release(self._residency.farthest(handicapped=self._copies, handicap=KEEN))
        for key, copy in self._copies.items():
            copy.finish()  # the host may write another expert over its source from now on
            if self._residency.find(key) != NOWHERE:
                self._host.residency.release(key)
        self._copies.clear()

    def _device_part(self, key: int, x: torch.Tensor, routing: Routing, chosen: Routing) -> Part:
        """routing: on the device.  chosen: the same on the host."""
        if key in self._copies:
            self._copies[key].await_on_device()
        bound, expert = self._bound.of(self._residency.find(key), key), key % self._n_experts
        if x.shape[0] == 1:  # decoding: nothing to upload
            rank = chosen.experts[0].tolist().index(expert)
            return FIRST, self._device.expert(x, bound) * routing.weights[:, rank : rank + 1]
        tokens, ranks = (chosen.experts == expert).nonzero(as_tuple=True)
        weights = self._device.upload(chosen.weights[tokens, ranks].unsqueeze(1))
        places = self._device.upload(tokens)
        return places, self._device.expert(x[places], bound) * weights

    def _stayed_part(self, key: int, x: torch.Tensor, routing: Routing, chosen: Routing) -> Part:
        """Of an expert that was not moved: computed by the host; or moved after all, once a slot is free."""
        if self._host_computes:
            tokens, part = self._host.part(key, x, chosen)
            return self._device.upload(tokens), self._device.upload(part)
        if not self._residency.free:
            self._host.confirm()
            self._settle_copies()  # what goes may be in use, but a copy begins behind that
        self._copies[key] = self._copy(key, ())
        self.counts.copies += 1
        return self._device_part(key, x, routing, chosen)

    def _fill(self, hottest: list[int]) -> None:
        """Put the hottest on the device, through as many host slots as a layer has experts."""
        for first in range(0, len(hottest), self._n_experts):
            for key in self._host.fetch(hottest[first : first + self._n_experts]):
                self._copies[key] = self._copy(key, ())
            self._host.confirm()  # before a slot that is still being checked is free for another
            self._settle_copies()

    def _recover(self) -> None:
        self._device.synchronize()
        self._copies.clear()
        self._host.recover()
        self._residency.repair()
        for key in self._residency.held():
            if self._host.residency.find(key) != NOWHERE:  # was it all copied? the host's is certain
                self._residency.release(key)

    def _measure(self, dim: int, key: int) -> Costs:
        """With one expert that is read for this."""
        list(self._host.fetch([key]))
        self._host.confirm()
        x = self._device.upload(torch.randn(1, dim))

        def host(tokens: int) -> None:
            chosen = Routing(torch.full((tokens, 1), key % self._n_experts), torch.ones(tokens, 1))
            self._host.part(key, torch.randn(tokens, dim), chosen)

        def move() -> None:
            copy = self._copy(key, ())
            copy.await_on_device()
            self._device.expert(x, self._bound.of(self._residency.find(key), key))
            self._device.synchronize()
            self._residency.release(key)

        costs = measure_costs(host, move)
        self._host.residency.release(key)
        return costs
