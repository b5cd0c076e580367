"""A token's logits have the same bits however the tokens before it were computed: in one pass, in pieces, one by one,
with any number of threads, and for quantized weights on any instruction set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from stores import open_model, quantized

from mixlocal.kernels.isa import MISSING, native_isas, set_threads
from mixlocal.model.kv_cache import KV_DTYPES, own_cache
from mixlocal.store.model_store import ModelStore

ISAS = native_isas() or (pytest.param("none", marks=pytest.mark.skip(f"no compiled kernels: {MISSING}")),)
POSITIONS = 300  # more than one chunk of attention
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 200},
    "window 40, tied": {"sliding_window": 40, "tie_word_embeddings": True, "head_dim": 24},
    "window across chunks": {"sliding_window": 270},
}


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    set_threads(len(os.sched_getaffinity(0)))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MIXLOCAL_ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize("variant", ["q4", "q8", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_one_pass_and_one_by_one_are_the_same(
    isa: str, name: str, variant: str, dtype: str, tmp_path: Path, threads: None
) -> None:
    model, config, ids = case(tmp_path, name, variant)
    set_threads(1)
    whole = model.forward(ids, own_cache(config, POSITIONS, KV_DTYPES[dtype]), all_logits=True)
    assert whole.isfinite().all()
    set_threads(3)
    cache = own_cache(config, POSITIONS, KV_DTYPES[dtype])
    pieces = [model.forward(part, cache, all_logits=True) for part in ids.split([1, 2, 3, 5, 16, 200, 40, 33])]
    assert torch.equal(torch.cat(pieces), whole)
    cache.truncate(250)
    stepwise = torch.stack([model.forward(token[None], cache) for token in ids[250:]])
    assert torch.equal(stepwise, whole[250:])


@pytest.mark.parametrize(("variant", "bound"), [("q4", 0.06), ("q8", 0.03)])
def test_logits_are_near_the_reference(
    isa: str, variant: str, bound: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 activations and the codebook in whole steps are all that differs; random routers turn some choices over."""
    model, config, ids = case(tmp_path, "grouped", variant)
    ours = model.forward(ids, own_cache(config, POSITIONS), all_logits=True)
    monkeypatch.setenv("MIXLOCAL_ISA", "reference")
    exact, _ = open_model(ModelStore.open(tmp_path / "store"))
    expected = exact.forward(ids, own_cache(config, POSITIONS), all_logits=True)
    assert (ours - expected).norm() < bound * expected.norm()


def case(folder: Path, name: str, variant: str) -> tuple[Any, Any, torch.Tensor]:
    checkpoint = tiny.write_checkpoint(folder / "checkpoint", max_position_embeddings=512, **CONFIGS[name])
    model, config = open_model(quantized(checkpoint, folder / "store", variant))
    ids = torch.randint(0, config.vocab_size, (POSITIONS,), generator=torch.Generator().manual_seed(3))
    return model, config, ids
