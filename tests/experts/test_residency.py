"""Which expert goes when another must come."""

from __future__ import annotations

import random

import pytest

from mixlocal.experts.residency import NOWHERE, Residency


def place(residency: Residency, *keys: int) -> None:
    """Use `keys` at once, as one layer does."""
    residency.use(keys)
    for key in keys:
        if residency.slot(key) == NOWHERE:
            residency.assign(key, keys)


def test_free_slots_are_filled_before_anything_goes() -> None:
    residency = Residency(n_layers=2, n_experts=4, n_slots=5)
    place(residency, 0, 1)
    place(residency, 4, 5)
    place(residency, 2)
    assert len({residency.slot(key) for key in (0, 1, 2, 4, 5)}) == 5
    assert residency.slot(3) == NOWHERE


def test_what_is_used_often_stays_although_it_was_not_used_last() -> None:
    residency = Residency(n_layers=1, n_experts=6, n_slots=2)
    for _ in range(10):
        place(residency, 0)
    place(residency, 1)
    place(residency, 2)
    assert residency.slot(0) != NOWHERE
    assert residency.slot(1) == NOWHERE


def test_what_was_used_often_long_ago_goes() -> None:
    residency = Residency(n_layers=1, n_experts=6, n_slots=2)
    for _ in range(3):
        place(residency, 0)
    for _ in range(40):
        place(residency, 1)
    place(residency, 2)
    assert residency.slot(0) == NOWHERE


def test_a_layers_last_slot_goes_last() -> None:
    residency = Residency(n_layers=2, n_experts=4, n_slots=3)
    place(residency, 4)  # layer 1's only one, and the oldest
    for _ in range(5):
        place(residency, 0, 1)
    place(residency, 2)
    assert residency.slot(4) != NOWHERE


def test_what_is_needed_now_does_not_go() -> None:
    residency = Residency(n_layers=1, n_experts=8, n_slots=3)
    place(residency, 0, 1, 2)
    for _ in range(9):
        place(residency, 1)
    place(residency, 0, 5, 6)
    assert all(residency.slot(key) != NOWHERE for key in (0, 5, 6))
    with pytest.raises(AssertionError, match="fewer slots"):
        place(residency, 0, 1, 2, 3)


def test_a_released_slot_is_free_again() -> None:
    residency = Residency(n_layers=1, n_experts=4, n_slots=2)
    place(residency, 0, 1)
    slot = residency.slot(1)
    residency.release(1)
    assert residency.slot(1) == NOWHERE
    place(residency, 2)
    assert residency.slot(2) == slot
    assert residency.slot(0) != NOWHERE


def test_slots_and_keys_stay_one_to_one() -> None:
    draw = random.Random(4)
    residency = Residency(n_layers=5, n_experts=8, n_slots=11)
    for step in range(2000):
        layer = step % 5
        place(residency, *(8 * layer + expert for expert in draw.sample(range(8), draw.randint(1, 4))))
        here = [residency.slot(key) for key in range(40) if residency.slot(key) != NOWHERE]
        assert len(here) == len(set(here)) <= 11
        assert set(here) <= set(range(11))
