"""Experts of one file in different formats and sizes: the same tokens wherever they lie."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from simulated_device import SimulatedDevice
from stores import load_model
from tiered_model import EXPERTS, LAYERS, PROFILE, logits

from mixlocal.app.model_run import store_config
from mixlocal.app.quantization import StoreJob
from mixlocal.app.quantize import QuantizeJob, quantize_checkpoint
from mixlocal.errors import CorruptError
from mixlocal.experts.balance import Costs
from mixlocal.experts.offloaded import OffloadedExperts, TierSlots
from mixlocal.experts.runtime import ExpertRuntime
from mixlocal.experts.tiered import TieredExperts
from mixlocal.kernels import select
from mixlocal.kernels.isa import native_isas
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.model.load import load_trunk
from mixlocal.model.transformer import Transformer
from mixlocal.quant.format import QuantSpec, QuantTensor
from mixlocal.quant.packing import read_record
from mixlocal.quant.quantize import quantize
from mixlocal.store.expert_file import EXPERTS_FILE, ExpertFile
from mixlocal.store.manifest import Recipe
from mixlocal.store.model_store import ModelStore

NEVER_MOVE = Costs(0.0, 0.0, 1.0)
COSTS = {"move": Costs(1.0, 1.0, 0.0), "stay": NEVER_MOVE, "either": Costs(1.0, 0.1, 1.5), "as measured": None}
N_RECORDS = LAYERS * EXPERTS
SHAPE = {"num_local_experts": EXPERTS, "num_hidden_layers": LAYERS, "num_experts_per_tok": 2, "intermediate_size": 160}
EVERY_MASK = tuple(random.Random(1).sample([*range(8)] * (N_RECORDS // 8), N_RECORDS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("mixed") / "checkpoint", **SHAPE)


def make(checkpoint: Path, out: Path, kind: str, wide: tuple[int, ...]) -> ModelStore:
    recipe = Recipe(kind, 16, "bf16", wide=wide)  # type: ignore[arg-type]
    for _ in quantize_checkpoint(QuantizeJob(checkpoint, StoreJob(out, "tiny", "mix", recipe), "tiny")):
        pass
    return ModelStore.open(out)


@pytest.fixture(scope="module", params=["nf4", "int4-32"])
def store(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return make(checkpoint, tmp_path_factory.mktemp("store") / "mix", request.param, EVERY_MASK)


@pytest.fixture(scope="module")
def expected(store: ModelStore) -> torch.Tensor:
    """With all experts in memory."""
    return logits(load_model(store, store_config(store)))


def model_of(store: ModelStore, experts: ExpertRuntime) -> Transformer:
    config = store_config(store)
    return Transformer(config, load_trunk(store, config), experts, select("cpu"))


def test_every_record_has_its_own_size_and_formats(store: ModelStore) -> None:
    layouts, weights = store.manifest.layouts, tiny.tensors(tiny.CONFIG | SHAPE)
    assert len({layout.stride for layout in layouts.formats}) > 3
    assert layouts.offsets[-1] == (store.folder / EXPERTS_FILE).stat().st_size < N_RECORDS * store.manifest.stride
    file, slot = store.experts(), torch.empty(store.manifest.stride, dtype=torch.uint8)
    for index in range(N_RECORDS):
        layer, expert = divmod(index, EXPERTS)
        file.read(layer, expert, slot)
        found = read_record(layouts[index], slot)
        for bit, part in enumerate(("w1", "w3", "w2")):
            spec = QuantSpec("int8") if EVERY_MASK[index] >> bit & 1 else store.manifest.recipe.expert_spec
            name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
            ours, theirs = getattr(found, part), quantize(name, weights[name], spec)
            assert isinstance(theirs, QuantTensor)
            assert ours.spec == spec
            assert torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.scales, theirs.scales)
    file.close()


@pytest.mark.parametrize("isa", native_isas())
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_every_mixture_is_computed_as_the_reference_does(
    tokens: int, isa: str, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the 8 bits of activations."""
    monkeypatch.setenv("MIXLOCAL_ISA", isa)
    kernels, exact = select("cpu"), ReferenceKernels()
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    ids, shares = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    file = store.experts()
    for index in map(EVERY_MASK.index, range(8)):
        slot = torch.empty(store.manifest.stride, dtype=torch.uint8)
        file.read(*divmod(index, EXPERTS), slot)
        weights = read_record(store.manifest.layouts[index], slot)
        ours, theirs = (k.moe_ffn(x, ids, shares, {0: k.bind_expert(weights)}) for k in (kernels, exact))
        assert (ours - theirs).norm() < 0.03 * theirs.norm()
    file.close()


