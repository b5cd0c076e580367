"""Which expert goes when another must come."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mixlocal.experts.policies import AgedFrequency, Belady, LeastRecentlyUsed, Policy
from mixlocal.experts.residency import NOWHERE, Residency
from mixlocal.experts.trace import RoutedStep, hit_rate


class Cache:
    """One token after another through layers of experts."""

    def __init__(self, n_layers: int, n_experts: int, n_slots: int, policy: Policy | None = None) -> None:
        self.policy = policy or AgedFrequency(n_layers, n_experts)
        self.residency = Residency(n_layers, n_experts, n_slots, self.policy)
        self.n_experts = n_experts

    def use(self, *keys: int) -> None:
        """Experts of one layer, at once."""
        layer = keys[0] // self.n_experts
        self.policy.use(layer, np.bincount([k % self.n_experts for k in keys], minlength=self.n_experts), 1)
        for key in keys:
            if self.residency.find(key) == NOWHERE:
                assert self.residency.place(key, keys) != NOWHERE
                self.residency.fill(key)

    def holds(self, key: int) -> bool:
        return self.residency.find(key) != NOWHERE


def test_free_slots_are_filled_before_anything_goes() -> None:
    cache = Cache(n_layers=2, n_experts=4, n_slots=5)
    for keys in ((0, 1), (4, 5), (2,)):
        cache.use(*keys)
    assert len({cache.residency.find(key) for key in (0, 1, 2, 4, 5)}) == 5
    assert not cache.holds(3)


def test_what_is_used_often_stays_although_it_was_not_used_last() -> None:
    cache = Cache(n_layers=1, n_experts=6, n_slots=2)
    for other in (1, 2, 3, 4, 5) * 4:
        cache.use(0)
        cache.use(other)
    cache.use(1)
    assert cache.holds(0)
    assert not cache.holds(5)


def test_what_was_used_often_long_ago_goes() -> None:
    cache = Cache(n_layers=1, n_experts=6, n_slots=2)
    for _ in range(3):
        cache.use(0)
    for _ in range(40):
        cache.use(1)
    cache.use(2)
    assert not cache.holds(0)


def test_a_layers_last_slot_goes_last() -> None:
    cache = Cache(n_layers=2, n_experts=4, n_slots=3)
    cache.use(4)  # layer 1's only one, and never used again
    for _ in range(50):
        cache.use(0, 1)
    cache.use(2)
    assert cache.holds(4)


def test_what_is_needed_now_does_not_go() -> None:
    cache = Cache(n_layers=1, n_experts=8, n_slots=3)
    cache.use(0, 1, 2)
    for _ in range(9):
        cache.use(1)
    cache.use(0, 5, 6)
    assert all(cache.holds(key) for key in (0, 5, 6))
    assert cache.residency.place(7, (0, 5, 6)) == NOWHERE


def test_a_slot_that_is_being_written_is_neither_found_nor_taken() -> None:
    cache = Cache(n_layers=1, n_experts=8, n_slots=2)
    cache.use(0)
    slot = cache.residency.place(1, ())
    assert cache.residency.find(1) == NOWHERE
    assert cache.residency.slot(1) == slot
    cache.use(2)  # takes expert 0's slot, although 1 was never used
    assert not cache.holds(0)
    assert cache.residency.slot(1) == slot
    assert cache.residency.place(3, (2,)) == NOWHERE
    cache.residency.release(1)
    assert cache.residency.place(3, (2,)) == slot


def test_repair_keeps_what_was_filled_and_frees_the_rest() -> None:
    cache = Cache(n_layers=2, n_experts=4, n_slots=4)
    cache.use(0, 1)
    cache.use(6)
    cache.residency.place(2, ())
    cache.residency._slot_of[0] = NOWHERE  # an interrupt between two steps
    cache.residency.repair()
    assert all(cache.holds(key) for key in (0, 1, 6))
    assert cache.residency.slot(2) == NOWHERE
    assert cache.residency.free == 1


@pytest.mark.parametrize("slots", [4, 11, 39])
def test_slots_and_keys_stay_one_to_one(slots: int) -> None:
    draw = random.Random(slots)
    cache = Cache(n_layers=5, n_experts=8, n_slots=slots)
    for step in range(2000):
        cache.use(*(8 * (step % 5) + expert for expert in draw.sample(range(8), draw.randint(1, 4))))
        here = [cache.residency.find(key) for key in range(40) if cache.holds(key)]
        assert len(here) == len(set(here)) <= slots
        assert set(here) <= set(range(slots))


def steps(n_layers: int, n_experts: int, tokens: int, top_k: int, likeness: float) -> list[RoutedStep]:
    """Some experts are used more than others; likeness: correlation of consecutive tokens."""
    draw = np.random.default_rng(3)
    favour = 0.3 * draw.normal(size=(n_layers, n_experts))
    state, found = draw.normal(size=(n_layers, n_experts)), []
    for _ in range(tokens):
        state = likeness * state + (1 - likeness**2) ** 0.5 * draw.normal(size=state.shape)
        for layer in range(n_layers):
            chosen = np.argsort(-(favour + state)[layer])[:top_k]
            found.append(RoutedStep(layer, np.bincount(chosen, minlength=n_experts), 1))
    return found


def hits(routed: list[RoutedStep], n_slots: int, name: str) -> float:
    """Of a cache for 8 experts a layer; LRU and Belady's optimum know no floor."""
    n_layers = max(step.layer for step in routed) + 1
    policies: dict[str, Policy] = {
        "aged": AgedFrequency(n_layers, 8),
        "lru": LeastRecentlyUsed(n_layers, 8),
        "belady": Belady(n_layers, 8, [(step.layer, step.counts.nonzero()[0]) for step in routed]),
    }
    policy = policies[name]
    return hit_rate(routed, Residency(n_layers, 8, n_slots, policy, floor=name == "aged"), policy)


@pytest.mark.parametrize("slots", [16, 32, 48])
@pytest.mark.parametrize("likeness", [0.3, 0.6, 0.85])
def test_aged_frequency_lies_between_lru_and_the_optimum(slots: int, likeness: float) -> None:
    """Whether consecutive tokens share few experts or most: at worst it is LRU's equal."""
    routed = steps(8, 8, 300, 2, likeness)
    aged = hits(routed, slots, "aged")
    assert hits(routed, slots, "lru") - 0.015 < aged < hits(routed, slots, "belady")


def test_belady_on_a_trace_worked_by_hand() -> None:
    """Experts 0 1 2 0 1 3 0 with two slots: 2 replaces 1, 1 replaces 2, 3 replaces 1; hits are both later zeros."""
    routed = [RoutedStep(0, np.bincount([expert], minlength=8), 1) for expert in (0, 1, 2, 0, 1, 3, 0)]
    assert hits(routed, 2, "belady") == pytest.approx(2 / 7)
    assert hits(routed, 2, "lru") == 0


def test_a_cycle_through_all_experts_does_not_empty_the_cache() -> None:
    """A full batch uses every expert of every layer in turns: LRU misses all, the optimum keeps what has slots."""
    routed = [RoutedStep(layer, np.full(8, 16), 64) for _ in range(40) for layer in range(6)]
    assert hits(routed, 24, "lru") == 0
    assert hits(routed, 24, "aged") > 0.9 * hits(routed, 24, "belady")
