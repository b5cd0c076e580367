"""bench --compare: who is measured when, what the ratios are of, and what is refused before anything is measured."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from stores import quantized

from mixlocal.app import bench_turns
from mixlocal.app.bench import open_bench
from mixlocal.app.bench_compare import OF_QUALITY, CompareRequest, CompareRow, prepare_compare, run_compare
from mixlocal.app.bench_request import BenchRequest
from mixlocal.app.bench_turns import fit_together
from mixlocal.app.budgets import RunOptions
from mixlocal.app.footprint import stored_bytes
from mixlocal.app.hardware import Gpu
from mixlocal.app.measure import Running
from mixlocal.app.model_run import store_config
from mixlocal.app.quality.run import QualityRequest, QualityRow, run_quality
from mixlocal.errors import MixlocalError, NotFoundError, UsageError
from mixlocal.experts.plan import BASE_BYTES
from mixlocal.model.transformer import Transformer
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home
from mixlocal.store.paths import home as home_below

CPU = RunOptions(device="cpu")
Q4, BF16 = "tiny:q4", "tiny:bf16"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """tiny:q4, tiny:bf16, and short:q4 with a context of 16."""
    root = tmp_path_factory.mktemp("compare")
    checkpoint = tiny.write_checkpoint(root / "checkpoint")
    for variant in ("q4", "bf16"):
        quantized(checkpoint, root / "models" / "tiny" / variant, variant)
    short = tiny.write_checkpoint(root / "short", max_position_embeddings=16)
    quantized(short, root / "models" / "short" / "q4", name="short")
    (root / "text.txt").write_text("The keeper counted the boats, and one was missing.\n" * 3)
    return home_below(root)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many models were in memory before each was loaded."""
    alive: weakref.WeakSet[Transformer] = weakref.WeakSet()
    before: list[int] = []

    def counting(*given):
        before.append(len(alive))
        target = open_bench(*given)
        alive.add(target.model)
        return target

    monkeypatch.setattr(bench_turns, "open_bench", counting)
    yield before
    assert not alive, "all are freed in the end"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, list[int]]]:
    """Nothing runs: what would have been timed, and each takes a nanosecond more than the one before."""
    seen: list[tuple[str, str, list[int]]] = []

    def timed(target, test, cache, ids):
        seen.append((target.run.store.manifest.variant, f"{test.name} {cache.length}", ids))
        return len(seen)

    monkeypatch.setattr(bench_turns, "time_test", timed)
    return seen


def measuring(prompts=(5,), gens=(3,), depths=(0,), threads=(1,), repetitions=2, warmup=False) -> BenchRequest:
    return BenchRequest(prompts, gens, depths, threads, repetitions, warmup)


def rows_of(request: CompareRequest, folders: Home, options: RunOptions = CPU) -> list[CompareRow]:
    return [event for event in run_compare(request, options, folders) if isinstance(event, CompareRow)]


def quality_of(folders: Home, *models: str, against: str | None = None) -> QualityRequest:
    return QualityRequest(models, against, folders.data / "text.txt", 32)


def bytes_of(folders: Home, variant: str, context: int) -> int:
    """What all of it takes beside the interpreter."""
    store = ModelStore.open(folders.store("tiny", variant))
    needs = stored_bytes(store.manifest, store_config(store), torch.float16)
    return needs.trunk + context * needs.kv_token + needs.scratch + needs.n_records * needs.record


def test_models_take_turns_with_the_same_tokens(folders: Home, clock) -> None:
    rows_of(CompareRequest((Q4, BF16), measuring(repetitions=2, warmup=True)), folders)
    both = [(model, f"{test} 0") for model in ("q4", "bf16") for test in ("pp5", "tg3")]
    assert [(model, test) for model, test, _ in clock] == both * 3, "a warm-up and two rounds"
    ids = [ids for _, _, ids in clock]
    assert [len(each) for each in ids] == [5, 1, 5, 1] + [5, 3] * 4, "one token warms generation up"
    for start in (0, 4, 8):
        assert ids[start : start + 2] == ids[start + 2 : start + 4]
    assert ids[4] != ids[8], "another round, other tokens, which choose other experts"


