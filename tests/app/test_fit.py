"""A store that fits a number of bytes, with 8 bits where 4 cost most; and stores whose scales a text decided."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tiny
import torch

from mixlocal.app import quantization, quantize
from mixlocal.app.blueprint import Blueprint
from mixlocal.app.calibration import Calibration, calibrate, calibration_text
from mixlocal.app.fit import room_to_widen, widen
from mixlocal.app.install import QuantizeRequest, quantize_model
from mixlocal.app.progress import Progress
from mixlocal.errors import RefusedError
from mixlocal.quant.format import WIDE_BITS as BITS
from mixlocal.quant.format import ExpertWeights, QuantSpec, QuantTensor, Weight
from mixlocal.quant.packing import read_record
from mixlocal.quant.quantize import quantize as specification
from mixlocal.quant.search import Search
from mixlocal.store.building import building_folder
from mixlocal.store.checkpoint import Checkpoint
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.manifest import Recipe
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import home

PARTS = ("w1", "w3", "w2")
SMALL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 260, "max_position_embeddings": 64}
N_RECORDS = 8
TEXT = "The third boat came in with the tide; nobody had lit the lamp, and the harbour master wrote it down.\n" * 3
PLAIN = Recipe("nf4", 16, "bf16")

pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("fit") / "tiny", shards=2, **SMALL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "log.txt"
    path.write_text(TEXT)
    return path


def recipe_on(text: Path, kind: str = "nf4", **more: Any) -> Recipe:
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    return msgspec.structs.replace(PLAIN, experts=kind, calibrated_on=digest, **{"search": True} | more)


def steps_of(target: Path | str, folder: Path, recipe: Recipe, text: Path | None, **more: Any) -> Iterator[Progress]:
    variant = "mix" if recipe.fit is not None else "q4"
    read = None if text is None else calibration_text(text)
    return quantize_model(QuantizeRequest(str(target), variant, recipe, text=read, **more), home(folder))


def run(target: Path | str, folder: Path, recipe: Recipe, text: Path | None, **more: Any) -> ModelStore:
    work = steps_of(target, folder, recipe, text, **more)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def folder_bytes(store: ModelStore) -> int:
    return sum(map(len, contents(store.folder).values()))


def blueprint_of(checkpoint: Path, recipe: Recipe = PLAIN) -> Blueprint:
    return Blueprint.of(Checkpoint(checkpoint).config, "config.json", recipe)


def records(store: ModelStore) -> Iterator[tuple[int, ExpertWeights]]:
    slot, experts, layouts = (
        torch.empty(store.manifest.stride, dtype=torch.uint8),
        store.experts(),
        store.manifest.layouts,
    )
    for index in range(N_RECORDS):
        experts.read(*divmod(index, 4), slot)
        yield index, read_record(layouts[index], slot)
    experts.close()


def same(ours: Weight, theirs: Weight) -> bool:
    assert isinstance(ours, QuantTensor)
    assert isinstance(theirs, QuantTensor)
    return (
        ours.spec == theirs.spec and torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scales)
    )


def source_name(index: int, part: str) -> str:
    layer, expert = divmod(index, 4)
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"


def measured(checkpoint: Path, recipe: Recipe, text: Path, *, damage: bool) -> Calibration:
    work = calibrate(Checkpoint(checkpoint), blueprint_of(checkpoint, recipe), calibration_text(text), damage=damage)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


# Which matrices become wide.


@pytest.fixture(scope="module")
def damage() -> torch.Tensor:
    return torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def bytes_with(checkpoint: Path, wide: tuple[int, ...]) -> int:
    return blueprint_of(checkpoint, msgspec.structs.replace(PLAIN, wide=wide)).store_bytes


def test_every_budget_is_kept_and_spent_on_what_loses_most(checkpoint: Path, damage: torch.Tensor) -> None:
    """All matrices take as much more in 8 bits here, so the wide ones are the first so many by damage."""
    blueprint = blueprint_of(checkpoint)
    least, most = blueprint.store_bytes, bytes_with(checkpoint, (7,) * N_RECORDS)
    step, order = (most - least) // 24, damage.flatten().argsort(descending=True).tolist()
    for budget in range(least, most + 2 * step, 1000):
        wide = widen(blueprint, damage, room_to_widen(blueprint, 0, budget))
        chosen = {3 * record + PARTS.index(part) for record in range(8) for part in PARTS if wide[record] & BITS[part]}
        assert chosen == set(order[: (budget - least) // step])
        assert bytes_with(checkpoint, wide) == min(most, budget - (budget - least) % step)


def test_what_does_not_fit_leaves_its_room_to_what_does(tmp_path: Path, damage: torch.Tensor) -> None:
    """Records are whole pages, so a matrix takes one page or two, by what is wide beside it."""
    odd = tiny.write_checkpoint(tmp_path / "tiny", **SMALL | {"intermediate_size": 160})
    blueprint, order, skipped = blueprint_of(odd), damage.flatten().argsort(descending=True).tolist(), 0
    for budget in range(blueprint.store_bytes, bytes_with(odd, (7,) * N_RECORDS), 4096):
        wide = widen(blueprint, damage, room_to_widen(blueprint, 0, budget))
        assert budget - 4096 <= bytes_with(odd, wide) <= budget
        chosen = [bool(wide[index // 3] & BITS[PARTS[index % 3]]) for index in order]
        skipped += chosen != sorted(chosen, reverse=True)
    assert skipped


def test_too_little_for_four_bits_is_refused_with_both_numbers(checkpoint: Path) -> None:
    blueprint = blueprint_of(checkpoint)
    needed = blueprint.store_bytes + 5000
    assert room_to_widen(blueprint, 5000, needed) == 0
    with pytest.raises(RefusedError, match=r"--fit 0\.1M: at 4 bits everything takes 0\.3M") as caught:
        room_to_widen(blueprint, 5000, 100_000)
    assert caught.value.hint
    assert needed <= 300_000  # what is said is enough


# Stores.


@pytest.fixture(scope="module", params=["nf4", "int4"])
def calibrated(request: pytest.FixtureRequest, checkpoint: Path, text: Path, tmp_path_factory) -> ModelStore:
    return run(checkpoint, tmp_path_factory.mktemp("calibrated"), recipe_on(text, request.param), text)


def test_each_matrix_is_what_a_search_with_its_importance_gives(
    calibrated: ModelStore, checkpoint: Path, text: Path
) -> None:
    recipe, source = calibrated.manifest.recipe, tiny.tensors(tiny.CONFIG | SMALL)
    found = measured(checkpoint, recipe, text, damage=False)
    unweighted = 0
    for index, expert in records(calibrated):
        for part in PARTS:
            weight = source[source_name(index, part)]
            search = Search(found.importance(*divmod(index, 4), part))
            assert same(getattr(expert, part), specification(part, weight, recipe.expert_spec, search))
            unweighted += same(getattr(expert, part), specification(part, weight, recipe.expert_spec, Search()))
    assert unweighted == 0


@pytest.fixture(scope="module")
def narrow(checkpoint: Path) -> int:
    """Bytes of a store with all in 4 bits, of its manifest as many as it may have."""
    return bytes_with(checkpoint, ()) + sum((checkpoint / name).stat().st_size for name in COPIED) + 7000


COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def mixed(checkpoint: Path, text: Path, narrow: int, tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    recipe = recipe_on(text, fit=narrow + 10 * 4096)
    return run(checkpoint, tmp_path_factory.mktemp("mixed"), recipe, text)


def test_each_matrix_is_in_its_format(mixed: ModelStore, checkpoint: Path, text: Path) -> None:
    recipe, source = mixed.manifest.recipe, tiny.tensors(tiny.CONFIG | SMALL)
    found = measured(checkpoint, recipe, text, damage=True)
    assert found.damage is not None
    assert mixed.folder.name == mixed.manifest.variant == "mix"
    wide = set(found.damage.flatten().argsort(descending=True)[:10].tolist())
    for index, expert in records(mixed):
        for number, part in enumerate(PARTS):
            weight, ours = source[source_name(index, part)], getattr(expert, part)
            if 3 * index + number in wide:
                assert same(ours, specification(part, weight, QuantSpec("int8")))
            else:
                importance = found.importance(*divmod(index, 4), part)
                assert same(ours, specification(part, weight, QuantSpec("nf4"), Search(importance)))
    assert list(mixed.verify())[-1] == (mixed.manifest.nbytes,) * 2
    assert mixed.manifest.experts_bytes == (mixed.folder / EXPERTS_FILE).stat().st_size


@pytest.mark.parametrize("steps", [0, 1, 7, 30])
def test_no_byte_more_than_was_allowed(steps: int, checkpoint: Path, text: Path, narrow: int, tmp_path: Path) -> None:
    """Of the folder, manifest and all; and not much less."""
    fit = narrow + steps * 4096
    store = run(checkpoint, tmp_path, recipe_on(text, fit=fit), text)
    wide = sum(mask.bit_count() for mask in store.manifest.recipe.wide)
    assert wide == min(steps, 24)
    assert fit - 2 * 4096 < folder_bytes(store) + max(0, steps - 24) * 4096 <= fit


def test_too_little_is_refused_before_anything_is_read(
    checkpoint: Path, text: Path, narrow: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "calibrate", lambda *_, **__: pytest.fail("began to read"))
    with pytest.raises(RefusedError, match="at 4 bits everything takes"):
        run(checkpoint, tmp_path, recipe_on(text, fit=narrow - 4096), text)
    assert not list(tmp_path.rglob("mix*"))


def test_a_bf16_store_and_any_shards_give_the_same_bytes(
    mixed: ModelStore, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    run(checkpoint, tmp_path, Recipe("bf16", 16, "bf16"), None, out=tmp_path / "models" / "tiny" / "bf16")
    adopted = run("tiny:bf16", tmp_path, asked(mixed), text)
    assert contents(adopted.folder) == contents(mixed.folder)
    single = tiny.write_checkpoint(tmp_path / "single" / "tiny", **SMALL)
    ours, theirs = run(single, tmp_path / "single", asked(mixed), text).manifest, mixed.manifest
    assert (ours.recipe, ours.records) == (theirs.recipe, theirs.records)


def asked(store: ModelStore) -> Recipe:
    """What a user gave; which matrices are wide came of that."""
    return msgspec.structs.replace(store.manifest.recipe, wide=())


@pytest.mark.parametrize("count", [1, 11, 23])
def test_a_run_that_is_cut_short_goes_on_to_the_same_bytes(
    count: int, mixed: ModelStore, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It calibrates again, comes to the same, and quantizes only what was lacking."""
    done: list[str] = []
    original = quantization.quantize_rows

    def watched(name: str, *rest: Any, **more: Any) -> Any:
        if "experts" in name:
            done.append(name)
            if len(done) == count + 1:
                raise RuntimeError("power cut")
        return original(name, *rest, **more)

    monkeypatch.setattr(quantization, "quantize_rows", watched)
    with pytest.raises(RuntimeError, match="power cut"):
        run(checkpoint, tmp_path, asked(mixed), text)
    assert (building_folder(tmp_path / "models" / "tiny" / "mix")).is_dir()
    first = done[:-1]
    done[:] = ["-"] * 100
    store = run(checkpoint, tmp_path, asked(mixed), text)
    assert sorted(first + done[100:]) == sorted(source_name(index, part) for index in range(8) for part in PARTS)
    assert contents(store.folder) == contents(mixed.folder)


