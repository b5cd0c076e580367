"""Will it fit, and what lies where: sums that are worked out by hand, and what holds for every budget."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlocal.errors import MemoryBudgetError
from mixlocal.experts.plan import BASE_BYTES, CUDA_BYTES, FEWEST_TOKENS, Budgets, MemoryPlan, ModelBytes, plan_memory

MB, GB = 10**6, 10**9
TOY = ModelBytes(
    "toy:q4", trunk=1000 * MB, kv_token=100_000, max_context=32768, n_layers=4, n_experts=8, record=50 * MB,
    scratch=90 * MB,
)  # fmt: skip
HOST = BASE_BYTES + 1000 * MB + 100 * MB + 90 * MB  # with 1000 tokens of context
ON_GPU = 1000 * MB + 100 * MB + 90 * MB
GPU_HOST = BASE_BYTES + CUDA_BYTES


def plan(ram: int, *, free: int = 100 * GB, **budgets: int | None) -> MemoryPlan:
    return plan_memory(TOY, Budgets(ram, free, **{"context": 1000} | budgets))


def test_all_experts_stay_where_there_is_room() -> None:
    whole = HOST + 32 * 50 * MB
    for ram in (whole, 100 * GB):
        found = plan(ram)
        assert (found.ram_slots, found.disk_records, found.share, found.ram_bytes) == (32, 0, 1.0, whole)
        assert (found.all_in_ram, found.on_gpu, found.vram_bytes) == (True, False, 0)
    assert plan(whole - 1).ram_slots == 31
    assert not plan(whole - 1).all_in_ram


def test_half_of_them() -> None:
    found = plan(HOST + 16 * 50 * MB + 49 * MB)
    assert (found.ram_slots, found.disk_records, found.share) == (16, 16, 0.5)
    assert found.ram_bytes == HOST + 16 * 50 * MB


def test_the_smallest_budget_is_named_and_works_and_one_byte_less_does_not() -> None:
    smallest = HOST + 8 * 50 * MB  # the experts of one layer
    assert plan(smallest).ram_slots == 8
    with pytest.raises(MemoryBudgetError) as refused:
        plan(smallest - 1)
    assert f"toy:q4 needs at least --ram {smallest // MB}M with a context of 1000" in refused.value.message
    assert f"may use {smallest // MB - 1}M" in refused.value.message


def test_the_context_is_a_part_of_the_budget_unless_it_is_asked_for() -> None:
    assert plan(16 * GB, context=None).context == 10_000  # 1 GB of 100 kB each
    assert plan(100 * GB, context=None).context == 32768  # the model's own
    assert plan(3 * GB, context=None).context == FEWEST_TOKENS
    assert plan(3 * GB, context=7).context == 7


def test_a_context_nobody_asked_for_leaves_room_for_what_must_be_there() -> None:
    """Cheap tokens beside a large trunk: a sixteenth of the budget would be too much."""
    cheap = replace(TOY, trunk=19 * GB, kv_token=1000, max_context=1 << 20)
    others = BASE_BYTES + 19 * GB + 90 * MB + 8 * 50 * MB
    assert plan_memory(cheap, Budgets(others + 500 * MB, 100 * GB)).context == 500_000
    smallest = others + FEWEST_TOKENS * 1000
    assert plan_memory(cheap, Budgets(smallest, 100 * GB)).context == FEWEST_TOKENS
    with pytest.raises(MemoryBudgetError, match="with a context of 4096"):
        plan_memory(cheap, Budgets(smallest - 1, 100 * GB))


def test_sequences_share_a_part_of_the_budget() -> None:
    """Each has its whole context as long as that is no more than a sixteenth; one always has it."""
    one, three, four = plan(5 * GB), plan(5 * GB, sequences=3), plan(5 * GB, sequences=4)
    assert (one.kv_bytes, three.kv_bytes) == (100 * MB, 300 * MB)
    assert (four.context, four.kv_tokens, four.kv_bytes) == (1000, 3125, 3125 * 100_000)
    assert four.scratch_bytes == one.scratch_bytes
    assert plan_memory(replace(TOY, logits=MB), Budgets(5 * GB, 100 * GB, context=1000, sequences=4)).scratch_bytes == (
        one.scratch_bytes + 3 * MB
    )
    small = plan(HOST + 16 * 50 * MB, sequences=4)
    assert small.kv_tokens == max(1000, small.budget // 16 // 100_000)
    unasked = plan(32 * GB, context=None, sequences=4)
    assert (unasked.context, unasked.kv_tokens) == (plan(32 * GB, context=None).context, 20_000)


@pytest.mark.parametrize(("ram", "used", "cached"), [(5 * GB, 3070 * MB, 1600 * MB), (2500 * MB, 2470 * MB, 600 * MB)])
def test_reads_pass_by_a_page_cache_that_has_no_room(ram: int, used: int, cached: int) -> None:
    """Of all experts where all are read once, else of those that are read again and again."""
    assert plan(ram).ram_bytes == used
    assert not plan(ram, free=used + cached).direct_io
    assert plan(ram, free=used + cached - 1).direct_io


def test_a_gpu_holds_what_is_outside_the_experts_and_some_of_those() -> None:
    found = plan(20 * GB, vram=2010 * MB)
    assert (found.gpu_slots, found.staging_slots, found.ram_slots, found.disk_records) == (14, 2, 18, 0)
    assert found.vram_bytes == ON_GPU + 16 * 50 * MB
    assert found.ram_bytes == GPU_HOST + 18 * 50 * MB
    assert (found.on_gpu, found.all_in_ram) == (True, False)


def test_gpu_and_memory_hold_different_experts() -> None:
    found = plan(GPU_HOST + 10 * 50 * MB, vram=2010 * MB)
    assert (found.gpu_slots, found.ram_slots, found.disk_records, found.share) == (14, 10, 8, 0.75)


def test_memory_keeps_a_layer_s_slots_although_the_gpu_holds_all() -> None:
    found = plan(20 * GB, vram=80 * GB)
    assert (found.gpu_slots, found.ram_slots, found.disk_records, found.share) == (32, 8, 0, 1.0)
    assert found.vram_bytes == ON_GPU + 34 * 50 * MB


@pytest.mark.parametrize(
    ("option", "smallest", "other"),
    [("--vram", ON_GPU + 2 * 50 * MB, 20 * GB), ("--ram", GPU_HOST + 8 * 50 * MB, 2 * GB)],
)
def test_with_a_gpu_the_budget_that_is_too_small_is_named(option: str, smallest: int, other: int) -> None:
    def given(nbytes: int) -> MemoryPlan:
        return plan(other, vram=nbytes) if option == "--vram" else plan(nbytes, vram=other)

    assert given(smallest).ram_slots >= 8
    with pytest.raises(MemoryBudgetError, match=f"at least {option} {smallest // MB}M ") as refused:
        given(smallest - 1)
    assert option in refused.value.hint


models = st.builds(
    ModelBytes,
    name=st.just("any"),
    trunk=st.integers(1, 200 * GB),
    kv_token=st.integers(1, 4 * MB),
    max_context=st.integers(1, 1 << 20),
    n_layers=st.integers(1, 100),
    n_experts=st.integers(1, 256),
    record=st.integers(1, 50_000).map(lambda pages: 4096 * pages),
    scratch=st.integers(0, GB),
)
whole_budgets = st.builds(
    Budgets,
    ram=st.integers(0, 400 * GB),
    free=st.integers(0, 400 * GB),
    vram=st.none() | st.integers(0, 200 * GB),
    context=st.none() | st.integers(1, 1 << 18),
    sequences=st.integers(1, 64),
)


def enough(model: ModelBytes, budgets: Budgets) -> Budgets:
    """`budgets`, or what the refusals say is needed: taken at their word, at most once each."""
    for _ in range(3):
        try:
            plan_memory(model, budgets)
        except MemoryBudgetError as error:
            option, megabytes = re.search(r"at least --(v?ram) (\d+)M", error.message).groups()
            assert int(megabytes) * MB > getattr(budgets, option)
            budgets = replace(budgets, **{option: int(megabytes) * MB})
        else:
            return budgets
    pytest.fail("a budget was refused although it was said to be enough")


@settings(max_examples=300, deadline=None)
@given(models, whole_budgets)
def test_a_plan_stays_within_its_budgets(model: ModelBytes, budgets: Budgets) -> None:
    budgets = enough(model, budgets)
    found = plan_memory(model, budgets)
    assert found.ram_bytes <= budgets.ram
    assert found.vram_bytes <= (budgets.vram or 0)
    assert model.n_experts <= found.ram_slots <= found.n_records == model.n_records
    assert 0 <= found.gpu_slots <= found.n_records
    assert found.ram_slots == model.n_experts or found.gpu_slots + found.ram_slots <= found.n_records
    assert 0 < found.share <= 1
    assert 1 <= found.context <= max(model.max_context, budgets.context or 0)
    if not found.direct_io:
        assert found.ram_bytes + found.disk_records * found.record_bytes <= budgets.free


@settings(max_examples=200, deadline=None)
@given(models, whole_budgets, st.integers(0, 100 * GB), st.integers(0, 100 * GB))
def test_more_memory_never_holds_fewer_experts(model: ModelBytes, budgets: Budgets, ram: int, vram: int) -> None:
    """Of one sequence: several would take a part of it."""
    budgets = enough(model, replace(budgets, context=budgets.context or 4096, sequences=1))
    larger = replace(budgets, ram=budgets.ram + ram, vram=None if budgets.vram is None else budgets.vram + vram)
    little, much = plan_memory(model, budgets), plan_memory(model, larger)
    assert much.gpu_slots >= little.gpu_slots
    assert much.disk_records <= little.disk_records
    if budgets.vram is None:
        assert much.ram_slots >= little.ram_slots
