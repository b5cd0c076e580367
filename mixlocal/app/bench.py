"""How fast a model reads a prompt and generates, measured as llama-bench measures it (llama.cpp, tools/llama-bench).

A test is "pp512" (512 prompt tokens), "tg128" (128 tokens one by one) or either "@ d2048", behind 2048 tokens in the KV
cache. Token ids are given beforehand, so neither tokenizing nor sampling is in the times.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, stdev

from mixlocal.app.bench_request import BenchRequest, BenchTest
from mixlocal.app.budgets import RunOptions
from mixlocal.app.footprint import weight_bytes_per_token
from mixlocal.app.installed import find_store
from mixlocal.app.measure import Running, sample_bandwidth
from mixlocal.app.model_run import ModelRun, store_config
from mixlocal.app.parameters import total_and_active
from mixlocal.engine.generate import decode_step, prefill
from mixlocal.experts.runtime import ExpertCounts
from mixlocal.kernels import select
from mixlocal.kernels.isa import set_threads
from mixlocal.model.kv_cache import KVCache
from mixlocal.model.transformer import Transformer
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home


@dataclass(frozen=True, slots=True)
class BenchModel:
    """What the rows of one model share. run: how it differs from the others of the benchmark. model_size: bytes on
    disk. bytes_per_token: see `weight_bytes_per_token`."""

    model: str
    variant: str
    run: str
    model_size: int
    model_n_params: int
    backend: str
    bytes_per_token: int
    ram_budget: int
    ram_slots: int
    n_records: int


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One test: llama-bench's fields, and ours.

    *_ns are nanoseconds of one repetition, *_ts tokens per second; avg_ts is the mean of samples_ts and stddev the
    sample's, 0 for a single repetition. ram_budget: bytes; ram_slots of n_records experts stay in memory. gpu_hits to
    prefetch_recall: see `ExpertCounts`, in all repetitions. For generation only: bytes_per_token;
    read_bandwidth, bytes/s, the median of samples taken between the repetitions; bandwidth_share = bytes_per_token *
    avg_ts / read_bandwidth, which is above 1 where weights come from a cache. The last two need compiled kernels.
    """

    model: str
    variant: str
    run: str
    model_size: int
    model_n_params: int
    backend: str
    n_threads: int
    test: str
    n_prompt: int
    n_gen: int
    n_depth: int
    avg_ns: float
    stddev_ns: float
    avg_ts: float
    stddev_ts: float
    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]
    ram_budget: int
    ram_slots: int
    n_records: int
    gpu_hits: int
    ram_hits: int
    disk_hits: int
    bytes_read: int
    stall_s: float
    prefetch_recall: float | None
    bytes_per_token: int | None
    read_bandwidth: float | None
    bandwidth_share: float | None


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """A loaded model; no tokenizer is needed. label: what tells it from the others of one benchmark."""

    run: ModelRun
    model: Transformer
    label: str = ""


def prepare_bench(model: str, request: BenchRequest, options: RunOptions, folders: Home) -> ModelRun:
    """`model` as `options` says, with room for the longest test and the first of its threads; nothing is loaded.

    Raises `NotFoundError` if it is not installed, `UsageError` if a test does not fit its context.
    """
    store = ModelStore.open(find_store(model, folders))
    request.check_context(store_config(store).max_context)
    return ModelRun(store, replace(options, context=request.context, threads=request.threads[0]), folders)


def open_bench(
    model: str, request: BenchRequest, options: RunOptions, folders: Home, label: str = ""
) -> BenchTarget:
    """Load what `prepare_bench` prepares."""
    run = prepare_bench(model, request, options, folders)
    return BenchTarget(run, run.load(), label)


