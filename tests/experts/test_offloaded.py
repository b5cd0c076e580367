"""Three tiers: the same tokens wherever experts lie, on a simulated device; and on a GPU where there is one."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from simulated_device import SimulatedDevice
from stores import load_model
from tiered_model import EXPERTS, IDS, LAYERS, PROFILE, logits, make_store

from mixlocal.app.model_run import store_config
from mixlocal.errors import CorruptError, MemoryBudgetError, UsageError
from mixlocal.experts.balance import Costs, measure_costs, worth_moving
from mixlocal.experts.device import CudaDevice
from mixlocal.experts.host_tier import HostTier
from mixlocal.experts.offloaded import OffloadedExperts, TierSlots
from mixlocal.experts.profile import RoutingProfile
from mixlocal.experts.residency import Residency
from mixlocal.kernels import select
from mixlocal.model.kv_cache import own_cache
from mixlocal.model.load import load_trunk
from mixlocal.model.transformer import Transformer
from mixlocal.store.expert_file import ExpertFile
from mixlocal.store.model_store import ModelStore

ALWAYS_MOVE, NEVER_MOVE = Costs(1.0, 1.0, 0.0), Costs(0.0, 0.0, 1.0)
SOMETIMES_MOVE = Costs(1.0, 0.1, 1.5)
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return make_store(tmp_path_factory.mktemp("offloaded"))


def opened(
    store: ModelStore,
    slots: TierSlots,
    costs: Costs | None,
    device: SimulatedDevice | None = None,
    profile: RoutingProfile | None = None,
) -> tuple[Transformer, OffloadedExperts]:
    kernels, config = select("cpu"), store_config(store)
    device = device or SimulatedDevice(PLENTY)
    experts = OffloadedExperts(store.experts(), kernels, device, slots, profile, costs=costs)
    return Transformer(config, load_trunk(store, config), experts, kernels), experts


def poison_what_is_freed(experts: OffloadedExperts, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    forget = Residency._forget

    def forget_and_poison(self: Residency, slot: int) -> None:
        if self is experts._residency:
            device.poison(experts._slots[slot])
        forget(self, slot)

    monkeypatch.setattr(Residency, "_forget", forget_and_poison)


@pytest.mark.parametrize("costs", [ALWAYS_MOVE, NEVER_MOVE, SOMETIMES_MOVE], ids=["move", "stay", "either"])
@pytest.mark.parametrize(
    "slots",
    [TierSlots(0, 1, EXPERTS), TierSlots(5, 2, EXPERTS), TierSlots(12, 3, 14), TierSlots(24, 2, EXPERTS)],
    ids=lambda slots: f"{slots.staying}+{slots.passing}+{slots.host}",
)
@pytest.mark.parametrize("profile", [None, PROFILE], ids=["cold", "profile"])
def test_the_tiers_do_not_change_a_bit(
    store: ModelStore,
    slots: TierSlots,
    costs: Costs,
    profile: RoutingProfile | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = logits(load_model(store, store_config(store)))
    device = SimulatedDevice(PLENTY)
    model, experts = opened(store, slots, costs, device, profile)
    poison_what_is_freed(experts, device, monkeypatch)
    for _ in range(3):
        assert torch.equal(logits(model), expected)
        on_device, on_host = set(experts._residency.held()), set(experts._host.residency.held())
        assert len(on_device) <= slots.staying
        assert not on_device & on_host  # one place each
    counts = experts.counts
    assert (counts.gpu_hits > 0) == (slots.staying > 0)
    assert (counts.copies > 0) == (costs is not NEVER_MOVE)
    assert counts.looked_up == counts.gpu_hits + counts.ram_hits + counts.disk_hits
    experts.close()


@pytest.mark.parametrize(
    "slots",
    [TierSlots(0, 1, EXPERTS), TierSlots(5, 2, EXPERTS), TierSlots(12, 3, 14), TierSlots(24, 2, EXPERTS)],
    ids=lambda slots: f"{slots.staying}+{slots.passing}+{slots.host}",
)
def test_a_host_that_computes_otherwise_computes_nothing(
    store: ModelStore, slots: TierSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All a layer's experts pass through however few slots, or a token would depend on where its experts lay."""
    expected = logits(load_model(store, store_config(store)))
    device = SimulatedDevice(PLENTY, as_host=False)
    model, experts = opened(store, slots, NEVER_MOVE, device)
    poison_what_is_freed(experts, device, monkeypatch)
    monkeypatch.delattr(HostTier, "part")
    for _ in range(3):
        assert torch.equal(logits(model), expected)
        assert len(experts._residency.held()) <= slots.staying
    counts = experts.counts
    assert counts.copies == counts.ram_hits + counts.disk_hits
    experts.close()


