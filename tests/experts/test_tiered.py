"""Experts read from disk when they are chosen: the same tokens at every budget, and what a failing disk does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from stores import quantized

from mixlocal.app.model_run import load_model, store_config
from mixlocal.errors import CorruptError
from mixlocal.experts.plan import MemoryPlan
from mixlocal.experts.tiered import TieredExperts
from mixlocal.model.kv_cache import KVCache
from mixlocal.model.transformer import Transformer
from mixlocal.store.expert_file import ExpertFile
from mixlocal.store.model_store import ModelStore

EXPERTS, LAYERS = 8, 4
IDS = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module", params=["q4", "bf16"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    root = tmp_path_factory.mktemp("tiered")
    checkpoint = tiny.write_checkpoint(
        root / "checkpoint", num_local_experts=EXPERTS, num_hidden_layers=LAYERS, num_experts_per_tok=2
    )
    return quantized(checkpoint, root / "store", request.param)


def opened(store: ModelStore, slots: int) -> Transformer:
    return load_model(store, store_config(store), plan=MemoryPlan(slots, all_resident=False))


def logits(model: Transformer) -> torch.Tensor:
    """A prompt in one pass, then token by token."""
    cache = KVCache(model.config, len(IDS))
    prompt = model.forward(IDS[:40], cache, all_logits=True)
    return torch.cat([prompt, *(model.forward(token[None], cache)[None] for token in IDS[40:])])


@pytest.fixture
def model(store: ModelStore) -> Iterator[Transformer]:
    model = opened(store, EXPERTS + 2)
    yield model
    model.experts.close()


@pytest.mark.parametrize("slots", [EXPERTS, EXPERTS + 3, 20, LAYERS * EXPERTS])
def test_the_budget_does_not_change_a_bit(store: ModelStore, slots: int) -> None:
    expected = logits(load_model(store, store_config(store)))
    model = opened(store, slots)
    assert torch.equal(logits(model), expected)  # cold
    assert torch.equal(logits(model), expected)  # warm
    counts = model.experts.counts
    assert counts.bytes_read == counts.disk_reads * store.manifest.stride
    if slots == LAYERS * EXPERTS:
        assert counts.disk_reads <= slots
    else:
        assert counts.ram_hits > 0
    model.experts.close()


def test_an_expert_is_read_once_for_all_tokens_of_a_pass(model: Transformer) -> None:
    model.forward(IDS, KVCache(model.config, len(IDS)))
    assert model.experts.counts.disk_reads <= LAYERS * EXPERTS


def test_a_failed_read_is_one_named_error_and_leaves_nothing_wrong(
    model: Transformer, store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(load_model(store, store_config(store)))
    read = ExpertFile.read
    calls = iter(range(1000))

    def failing(self: ExpertFile, layer: int, expert: int, slot: torch.Tensor) -> None:
        if next(calls) % 5 == 3:
            slot.fill_(77)
            raise CorruptError("the disk failed")
        read(self, layer, expert, slot)

    monkeypatch.setattr(ExpertFile, "read", failing)
    failures = 0
    for _ in range(6):
        try:
            logits(model)
        except CorruptError as error:
            failures += "the disk failed" in str(error)
    assert failures > 1
    monkeypatch.setattr(ExpertFile, "read", read)
    assert torch.equal(logits(model), expected)


def test_a_store_damaged_while_it_runs_gives_no_token(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", num_local_experts=EXPERTS, num_hidden_layers=LAYERS)
    store = quantized(checkpoint, tmp_path / "store", "q4")
    model = opened(store, EXPERTS)
    path = store.folder / "experts.bin"
    with path.open("r+b") as file:
        for record in range(LAYERS * EXPERTS):
            file.seek(record * store.manifest.stride + 100)
            file.write(b"\xff\x00\xff")
    with pytest.raises(CorruptError, match="is damaged"):
        logits(model)
    os.truncate(path, 5000)
    with pytest.raises(CorruptError, match=r"ends at byte|is damaged"):
        logits(model)
    model.experts.close()


def test_slots_are_pages(store: ModelStore) -> None:
    model = opened(store, EXPERTS)
    assert isinstance(model.experts, TieredExperts)
    assert all(slot.data_ptr() % 4096 == 0 for slot in model.experts._slots)
    model.experts.close()