def test_a_depth_is_filled_once(folders: Home, clock) -> None:
    rows = rows_of(CompareRequest((Q4, BF16), measuring(gens=(0,), depths=(0, 7))), folders)
    assert [test for _, test, _ in clock] == ["pp5 0"] * 4 + ["pp5 @ d7 7"] * 4
    assert [(row.label, row.test) for row in rows] == [
        (Q4, "pp5"), (Q4, "pp5 @ d7"), (BF16, "pp5"), (BF16, "pp5 @ d7"),
    ]  # fmt: skip


def test_ratios_are_of_one_round(folders: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand; the ratio of the medians would be 1.5."""
    times = iter([100, 200, 300, 100, 150, 150])
    monkeypatch.setattr(bench_turns, "time_test", lambda *_: next(times))
    base, other = rows_of(CompareRequest((Q4, BF16), measuring(gens=(0,), repetitions=3)), folders)
    assert other.samples_ts == tuple(5e9 / each for each in (200, 100, 150))
    assert (other.median_ts, other.min_ts, other.max_ts) == (5e9 / 150, 5e9 / 200, 5e9 / 100)
    assert base.median_ts == 5e9 / 150
    assert other.ratios == pytest.approx((0.5, 3, 1))
    assert (other.ratio, other.min_ratio, other.max_ratio) == pytest.approx((1, 0.5, 3))
    assert base.ratios == (1, 1, 1)
    assert (other.label, other.baseline, other.variant) == (BF16, Q4, "bf16")


def test_a_model_may_be_compared_with_itself(folders: Home, loads: list[int]) -> None:
    rows = rows_of(CompareRequest((Q4, Q4, BF16, "tiny"), measuring(gens=(0,))), folders)
    assert [row.label for row in rows] == [Q4, f"{Q4} #2", BF16, f"{Q4} #3"]
    assert loads == [0, 1, 2, 3], "each has a memory of its own"


def test_stores_of_one_name_are_told_apart(folders: Home, tmp_path: Path) -> None:
    copies = [str(shutil.copytree(folders.store("tiny", "q4"), tmp_path / name)) for name in ("one", "two")]
    assert prepare_compare(CompareRequest((*copies, BF16), measuring()), CPU, folders).labels == (*copies, BF16)


def test_what_does_not_fit_together_is_loaded_for_every_round(folders: Home, loads: list[int]) -> None:
    alone = [bytes_of(folders, variant, 5) for variant in ("q4", "bf16")]
    request = CompareRequest((Q4, BF16), measuring(repetitions=3))
    job = prepare_compare(request, replace(CPU, ram=BASE_BYTES + sum(alone)), folders)
    assert all(row.together for row in job.run() if isinstance(row, CompareRow))
    assert (loads, job.warnings) == ([0, 1], [])
    loads.clear()
    job = prepare_compare(request, replace(CPU, ram=BASE_BYTES + sum(alone) - 1), folders)
    rows = [event for event in job.run() if isinstance(event, CompareRow)]
    assert loads == [0] * 6
    assert not any(row.together for row in rows)
    assert {len(row.samples_ts) for row in rows} == {3}
    assert "the models do not fit in memory together: each is loaded again for every round" in job.warnings


def test_a_gpu_s_memory_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """50 and 40 bytes of VRAM; the process has a base of 10 and 5 more for each."""
    free = [100]
    monkeypatch.setattr(bench_turns, "probe", lambda _: SimpleNamespace(gpus=(Gpu("simulated", 1000, *free),)))

    def fit(vram: int | str | None, budget: int = 20) -> bool:
        options = RunOptions(device="cuda", vram=vram)
        plans = [SimpleNamespace(base_bytes=10, ram_bytes=15, vram_bytes=v, budget=budget) for v in (50, 40)]
        store = SimpleNamespace(folder=Path())
        return fit_together([SimpleNamespace(plan=plan, options=options, store=store) for plan in plans])

    assert [fit(None), fit(90), fit(89), fit("9%"), fit("8%")] == [True, True, False, True, False]
    assert not fit(None, budget=19)
    free[0] = 94  # of which the system keeps some
    assert not fit(None)


def test_loaded_is_told_before_anything_is_timed(folders: Home, clock) -> None:
    timed: list[int] = []
    job = prepare_compare(CompareRequest((Q4, BF16), measuring(warmup=True)), CPU, folders)
    for _ in job.run(lambda: timed.append(len(clock))):
        pass
    assert timed == [0]


def test_quality_is_that_of_quality(folders: Home) -> None:
    """Measured once for a model that comes twice."""
    quality = quality_of(folders, Q4, BF16, against=BF16)
    rows = rows_of(CompareRequest((Q4, BF16, Q4), measuring(), quality), folders)
    options = replace(CPU, threads=1)
    expected = [row for row in run_quality(quality, options, folders) if isinstance(row, QualityRow)]
    names = [BF16 if row.label == BF16 else Q4 for row in rows]
    assert names == [Q4, Q4, BF16, BF16, Q4, Q4]
    for name, row in zip(names, rows, strict=True):
        found = asdict(expected[name == BF16])
        assert {name: getattr(row, name) for name in OF_QUALITY} == {name: found[name] for name in OF_QUALITY}
    assert rows[0].mean_kl is not None
    assert rows[0].mean_kl > rows[2].mean_kl == 0


def test_without_quality_nothing_is_said_of_it(folders: Home) -> None:
    (row, *_) = rows_of(CompareRequest((Q4, BF16), measuring()), folders)
    assert {getattr(row, name) for name in OF_QUALITY} == {None}


def test_progress_names_model_and_test(folders: Home) -> None:
    events = run_compare(CompareRequest((Q4, BF16), measuring(gens=(0,), warmup=True)), CPU, folders)
    assert [(e.what, e.done, e.total) for e in events if isinstance(e, Running)] == [
        (f"loading {Q4}", 0, 0), (f"loading {BF16}", 0, 0), (f"{Q4}: pp5: warm-up", 0, 0),
        (f"{BF16}: pp5: warm-up", 0, 0), (f"{Q4}: pp5", 0, 2), (f"{BF16}: pp5", 0, 2), (f"{Q4}: pp5", 1, 2),
        (f"{BF16}: pp5", 1, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("models", "tests", "error", "says"),
    [
        ((Q4,), measuring(), UsageError, "two models or more"),
        ((Q4, ""), measuring(), UsageError, "'tiny:q4,' has an empty name"),
        ((Q4, BF16), measuring(threads=(1, 2)), UsageError, "one number of --threads"),
        ((Q4, "nobody"), measuring(), NotFoundError, "no model is called nobody"),
        ((Q4, "short"), measuring(prompts=(20,)), UsageError, "pp20 needs a context of 20 tokens and the model has 16"),
    ],
)
def test_refused_before_anything_is_loaded(
    folders: Home, loads: list[int], models: tuple[str, ...], tests: BenchRequest, error: type[MixlocalError], says: str
) -> None:
    with pytest.raises(error, match=says):
        rows_of(CompareRequest(models, tests), folders)
    assert loads == []


def test_so_is_a_text_in_chunks_too_long_for_one(folders: Home, loads: list[int]) -> None:
    quality = quality_of(folders, Q4, "short", against=Q4)
    with pytest.raises(UsageError, match="--ctx 32 is outside 1 to 16"):
        rows_of(CompareRequest((Q4, "short"), measuring(), quality), folders)
    assert loads == []
