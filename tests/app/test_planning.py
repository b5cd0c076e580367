"""What `plan` finds out about a model that may be here, or no more than a config.json, or a name."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from stores import quantized

from mixlocal.app import budgets, planning, rehearsal
from mixlocal.app.budgets import RunOptions, plan_notes, plan_run
from mixlocal.app.catalog import VARIANTS, read_catalog, recipe_for
from mixlocal.app.footprint import stored_bytes
from mixlocal.app.hardware import Gpu, Hardware
from mixlocal.app.model_run import store_config
from mixlocal.app.parameters import total_and_active
from mixlocal.app.planning import Outlook, find_subject, look_into
from mixlocal.app.rehearsal import StepTime, rehearsal_bytes, rehearse
from mixlocal.errors import MemoryBudgetError, NotFoundError, RefusedError, UsageError
from mixlocal.experts.plan import BASE_BYTES, ModelBytes
from mixlocal.experts.profile import FORMAT, RoutingProfile, save_profile
from mixlocal.model.arch import read_config
from mixlocal.model.transformer import Transformer
from mixlocal.store import disk_speed
from mixlocal.store.manifest import Recipe
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home, home

GB = 10**9
MACHINE = Hardware(cores=2, ram_total=64 * GB, ram_free=60 * GB, disk_free=10**12)
GPU = Gpu("a GPU", 24 * GB, 20 * GB)
MIXTRAL = "mixtral-8x7b-instruct"


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)
    monkeypatch.setattr(disk_speed, "SECONDS", 0.0)
    monkeypatch.setattr(planning, "probe", lambda _: MACHINE)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> StepTime:
    """What every rehearsal is said to have measured, without doing it."""
    step = StepTime(layer=0.010, rest=0.080)
    monkeypatch.setattr(planning, "rehearse", lambda *_: step)
    return step


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with one model in it, "tiny", and its checkpoint beside it."""
    root = tmp_path_factory.mktemp("planning")
    quantized(tiny.write_checkpoint(root / "checkpoint"), root / "models" / "tiny" / "q4")
    return home(root)


def smallest(folders: Home) -> int:
    """The budget for "tiny" with half of its eight experts in memory."""
    store = ModelStore.open(folders.store("tiny", "q4"))
    needs = stored_bytes(store.manifest, store_config(store), torch.float16)
    return BASE_BYTES + needs.trunk + 256 * needs.kv_token + needs.scratch + 4 * needs.record


def config_only(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG | changes))
    return folder


def outlook(model: str, folders: Home, **options: object) -> Outlook:
    return look_into(find_subject(model, folders), RunOptions(**options), folders)


CONFIGS = [name for name, entry in read_catalog().items() if entry.config]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_catalogue_s_parameters_are_those_of_its_config(name: str) -> None:
    entry = read_catalog()[name]
    assert entry.config is not None
    config = read_config(entry.config, name)
    assert total_and_active(config) == (entry.parameters.total, entry.parameters.active)
    assert config.architecture == entry.architecture


def test_an_installed_model(folders: Home) -> None:
    found = outlook("tiny", folders, ram="8G")
    assert (found.subject.name, found.subject.variant) == ("tiny", "q4")
    assert found.subject.store is not None
    assert (found.plan.n_records, found.plan.disk_records, found.disk) == (8, 0, "")
    assert found.forecast is not None
    assert found.forecast.tokens_per_s > 0 == found.forecast.disk_s
    by_folder = outlook(str(folders.store("tiny", "q4")), folders, ram="8G")
    assert (by_folder.plan, by_folder.subject.store) == (found.plan, found.subject.store)


