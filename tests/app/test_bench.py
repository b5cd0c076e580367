"""What a benchmark measures, and what it says of it."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev

import pytest
import tiny
import torch
from stores import quantized

from mixlocal.app import bench, bench_cases, bench_kernels, bench_weights
from mixlocal.app.bench import BenchRow, describe_model, open_bench, run_bench
from mixlocal.app.bench_kernels import KernelRequest, KernelRow, run_kernels
from mixlocal.app.bench_request import BenchRequest
from mixlocal.app.budgets import RunOptions
from mixlocal.app.footprint import stored_bytes, weight_bytes_per_token
from mixlocal.app.measure import Running, sample_bandwidth
from mixlocal.app.model_run import ModelRun, store_config
from mixlocal.errors import MemoryBudgetError, UsageError
from mixlocal.experts.plan import BASE_BYTES
from mixlocal.kernels.isa import native_isas
from mixlocal.model.transformer import Transformer
from mixlocal.quant.format import KINDS, QuantSpec, QuantTensor
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import home

READ = 1e9


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bench")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=2048)
    return quantized(checkpoint, root / "models" / "tiny" / "q4").folder


@pytest.fixture(autouse=True)
def _known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "sample_bandwidth", lambda: [READ])
    monkeypatch.setattr(bench_kernels, "sample_bandwidth", lambda: [READ])


def request_of(prompts=(5,), gens=(3,), depths=(0,), threads=(1,), repetitions=2, warmup=True) -> BenchRequest:
    return BenchRequest(prompts, gens, depths, threads, repetitions, warmup)


def rows_of(store: Path, request: BenchRequest, options: RunOptions = RunOptions()) -> list[BenchRow]:  # noqa: B008
    target = open_bench(str(store), request, options, home())
    return [event for event in run_bench(target, request) if isinstance(event, BenchRow)]


def test_every_combination_is_one_row(store: Path) -> None:
    rows = rows_of(store, request_of((4, 6), (2, 3), (0, 7), (1, 2)))
    assert [(row.n_depth, row.n_threads) for row in rows[::4]] == list(product((0, 7), (1, 2)))
    assert [row.test for row in rows[:4]] == ["pp4", "pp6", "tg2", "tg3"]
    assert [row.test for row in rows[-4:]] == ["pp4 @ d7", "pp6 @ d7", "tg2 @ d7", "tg3 @ d7"]
    assert len(rows) == 16


def test_averages_are_those_of_the_samples(store: Path) -> None:
    for row in rows_of(store, request_of(repetitions=4)):
        tokens = row.n_prompt + row.n_gen
        assert len(row.samples_ns) == 4
        assert row.samples_ts == tuple(tokens * 1e9 / ns for ns in row.samples_ns)
        assert (row.avg_ns, row.avg_ts) == (fmean(row.samples_ns), fmean(row.samples_ts))
        assert (row.stddev_ns, row.stddev_ts) == (stdev(row.samples_ns), stdev(row.samples_ts))


def test_one_repetition_does_not_spread(store: Path) -> None:
    assert {(row.stddev_ns, row.stddev_ts) for row in rows_of(store, request_of(repetitions=1))} == {(0.0, 0.0)}


def test_share_of_the_bandwidth_is_of_generation_only(store: Path) -> None:
    prompt, generation = rows_of(store, request_of())
    assert (prompt.bytes_per_token, prompt.read_bandwidth, prompt.bandwidth_share) == (None, None, None)
    assert generation.read_bandwidth == READ
    assert generation.bytes_per_token is not None
    assert generation.bandwidth_share == generation.bytes_per_token * generation.avg_ts / READ


LAYER = (64 * 64 + 2 * 32 * 64 + 64 * 64) * 2 + 2 * 64 * 4 + 4 * 64 * 4  # q, k, v, o; two norms; router
HEAD, NORM = 260 * 64 * 2, 64 * 4
EXPERT = 3 * 64 * 96 // 2 + (96 + 96 + 2 * 64) * 2  # nf4 codes, a half per block of 64
LAYER_8 = (64 * 64 + 2 * 32 * 64 + 64 * 64) + (64 + 32 + 32 + 64) * 4 + 2 * 64 * 4 + 4 * 64 * 4
HEAD_8 = 260 * 64 + 260 * 4


@pytest.mark.parametrize(
    ("tied", "attention", "top_k", "expected"),
    [
        (False, "bf16", 2, 2 * LAYER + NORM + HEAD + 2 * 2 * EXPERT),
        (True, "bf16", 2, 2 * LAYER + NORM + HEAD + 2 * 2 * EXPERT),
        (False, "bf16", 1, 2 * LAYER + NORM + HEAD + 2 * 1 * EXPERT),
        (False, "int8", 2, 2 * LAYER_8 + NORM + HEAD_8 + 2 * 2 * EXPERT),
    ],
)
def test_bytes_per_token_by_hand(tmp_path: Path, tied: bool, attention: str, top_k: int, expected: int) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=tied)
    store = quantized(checkpoint, tmp_path / "store", attention=attention)
    target = open_bench(str(store.folder), request_of(), RunOptions(), home())
    assert weight_bytes_per_token(target.run.config, store.manifest.recipe, top_k) == expected
    if top_k == target.model.top_k:
        assert describe_model(target).bytes_per_token == expected


def test_experts_found_in_memory_and_read_from_disk(store: Path) -> None:
    everything = rows_of(store, request_of())
    assert all(row.ram_hits > 0 == row.disk_hits == row.bytes_read for row in everything)
    stride = open_bench(str(store), request_of(), RunOptions(), home()).run.store.manifest.stride
    opened = ModelStore.open(store)
    needs = stored_bytes(opened.manifest, store_config(opened), torch.float16)
    smallest = BASE_BYTES + needs.trunk + 5 * needs.kv_token + needs.scratch + needs.n_experts * needs.record
    for row in rows_of(store, request_of(), RunOptions(ram=smallest)):
        assert row.bytes_read == row.disk_hits * stride > 0


def test_what_the_model_computes(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is filled once and is back at its depth before every repetition; the same tokens come in each run."""
    seen: list[tuple[int, list[int]]] = []
    forward = Transformer.forward

    def recording(self, ids, cache, **given):
        seen.append((cache.length, ids.tolist()))
        return forward(self, ids, cache, **given)

    monkeypatch.setattr(Transformer, "forward", recording)
    rows_of(store, request_of(depths=(7,)))
    prompt, generation = [(7, 5)] * 3, [(7, 1)] + [(7, 1), (8, 1), (9, 1)] * 2
    assert [(length, len(ids)) for length, ids in seen] == [(0, 7), *prompt, *generation]
    assert all(0 <= token < 260 for _, ids in seen for token in ids)
    first, seen[:] = list(seen), []
    rows_of(store, request_of(depths=(7,)))
    assert seen == first
    seen.clear()
    rows_of(store, request_of(warmup=False))
    assert [(length, len(ids)) for length, ids in seen] == [(0, 5)] * 2 + [(0, 1), (1, 1), (2, 1)] * 2


