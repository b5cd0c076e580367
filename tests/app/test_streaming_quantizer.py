"""The streaming quantizer: what it accepts, what it refuses before writing, and what it never does twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from stores import quantized

from mixlocal.app.install import QuantizeRequest, quantize_model
from mixlocal.app.quantize import describe_errors
from mixlocal.errors import CorruptError, DiskFullError, RefusedError
from mixlocal.quant.format import QuantSpec, QuantTensor
from mixlocal.quant.packing import read_record
from mixlocal.quant.quantize import quantize
from mixlocal.store.manifest import Recipe
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import home

Q4 = Recipe(experts="nf4", scale_bits=16, attention="bf16")
GATE = "model.layers.0.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"


def run(checkpoint: Path, folder: Path, **changes: Any) -> ModelStore:
    request = QuantizeRequest(**{"target": str(checkpoint), "variant": "q4", "recipe": Q4} | changes)
    work = quantize_model(request, home(folder))
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def bytes_below(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "bf16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_expert_is_what_the_format_says(kind: str, shards: int, tmp_path: Path) -> None:
    """Whatever the shard order, each record holds its own three matrices, in the right places."""
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", shards=shards)
    recipe = Recipe(experts=kind, scale_bits=16, attention="bf16")
    store = run(checkpoint, tmp_path, recipe=recipe, out=tmp_path / "out")
    source = tiny.tensors(tiny.CONFIG)
    record = torch.empty(store.manifest.stride, dtype=torch.uint8)
    experts = store.experts()
    for layer in range(2):
        for expert in range(4):
            experts.read(layer, expert, record)
            read = read_record(store.manifest.layouts[0], record)
            for part in ("w1", "w2", "w3"):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
                ours, expected = getattr(read, part), quantize(name, source[name], QuantSpec(kind))
                if isinstance(expected, QuantTensor):
                    assert torch.equal(ours.codes, expected.codes)
                    assert torch.equal(ours.scales, expected.scales)
                else:
                    assert torch.equal(ours, expected)
    experts.close()


def test_errors_are_reported_per_tensor(tmp_path: Path) -> None:
    store = run(tiny.write_checkpoint(tmp_path / "checkpoint"), tmp_path, recipe=Recipe("nf4", 16, "int8"))
    errors = describe_errors(store.manifest)
    assert len(errors) == 2 * 4 * 3 + 2 * 4 + 2
    assert all(0.05 < error < 0.12 for name, error in errors.items() if "experts" in name)
    assert all(0.002 < error < 0.02 for name, error in errors.items() if "experts" not in name)


def test_two_runs_give_the_same_bytes_and_the_second_call_does_nothing(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", shards=2)
    first = run(checkpoint, tmp_path / "a").folder
    second = run(checkpoint, tmp_path / "b").folder
    assert bytes_below(first) == bytes_below(second)
    before = (first / "experts.bin").stat().st_mtime_ns
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    assert run(checkpoint, tmp_path / "a").folder == first
    assert (first / "experts.bin").stat().st_mtime_ns == before


def test_another_recipe_needs_fresh(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    run(checkpoint, tmp_path)
    other = Recipe(experts="fp4", scale_bits=16, attention="bf16")
    with pytest.raises(RefusedError, match="quantized otherwise"):
        run(checkpoint, tmp_path, recipe=other)
    assert run(checkpoint, tmp_path, recipe=other, fresh=True).manifest.recipe == other


def test_interrupted_work_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlocal.app import quantization as module

    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    expected = bytes_below(run(checkpoint, tmp_path / "whole").folder)
    done: list[str] = []
    original = module.quantize_rows

    def counting(name: str, *rest: Any, **out: Any) -> Any:
        done.append(name)
        if len(done) == 30:
            raise RuntimeError("power cut")
        return original(name, *rest, **out)

    monkeypatch.setattr(module, "quantize_rows", counting)
    with pytest.raises(RuntimeError, match="power cut"):
        run(checkpoint, tmp_path / "cut")
    first = done[:-1]
    done.clear()
    monkeypatch.setattr(module, "quantize_rows", original)
    monkeypatch.setattr(module, "quantize_rows", lambda *a, **out: (done.append(a[0]), original(*a, **out))[1])
    store = run(checkpoint, tmp_path / "cut")
    again = [name for name in done if name in first]
    assert not again
    assert len(set(first) | set(done)) == 2 * 4 * 3 + 2 * 4 + 2
    assert bytes_below(store.folder) == expected


def test_a_source_that_changed_meanwhile_starts_over(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    work = quantize_model(QuantizeRequest(str(checkpoint), "q4", Q4), home(tmp_path))
    for _ in range(5):
        next(work)
    work.close()
    tiny.write_checkpoint(tmp_path / "checkpoint", seed=9)
    other = tiny.write_checkpoint(tmp_path / "other" / "checkpoint", seed=9)
    assert bytes_below(run(checkpoint, tmp_path).folder) == bytes_below(run(other, tmp_path / "other").folder)


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights[EXPERT]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.block_sparse_moe.experts.4.w1.weight"] = torch.ones(96, 64)


def transpose(weights: dict[str, torch.Tensor]) -> None:
    weights[EXPERT] = weights[EXPERT].T.contiguous()


def integers(weights: dict[str, torch.Tensor]) -> None:
    weights[EXPERT] = torch.ones(64, 96, dtype=torch.int64)


def fused(weights: dict[str, torch.Tensor]) -> None:
    """Experts as one three-dimensional tensor: quantizers that look for matrices pass it over."""
    for name in [name for name in weights if "layers.0.block_sparse_moe.experts" in name]:
        del weights[name]
    weights["model.layers.0.mlp.experts.gate_up_proj"] = torch.ones(4, 192, 64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop, f"1 missing: {EXPERT}"),
        (add, "1 unexpected: model.layers.0.block_sparse_moe.experts.4.w1.weight"),
        (transpose, rf"1 of the wrong shape: {EXPERT} \[96, 64\] instead of \[64, 96\]"),
        (integers, f"1 of a type that is no weight: {EXPERT}"),
        (fused, "12 missing: .* 1 unexpected: model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_wrong_tensors_are_named_before_a_byte_is_written(
    change: Callable[[dict[str, torch.Tensor]], None], says: str, tmp_path: Path
) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    weights = tiny.tensors(tiny.CONFIG)
    change(weights)
    tiny.write_shards(checkpoint, weights)
    with pytest.raises(RefusedError, match=says):
        run(checkpoint, tmp_path)
    assert not list(tmp_path.rglob("experts.bin"))


@pytest.mark.parametrize("name", [EXPERT, GATE, "model.norm.weight", "lm_head.weight"])
def test_nan_weights_are_named(name: str, tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    weights = tiny.tensors(tiny.CONFIG)
    weights[name].view(-1)[17] = float("nan")
    tiny.write_shards(checkpoint, weights)
    with pytest.raises(RefusedError, match=f"{name} holds nan at"):
        run(checkpoint, tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_shard_truncated_while_we_read_is_noticed(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    work = quantize_model(QuantizeRequest(str(checkpoint), "q4", Q4), home(tmp_path))
    next(work)
    with (checkpoint / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(CorruptError, match=r"truncated|early"):
        list(work)


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match="are needed"):
        run(tiny.write_checkpoint(tmp_path / "checkpoint"), tmp_path)
    assert not list(tmp_path.rglob("*.bin"))


def test_tied_head_stored_once_more_is_fine(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=True)
    weights = tiny.tensors(tiny.CONFIG | {"tie_word_embeddings": True})
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    tiny.write_shards(checkpoint, weights)
    assert run(checkpoint, tmp_path).manifest.n_experts == 4


def test_source_files_are_recorded(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", shards=2)
    manifest = quantized(checkpoint, tmp_path / "store").manifest
    assert [file.name for file in manifest.source.files] == sorted(p.name for p in checkpoint.glob("*.safetensors"))
    assert json.loads((tmp_path / "store" / "config.json").read_text())["model_type"] == "mixtral"