def test_a_config_tells_the_same_as_the_model_made_of_it(folders: Home, tmp_path: Path) -> None:
    bare = outlook(str(config_only(tmp_path / "tiny")), folders, ram="8G")
    made = outlook("tiny", folders, ram="8G")
    assert bare.subject.store is None
    header = made.plan.trunk_bytes - bare.plan.trunk_bytes  # of the file that holds it
    assert 0 < header <= 4096
    assert replace(bare.plan, trunk_bytes=made.plan.trunk_bytes) == made.plan
    larger = outlook(f"{tmp_path / 'tiny'}:bf16", folders)
    assert (larger.subject.variant, larger.plan.record_bytes) == ("bf16", -(-3 * 64 * 96 * 2 // 4096) * 4096)


@pytest.mark.parametrize("name", ["my model (2)", "ünï", "-q", "x" * 200])
def test_a_folder_may_be_called_anything(name: str, folders: Home, tmp_path: Path) -> None:
    assert outlook(str(config_only(tmp_path / name)), folders).subject.name == name


@pytest.mark.usefixtures("timed")
def test_a_name_of_the_catalogue(folders: Home) -> None:
    found = outlook(MIXTRAL, folders, ram="12G")
    assert (found.subject.variant, found.subject.store) == ("q4", None)
    plan = found.plan
    assert (plan.n_records, plan.record_bytes) == (256, 3 * 4096 * 14336 * (32 + 2) // 64)  # nf4, a half per 64
    assert plan.trunk_bytes == 2 * (2 * 32000 * 4096 + 32 * (2 * 4096 + 2 * 1024) * 4096) + 4 * 4096 * (65 + 32 * 8)
    assert plan.kv_bytes == plan.context * 32 * 8 * 2 * 128 * 2
    assert 11.9 * GB < plan.ram_bytes <= plan.budget == 12 * GB
    assert outlook(f"{MIXTRAL}:q8", folders).plan.record_bytes > 1.8 * plan.record_bytes


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PyTorch's largest library: as large as a record of Mixtral's, with another beside it."""
    lib = tmp_path / "torch" / "lib"
    lib.mkdir(parents=True)
    (lib / "small").write_bytes(b"0")
    (lib / "large").touch()
    os.truncate(lib / "large", 93_585_408)
    monkeypatch.setattr(planning.torch, "__file__", str(lib.parent / "__init__.py"))
    return lib / "large"


@pytest.mark.usefixtures("timed")
def test_the_forecast_by_hand(library: Path, folders: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of the library is read in 20 ms, so a record takes 80."""
    seconds = {(library, 93_585_408 // 4, True): 0.020}
    monkeypatch.setattr(planning, "record_seconds", lambda path, nbytes, direct, pause: seconds[path, nbytes, direct])
    found = outlook(MIXTRAL, folders, ram="12G")
    assert found.forecast is not None
    assert found.forecast.compute_s == pytest.approx(32 * 0.010 + 0.080)
    assert found.forecast.disk_s == pytest.approx(64 * found.plan.disk_records / 256 * 0.080)
    assert found.forecast.tokens_per_s == pytest.approx(1 / (found.forecast.compute_s + found.forecast.disk_s))
    assert "PyTorch" in found.disk


@pytest.mark.usefixtures("timed")
def test_a_library_may_be_a_link(library: Path, folders: Home, tmp_path: Path) -> None:
    """As some package managers install it."""
    library.unlink()
    (tmp_path / "elsewhere").write_bytes(bytes(1 << 20))
    library.symlink_to(tmp_path / "elsewhere")
    found = outlook(MIXTRAL, folders, ram="12G")
    assert found.forecast is not None
    assert found.forecast.disk_s > 0


@pytest.mark.usefixtures("timed")
def test_where_there_is_nothing_to_read_the_speed_is_not_known(library: Path, folders: Home) -> None:
    for file in library.parent.iterdir():
        file.unlink()
    found = outlook(MIXTRAL, folders, ram="12G")
    assert (found.forecast, found.disk) == (None, "")
    assert "disk" in found.unmeasured
    assert outlook(MIXTRAL, folders, ram="40G").forecast is not None  # nothing needs to be read


def test_a_model_that_is_here_is_read_itself(folders: Home) -> None:
    found = outlook("tiny", folders, ram=smallest(folders))
    assert (found.plan.ram_slots, found.plan.disk_records) == (4, 4)
    assert "the model itself" in found.disk
    assert found.forecast is not None
    assert found.forecast.disk_s == pytest.approx(2 * 2 / 2 * (found.forecast.speeds.record or 0)) != 0


def test_what_earlier_runs_learnt_counts(folders: Home, tmp_path: Path) -> None:
    """For this model, and for no folder that is called like it."""
    own = Home(folders.data, tmp_path / "cache")
    assert not outlook("tiny", own, ram=smallest(folders)).forecast.look.learnt
    save_profile(own.profile("tiny", "q4"), RoutingProfile(FORMAT, 100, ((0.5,) * 4,) * 2, (0.4, 0.8, 0.9)))
    found = outlook("tiny", own, ram=smallest(folders)).forecast
    assert found is not None
    assert (found.look.learnt, found.look.found) == (True, 0.8)
    stranger = outlook(str(config_only(tmp_path / "tiny")), own, ram=smallest(folders)).forecast
    assert stranger is not None
    assert not stranger.look.learnt
    assert stranger.look.found < 0.8


def test_several_sequences_at_once(folders: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(planning, "rehearse", lambda *args: (asked.append(args[2]), StepTime(0.1, 0.3))[1])
    found = outlook("tiny", folders, sequences=4)
    assert asked == [4]
    assert found.plan.kv_bytes == 4 * outlook("tiny", folders).plan.kv_bytes
    assert found.forecast is not None
    assert found.forecast.tokens_per_s == pytest.approx(4 / 0.5)
    assert found.forecast.look.experts == pytest.approx(2 * 4 * (1 - 0.5**4))


def test_other_experts_per_token_are_measured_and_looked_up(folders: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(planning, "rehearse", lambda config, *_: (asked.append(config.router.top_k), StepTime(1, 1))[1])
    found = [outlook("tiny", folders, experts_per_token=count).forecast for count in (None, 1, 4)]
    assert asked == [2, 1, 4]
    assert [forecast.look.experts for forecast in found if forecast] == pytest.approx([4, 2, 8])


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"context": 0}, UsageError, "--ctx 0 is outside 1 to 256"),
        ({"context": 257}, UsageError, "--ctx 257"),
        ({"experts_per_token": 0}, UsageError, "--experts-per-token 0 is outside 1 to 4"),
        ({"experts_per_token": 5}, UsageError, "--experts-per-token 5"),
        ({"threads": 0}, UsageError, "threads"),
        ({"kv_dtype": "f17"}, UsageError, "f17"),
        ({"ram": "lots"}, UsageError, "--ram 'lots' is no size"),
        ({"device": "abacus"}, UsageError, "abacus"),
        ({"vram": "4G"}, UsageError, "--vram needs a GPU"),
        ({"ram": "250M"}, MemoryBudgetError, "tiny:q4 needs at least --ram 2"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    options: dict[str, object], error: type[Exception], says: str, folders: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "rehearse", lambda *_: pytest.fail("measured"))
    with pytest.raises(error, match=says):
        outlook("tiny", folders, **options)


def test_models_that_nothing_is_known_of(folders: Home, tmp_path: Path) -> None:
    for name in ("nobody", "smolmix", "tiny:q8", str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(NotFoundError):
            find_subject(name, folders)
    with pytest.raises(UsageError, match="q5"):
        find_subject("tiny:q5", folders)
    with pytest.raises(RefusedError, match="llama"):
        find_subject(str(config_only(tmp_path / "other", model_type="llama")), folders)


def test_widths_that_cannot_be_packed_are_refused(folders: Home, tmp_path: Path) -> None:
    folder = config_only(tmp_path / "odd", intermediate_size=97)
    with pytest.raises(RefusedError, match=r"odd:q4: w2: 97 columns"):
        outlook(str(folder), folders)
    assert outlook(f"{folder}:q8", folders).forecast is not None


def test_with_a_gpu_the_speed_is_not_known_yet(folders: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "probe", lambda _: replace(MACHINE, gpus=(GPU,)))
    monkeypatch.setattr(budgets, "select", lambda name: None)
    monkeypatch.setattr(planning, "rehearse", lambda *_: pytest.fail("measured on the processor"))
    found = outlook(MIXTRAL, folders)
    assert (found.plan.on_gpu, found.plan.disk_records, found.forecast) == (True, 0, None)
    assert "GPU" in found.unmeasured


def test_measuring_does_not_take_memory_that_is_not_there(folders: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "rehearsal_bytes", lambda *_: 31 * GB)
    monkeypatch.setattr(planning, "rehearse", lambda *_: pytest.fail("measured"))
    found = outlook("tiny", folders)
    assert found.forecast is None
    assert found.unmeasured == "measuring takes 31.0 GB of memory"


TOY = ModelBytes("toy", trunk=4 * GB, kv_token=1000, max_context=1, n_layers=2, n_experts=8, record=GB, scratch=0)


def test_a_gpu_that_cannot_compute_is_left_alone_and_named(folders: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "probe", lambda _: replace(MACHINE, gpus=(GPU,)))
    found = outlook("tiny", folders)
    assert not found.plan.on_gpu
    notes = plan_notes(found.plan, found.hardware, found.subject.config, RunOptions(context=8))
    assert notes[0].startswith(f"{GPU.name} is not used: ")
    assert "finds no GPU" in notes[0] or "bitsandbytes" in notes[0]


def test_a_gpu_that_is_too_small_is_left_alone_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "select", lambda name: None)
    small = replace(MACHINE, gpus=(Gpu("small", 5 * GB, 4 * GB),))
    assert not plan_run((TOY,), small, RunOptions()).on_gpu
    with pytest.raises(MemoryBudgetError, match="at least --vram 6001M"):
        plan_run((TOY,), small, RunOptions(vram="80%"))
    large = replace(MACHINE, gpus=(GPU,))
    assert plan_run((TOY,), large, RunOptions()).gpu_slots == 12  # 95 % of 20 GB, two slots for copies
    assert plan_run((TOY,), large, RunOptions(vram="50%")).gpu_slots == 5
    assert not plan_run((TOY,), large, RunOptions(device="cpu")).on_gpu
    with pytest.raises(UsageError, match="--vram"):
        plan_run((TOY,), large, RunOptions(device="cpu", vram="8G"))


def test_a_budget_is_a_part_of_all_memory_and_never_more_than_is_free() -> None:
    assert plan_run((TOY,), MACHINE, RunOptions(ram="50%")).budget == 32 * GB
    everything = plan_run((TOY,), MACHINE, RunOptions()).budget
    assert 0.95 * 60 * GB <= everything < 0.95 * 64 * GB  # what this process has already is its own
    assert plan_run((TOY,), MACHINE, RunOptions(ram="100%")).budget == pytest.approx(everything, rel=0.01)


@pytest.mark.parametrize(("experts", "attention"), [("nf4", "bf16"), ("int8", "int8"), ("bf16", "bf16")])
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_rehearsal_takes_steps_of_so_many_tokens(
    experts: str, attention: str, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[int]] = []
    forward = Transformer.forward_many
    monkeypatch.setattr(
        Transformer,
        "forward_many",
        lambda self, pieces: (steps.append([len(piece.ids) for piece in pieces]), forward(self, pieces))[1],
    )
    times = rehearse(read_config(tiny.CONFIG, "tiny"), Recipe(experts, 16, attention), sequences)
    assert times.layer >= 0 < times.rest
    assert all(step == [1] * sequences for step in steps)


def test_a_step_is_its_layers_and_an_output_head(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter((0.500, 0.030))  # the step, then the head alone
    monkeypatch.setattr(rehearsal, "_times", lambda _: next(measured))
    times = rehearse(read_config(tiny.CONFIG, "tiny"), recipe_for("q4"), 3)
    assert (times.layer, times.rest) == pytest.approx((0.470 / 2, 0.030))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rehearsal_fits_beside_other_programs_and_in_no_cache(name: str) -> None:
    config = read_config(read_catalog()[name].config or {}, name)
    for variant in VARIANTS.keys() - {"mix"}:  # which is not made without a size
        assert rehearsal.CACHED_BYTES < rehearsal_bytes(config, recipe_for(variant)) < 6 * GB