def test_progress_names_the_test(store: Path) -> None:
    request = request_of((600,), (2,), (600,))
    target = open_bench(str(store), request, RunOptions(), home())
    running = [event for event in run_bench(target, request) if isinstance(event, Running)]
    assert [(r.what, r.done, r.total) for r in running] == [
        ("filling the cache to d600", 512, 600), ("filling the cache to d600", 600, 600),
        ("pp600 @ d600: warm-up", 0, 2), ("pp600 @ d600", 0, 2), ("pp600 @ d600", 1, 2),
        ("tg2 @ d600: warm-up", 0, 2), ("tg2 @ d600", 0, 2), ("tg2 @ d600", 1, 2),
    ]  # fmt: skip


def test_what_does_not_fit_is_refused_before_loading(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRun, "load", lambda *_: pytest.fail("loaded although a test cannot fit"))
    with pytest.raises(UsageError, match="tg1000 @ d1049 needs a context of 2049 tokens and the model has 2048"):
        open_bench(str(store), request_of((5,), (1000,), (0, 1049)), RunOptions(), home())


@pytest.mark.parametrize(
    "given",
    [{"prompts": (0,), "gens": (0,)}, {"prompts": (-1,)}, {"depths": (-1,)}, {"threads": (0,)}, {"repetitions": 0}],
)
def test_a_request_that_makes_no_sense(given: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        request_of(**given)


def test_a_bandwidth_is_measured() -> None:
    assert all(rate > 0 for rate in sample_bandwidth())


def test_without_compiled_kernels_there_is_no_bandwidth(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLOCAL_ISA", "reference")
    monkeypatch.setattr(bench, "sample_bandwidth", sample_bandwidth)
    _, generation = rows_of(store, request_of())
    assert (generation.backend, generation.bandwidth_share) == ("reference", None)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cases, "SHAPES", ((96, 128), (64, 64)))
    monkeypatch.setattr(bench_cases, "SMALL_SHAPE", (64, 64))
    monkeypatch.setattr(bench_cases, "MOE_HIDDEN", 128)
    monkeypatch.setattr(bench_cases, "MOE_DIM", 64)
    monkeypatch.setattr(bench_cases, "SAMPLE_BYTES", 1 << 14)
    monkeypatch.setattr(bench_weights, "ROTATION_BYTES", 1 << 16)


def kernel_rows(quick: bool) -> list[KernelRow]:
    return [event for event in run_kernels(KernelRequest((2,), quick)) if isinstance(event, KernelRow)]


@pytest.mark.usefixtures("_small")
def test_every_kernel_of_the_machine_is_timed() -> None:
    rows = kernel_rows(quick=False)
    names = [f"cpu-{isa}" for isa in native_isas()]
    linear = {(r.backend, r.format, (r.rows, r.columns), r.n_tokens) for r in rows if r.test == "linear"}
    compiled = set(product(names, KINDS, ((96, 128), (64, 64)), (1, 4, 16, 512)))
    assert linear == compiled | {("reference", kind, (64, 64), 1) for kind in KINDS}
    assert [row.backend for row in rows if row.test == "moe"] == names
    assert [row.test for row in rows].index("read") == len(rows) - 1


@pytest.mark.usefixtures("_small")
def test_quick_is_a_part_of_it() -> None:
    rows = kernel_rows(quick=True)
    assert {row.n_tokens for row in rows} == ({1, 512, None} if native_isas() else {1, None})
    assert {row.backend for row in rows} == {f"cpu-{isa}" for isa in native_isas()} | {"reference", None}


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("isa", [*native_isas(), "reference"])
def test_one_instruction_set_may_be_asked_for(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLOCAL_ISA", isa)
    names = {row.backend for row in kernel_rows(quick=True)} - {None}
    assert names == {"reference"} | ({f"cpu-{isa}"} - {"cpu-reference"})


@pytest.mark.usefixtures("_small")
def test_rates_follow_from_the_samples() -> None:
    for row in kernel_rows(quick=True):
        assert row.median_ns == median(row.samples_ns)
        if row.test == "read":
            assert row.bytes_per_second == row.read_bandwidth == READ
            continue
        assert row.bytes_per_second == row.n_bytes * 1e9 / row.median_ns
        assert row.bandwidth_share == (None if row.n_tokens == 512 else row.bytes_per_second / READ)
        expected = 2 * 3 * 128 * 64 * 2 if row.test == "moe" else 2 * row.rows * row.columns * row.n_tokens
        assert row.flop_per_second == pytest.approx(expected * 1e9 / row.median_ns)
    moe = [row for row in kernel_rows(quick=True) if row.test == "moe"]
    assert {row.n_bytes for row in moe} <= {2 * (3 * 128 * 64 // 2 + (2 * 128 + 2 * 64) * 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_valid_and_many(kind: str) -> None:
    copies = bench_weights.weight_copies(QuantSpec(kind), (1536, 576))
    assert sum(copy.nbytes for copy in copies) >= 1 << 28
    x = torch.ones(1, 576)
    outputs = [bench_cases.ReferenceKernels().linear(x, copy) for copy in (copies[0], copies[-1])]
    assert all(bool(out.isfinite().all()) for out in outputs)
    first = [copy.codes if isinstance(copy, QuantTensor) else copy for copy in copies]
    assert len({codes.data_ptr() for codes in first}) == len(copies)


def test_kernels_need_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlocal.app.hardware import probe

    monkeypatch.setattr(bench_kernels, "NEEDED_BYTES", 1 << 60)
    with pytest.raises(MemoryBudgetError, match="timing the kernels takes"):
        bench_kernels.check_memory(probe(Path("/")))