def run_bench(target: BenchTarget, request: BenchRequest) -> Iterator[Running | BenchRow]:
    """Measure every test of `request`; a row follows its last repetition."""
    model, tests = describe_model(target), request.tests()
    for depth in dict.fromkeys(request.n_depths):
        here = [test for test in tests if test.n_depth == depth]
        cache = target.run.new_cache(depth + max(test.n_tokens for test in here))
        set_threads(max(request.threads))
        for progress, _ in prefill(target.model, token_ids(target, depth, "depth"), cache):
            yield Running(f"filling the cache to d{depth}", progress.done, progress.total)
        for test in here:
            yield from _run_test(target, request, test, cache, model)


def describe_model(target: BenchTarget) -> BenchModel:
    manifest, config = target.run.store.manifest, target.run.config
    return BenchModel(
        manifest.name, manifest.variant, target.label, manifest.nbytes, total_and_active(config)[0], select("cpu").name,
        weight_bytes_per_token(config, manifest.recipe, target.model.top_k),
        target.run.plan.budget, target.run.plan.ram_slots, target.run.plan.n_records,
    )  # fmt: skip


def _run_test(
    target: BenchTarget, request: BenchRequest, test: BenchTest, cache: KVCache, model: BenchModel
) -> Iterator[Running | BenchRow]:
    set_threads(test.n_threads)
    if request.warmup:
        yield Running(f"{test.name}: warm-up", 0, request.repetitions)
        time_test(target, test, cache, token_ids(target, test.n_prompt or 1, "warm-up"))
    samples: list[int] = []
    bandwidths: list[float] = []
    counts = target.model.experts.counts
    before = replace(counts)
    for repetition in range(request.repetitions):
        yield Running(test.name, repetition, request.repetitions)
        bandwidths += sample_bandwidth() if test.n_gen else []
        samples.append(time_test(target, test, cache, token_ids(target, test.n_tokens, str(repetition))))
    yield _row(model, test, samples, bandwidths, counts.since(before))


def time_test(target: BenchTarget, test: BenchTest, cache: KVCache, ids: list[int]) -> int:
    """Nanoseconds that `ids` take; the cache is left as it was."""
    start = time.perf_counter_ns()
    if test.n_prompt:
        for _ in prefill(target.model, ids, cache):
            pass
    else:
        for token in ids:
            decode_step(target.model, token, cache)
    elapsed = time.perf_counter_ns() - start
    cache.truncate(test.n_depth)
    return elapsed


def token_ids(target: BenchTarget, count: int, seed: str) -> list[int]:
    """Random tokens, the same ones for a seed; different ones per repetition, as each uses other experts."""
    return random.Random(seed).choices(range(target.run.config.vocab_size), k=count)


def _row(
    model: BenchModel, test: BenchTest, samples: list[int], bandwidths: list[float], experts: ExpertCounts
) -> BenchRow:
    speeds = [test.n_tokens * 1e9 / sample for sample in samples]
    read = median(bandwidths) if bandwidths else None
    return BenchRow(
        model.model, model.variant, model.run, model.model_size, model.model_n_params, model.backend, test.n_threads,
        test.name, test.n_prompt, test.n_gen, test.n_depth,
        avg_ns=fmean(samples), stddev_ns=_spread(samples), avg_ts=fmean(speeds), stddev_ts=_spread(speeds),
        samples_ns=tuple(samples), samples_ts=tuple(speeds),
        ram_budget=model.ram_budget, ram_slots=model.ram_slots, n_records=model.n_records,
        gpu_hits=experts.gpu_hits, ram_hits=experts.ram_hits, disk_hits=experts.disk_hits,
        bytes_read=experts.bytes_read, stall_s=experts.stall_s, prefetch_recall=experts.prefetch_recall,
        bytes_per_token=model.bytes_per_token if test.n_gen else None, read_bandwidth=read,
        bandwidth_share=model.bytes_per_token * fmean(speeds) / read if read else None,
    )  # fmt: skip


def _spread(samples: Sequence[float]) -> float:
    return stdev(samples) if len(samples) > 1 else 0.0