def test_no_slot_is_read_into_while_it_is_being_checked(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is filled through a layer's worth of host slots; checks that lag behind see what they should."""
    expected, check = logits(load_model(store, store_config(store))), ExpertFile.check

    def late(self: ExpertFile, layer: int, expert: int, slot: torch.Tensor) -> None:
        time.sleep(0.02)
        check(self, layer, expert, slot)

    monkeypatch.setattr(ExpertFile, "check", late)
    for costs in (NEVER_MOVE, None):
        model, experts = opened(store, TierSlots(24, 2, EXPERTS), costs)
        assert torch.equal(logits(model), expected)
        experts.close()


def test_the_device_s_budget_is_kept(store: ModelStore) -> None:
    stride = store.manifest.stride
    _, experts = opened(store, TierSlots(3, 1, EXPERTS), NEVER_MOVE, SimulatedDevice(4 * stride))
    experts.close()
    with pytest.raises(MemoryBudgetError):
        opened(store, TierSlots(4, 1, EXPERTS), NEVER_MOVE, SimulatedDevice(4 * stride))


def test_the_hottest_experts_are_on_the_device_from_the_start(store: ModelStore) -> None:
    _, experts = opened(store, TierSlots(4, 1, EXPERTS), NEVER_MOVE, profile=PROFILE)
    assert sorted(experts._residency.held()) == [2, 10, 18, 26]
    experts.close()


def test_what_is_chosen_often_moves_in_and_the_coldest_moves_out(store: ModelStore) -> None:
    lying = RoutingProfile(PROFILE.format, 100, tuple((0.9, 0.8, *([0.01] * 6)) for _ in range(LAYERS)))
    model, experts = opened(store, TierSlots(8, 2, EXPERTS), ALWAYS_MOVE, profile=lying)
    before = set(experts._residency.held())
    for _ in range(3):
        logits(model)
    assert set(experts._residency.held()) != before
    experts.close()


def test_interrupts_at_any_copy_leave_nothing_wrong(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(load_model(store, store_config(store)))
    device = SimulatedDevice(PLENTY)
    model, experts = opened(store, TierSlots(6, 2, EXPERTS + 2), SOMETIMES_MOVE, device)
    poison_what_is_freed(experts, device, monkeypatch)
    draw, copy, upload = random.Random(2), SimulatedDevice.copy, SimulatedDevice.upload
    countdown = 0

    def interrupt() -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(SimulatedDevice, "copy", lambda self, s, t: (interrupt(), copy(self, s, t), interrupt())[1])
    monkeypatch.setattr(SimulatedDevice, "upload", lambda self, x: (interrupt(), upload(self, x))[1])
    for _ in range(40):
        countdown = draw.randint(1, 150)
        with pytest.raises(KeyboardInterrupt):
            torch.stack([logits(model) for _ in range(5)])
        assert torch.equal(logits(model), expected)
    experts.close()


def test_a_failed_read_leaves_nothing_wrong(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits(load_model(store, store_config(store)))
    model, experts = opened(store, TierSlots(4, 2, EXPERTS), SOMETIMES_MOVE)
    fill, calls = ExpertFile.fill, iter(range(10**6))

    def failing(self: ExpertFile, layer: int, expert: int, slot: torch.Tensor) -> None:
        if next(calls) % 7 == 3:
            slot.fill_(77)
            raise CorruptError("the disk failed")
        fill(self, layer, expert, slot)

    with monkeypatch.context() as patched:
        patched.setattr(ExpertFile, "fill", failing)
        for _ in range(4):
            with pytest.raises(CorruptError):
                logits(model)
    assert torch.equal(logits(model), expected)
    experts.close()


def test_move_or_compute_by_hand() -> None:
    """Two ways at once: four experts of 1 s here or 0.4 s there end after 1.2 s if three move."""
    assert len(worth_moving(Costs(1.0, 0.0, 0.4), {1: 1, 2: 1, 3: 1, 4: 1})) == 3
    assert worth_moving(Costs(0.1, 0.0, 0.4), {1: 1, 2: 1}) == []
    assert worth_moving(Costs(0.1, 0.1, 0.4), {1: 1, 2: 30}) == [2]  # many tokens: the copy pays


def test_a_slow_link_keeps_experts_on_the_host(store: ModelStore) -> None:
    """Costs as measured: a copy of half a second is never worth it for one token."""
    model, experts = opened(store, TierSlots(2, 2, EXPERTS), None, SimulatedDevice(PLENTY, seconds_per_copy=0.05))
    assert experts._costs.move >= 0.05 > experts._costs.host(1) > 0
    before = experts.counts.copies
    logits(model)
    assert experts.counts.copies == before
    experts.close()


def test_costs_are_measured() -> None:
    calls: list[int] = []
    costs = measure_costs(calls.append, lambda: None, many=9)
    assert set(calls) == {1, 9}
    assert costs.host(5) >= costs.host(1) >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("costs", [ALWAYS_MOVE, NEVER_MOVE, SOMETIMES_MOVE], ids=["move", "stay", "either"])
@pytest.mark.parametrize("variant", ["q4", "q8", "bf16"])
def test_on_a_gpu_the_tiers_do_not_change_a_bit(variant: str, costs: Costs, tmp_path: Path) -> None:
    store = make_store(tmp_path, variant)
    config, seen = store_config(store), []
    trunk = load_trunk(store, config, "cuda")
    for slots in (TierSlots(32, 2, EXPERTS), TierSlots(0, 1, EXPERTS), TierSlots(5, 2, EXPERTS), TierSlots(12, 3, 14)):
        experts = OffloadedExperts(store.experts(), select("cpu"), CudaDevice("cuda"), slots, None, costs=costs)
        model = Transformer(config, trunk, experts, select("cuda"))
        for _ in range(3):
            cache = own_cache(config, len(IDS), device="cuda")
            passes = [model.forward(part, cache, all_logits=True) for part in (IDS[:40], *IDS[40:].split(1))]
            seen.append(torch.cat(passes))
        experts.close()
    assert all(torch.equal(logits, seen[0]) for logits in seen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match="finds no GPU"):
        CudaDevice("cuda")