@pytest.mark.parametrize("slots", [EXPERTS, EXPERTS + 3, 20, N_RECORDS])
@pytest.mark.parametrize("lookahead", [True, False])
def test_the_budget_does_not_change_a_bit(
    slots: int, lookahead: bool, store: ModelStore, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled: list[int] = []
    fill = ExpertFile.fill

    def counted(self: ExpertFile, layer: int, expert: int, slot: torch.Tensor) -> None:
        filled.append(store.manifest.layouts.stride(layer * EXPERTS + expert))
        slot.fill_(0xFF)  # nothing of what lay there before may be used
        fill(self, layer, expert, slot)

    monkeypatch.setattr(ExpertFile, "fill", counted)
    profile = PROFILE if lookahead else None
    experts = TieredExperts(store.experts(direct=lookahead), select("cpu"), slots, profile, lookahead=lookahead)
    model = model_of(store, experts)
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    experts.close()
    assert 0 < experts.counts.bytes_read <= sum(filled)
    assert experts.counts.bytes_read < experts.counts.reads * store.manifest.stride
    if not lookahead:
        assert experts.counts.bytes_read == sum(filled)


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize(
    "slots", [TierSlots(0, 1, EXPERTS), TierSlots(5, 2, EXPERTS), TierSlots(12, 3, 14)],
    ids=lambda slots: f"{slots.staying}+{slots.passing}+{slots.host}",
)  # fmt: skip
def test_the_tiers_do_not_change_a_bit(
    slots: TierSlots, costs: Costs | None, store: ModelStore, expected: torch.Tensor
) -> None:
    device = SimulatedDevice((slots.staying + slots.passing) * store.manifest.stride)
    experts = OffloadedExperts(store.experts(), select("cpu"), device, slots, PROFILE, costs=costs)
    model = model_of(store, experts)
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    assert (experts.counts.gpu_hits > 0) == (slots.staying > 0)
    experts.close()


def test_a_host_that_computes_one_of_the_formats_otherwise_computes_none(
    store: ModelStore, expected: torch.Tensor
) -> None:
    """int8 is written nowhere in the recipe, only in its masks."""

    class Fussy(SimulatedDevice):
        def computes_as(self, kernels: object, spec: QuantSpec) -> bool:
            return spec.kind != "int8"

    slots = TierSlots(3, 2, EXPERTS)
    experts = OffloadedExperts(store.experts(), select("cpu"), Fussy(1 << 30), slots, costs=NEVER_MOVE)
    assert torch.equal(logits(model_of(store, experts)), expected)
    assert experts.counts.copies == experts.counts.ram_hits + experts.counts.disk_hits > 0
    experts.close()


@pytest.mark.parametrize("mask", [0, 7])
def test_one_mask_for_all_is_one_format(mask: int, checkpoint: Path, tmp_path: Path) -> None:
    store = make(checkpoint, tmp_path / "one", "nf4", (mask,) * N_RECORDS)
    plain = make(checkpoint, tmp_path / "plain", "int8" if mask else "nf4", ())
    assert (store.folder / EXPERTS_FILE).read_bytes() == (plain.folder / EXPERTS_FILE).read_bytes()
    expected = logits(load_model(plain, store_config(plain)))
    experts = TieredExperts(store.experts(), select("cpu"), EXPERTS)
    assert torch.equal(logits(model_of(store, experts)), expected)
    experts.close()


def test_a_flipped_bit_of_any_record_is_found(store: ModelStore, tmp_path: Path) -> None:
    """The last record, and bytes that a record of the largest size would not have where it begins."""
    copy = shutil.copytree(store.folder, tmp_path / "copy")
    path, layouts = copy / EXPERTS_FILE, store.manifest.layouts
    data = bytearray(path.read_bytes())
    draw = random.Random(5)
    for index in (0, N_RECORDS - 1, *draw.sample(range(N_RECORDS), 6)):
        at = draw.randrange(layouts.offsets[index], layouts.offsets[index + 1])
        assert layouts.at(at) == index
        data[at] ^= 4
        path.write_bytes(data)
        layer, expert = divmod(index, EXPERTS)
        with pytest.raises(CorruptError, match=f"layer {layer} expert {expert} is damaged"):
            for _ in ModelStore.open(copy).verify():
                pass
        with pytest.raises(CorruptError, match=f"layer {layer} expert {expert} is damaged"):
            load_model(ModelStore.open(copy), store_config(store))
        data[at] ^= 4