def test_it_may_be_stopped_at_any_step(mixed: ModelStore, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    steps = 0
    while steps < 100:
        work = steps_of(checkpoint, tmp_path, asked(mixed), text)
        seen = [step for step, _ in zip(work, range(steps), strict=False)]
        work.close()
        if len(seen) < steps:
            break
        steps += 5
    assert 20 < steps < 100
    assert contents(tmp_path / "models" / "tiny" / "mix") == contents(mixed.folder)


def test_what_stands_is_not_made_again(
    mixed: ModelStore, calibrated: ModelStore, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "calibrate", lambda *_, **__: pytest.fail("read the text again"))
    for store in (mixed, calibrated):
        before = contents(store.folder)
        steps = list(steps_of(checkpoint_of(store), store.folder.parents[2], asked(store), text))
        assert steps == []
        assert contents(store.folder) == before


def checkpoint_of(store: ModelStore) -> Path:
    """By the name alone: nothing is read of it."""
    return store.folder.parents[2] / store.manifest.name


def test_other_options_are_another_store(mixed: ModelStore, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    recipe = asked(mixed)
    assert recipe.fit is not None
    home_of_it = mixed.folder.parents[2]
    for changes in ({"fit": recipe.fit + 1}, {"search": False}, {"calibrated_on": "0" * 64}, {"experts": "int4"}):
        with pytest.raises(RefusedError, match="quantized otherwise"):
            run(checkpoint, home_of_it, msgspec.structs.replace(recipe, **changes), text)


def test_another_text_gives_another_store(calibrated: ModelStore, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    kind = calibrated.manifest.recipe.experts
    with pytest.raises(RefusedError, match="quantized otherwise"):
        run(checkpoint, calibrated.folder.parents[2], recipe_on(other, kind), other)
    fresh = run(checkpoint, tmp_path, recipe_on(other, kind), other)
    assert fresh.manifest.recipe.calibrated_on == hashlib.sha256(other.read_bytes()).hexdigest()
    assert fresh.manifest.records != calibrated.manifest.records
