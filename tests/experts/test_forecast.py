"""Tokens per second by hand, from what was measured."""

from __future__ import annotations

import pytest

from mixlocal.experts.forecast import Look, Speeds, forecast, look_up
from mixlocal.experts.plan import BASE_BYTES, Budgets, MemoryPlan, ModelBytes, plan_memory

MODEL = ModelBytes("m", trunk=0, kv_token=1, max_context=1, n_layers=4, n_experts=8, record=1000, scratch=0)


def plan(slots: int, sequences: int = 1) -> MemoryPlan:
    """`slots` of 32 experts stay in memory."""
    budgets = Budgets(BASE_BYTES + sequences + slots * 1000, 1 << 40, context=1, sequences=sequences)
    return plan_memory(MODEL, budgets)


@pytest.mark.parametrize(("sequences", "distinct"), [(1, 2.0), (2, 3.5), (3, 8 * (1 - 0.75**3)), (64, 8.0)])
def test_sequences_share_the_experts_of_a_layer(sequences: int, distinct: float) -> None:
    """Two of eight at random: one that B sequences leave out has been left out B times, with 3/4 each."""
    look = look_up(plan(16, sequences), n_layers=4, top_k=2, hits=None)
    assert look.experts == pytest.approx(4 * distinct, abs=1e-5)
    assert (look.n_layers, look.found, look.learnt) == (4, 0.5, False)


def test_what_was_learnt_counts_for_one_sequence() -> None:
    assert look_up(plan(16), 4, 2, hits=0.7) == Look(4, 8.0, 0.7, learnt=True)
    assert look_up(plan(16), 4, 2, hits=0.0).found == 0.0
    assert look_up(plan(16), 4, 2, hits=None) == Look(4, 8.0, 0.5, learnt=False)
    many = look_up(plan(24, sequences=2), 4, 2, hits=0.7)
    assert (many.found, many.learnt) == (0.75, False)


def test_arithmetic_and_reads_add_up() -> None:
    found = forecast(Look(4, 8.0, 0.75, learnt=True), Speeds(1, layer=0.010, rest=0.020, record=0.030))
    assert found is not None
    assert (found.compute_s, found.disk_s) == pytest.approx((0.060, 0.060))  # 8 experts, a quarter of them from disk
    assert found.tokens_per_s == pytest.approx(1 / 0.120)


def test_a_step_gives_every_sequence_a_token() -> None:
    found = forecast(Look(4, 14.0, 0.5, learnt=False), Speeds(2, layer=0.010, rest=0.020, record=0.020))
    assert found is not None
    assert found.tokens_per_s == pytest.approx(2 / (0.060 + 7 * 0.020))


def test_a_disk_of_unknown_speed_is_not_guessed() -> None:
    unknown = Speeds(1, layer=0.010, rest=0.020, record=None)
    assert forecast(Look(4, 8.0, 0.99, learnt=False), unknown) is None
    found = forecast(Look(4, 8.0, 1.0, learnt=False), unknown)  # nothing is read
    assert found is not None
    assert (found.disk_s, found.tokens_per_s) == (0.0, pytest.approx(1 / 0.060))
