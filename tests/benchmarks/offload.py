"""How well a part of the experts in memory does: hits by policy, bytes read, overlap, and what `plan` says beforehand.

    python tests/benchmarks/offload.py smolmix:q4 [--shares 0.25 0.5 0.75] [--tokens 240] [--rounds 6]

Decodes prose token by token, teacher-forced, with everything resident and with each share of the experts, in turns. The
readers pass by the page cache, so what is read comes from the disk. Columns:

hits aged, LRU, Belady: of caches of that size on the routing that was recorded, by policy; hits: of the real run.
no overlap: tokens/s if reading and arithmetic took turns, 1 / (bytes read / disk speed + time with all resident), of
the same rounds; the disk's speed is that of reads of one record one after the other, measured between the rounds.
plan: the tokens/s that `mixlocal plan` computes before anything is loaded, with what the profile knew by then.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch

from mixlocal.app.budgets import RunOptions
from mixlocal.app.installed import find_store
from mixlocal.app.model_run import ModelRun, open_experts
from mixlocal.app.planning import Subject, measure_speeds
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.engine.generate import decode_step, prefill
from mixlocal.errors import NotFoundError
from mixlocal.experts.forecast import forecast, look_up
from mixlocal.experts.policies import AgedFrequency, Belady, LeastRecentlyUsed, Policy
from mixlocal.experts.profile import learn
from mixlocal.experts.residency import Residency
from mixlocal.experts.runtime import ExpertCounts
from mixlocal.experts.trace import RoutedStep, RoutingTrace, hit_rate
from mixlocal.kernels import select
from mixlocal.model.kv_cache import KVCache
from mixlocal.model.load import load_trunk
from mixlocal.model.transformer import Transformer
from mixlocal.store.disk_speed import record_seconds
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import home

PROSE = Path(__file__).parents[2] / "mixlocal" / "data" / "evaluation.txt"
PROMPT = 128


@dataclass
class Setup:
    """One way to hold the experts; seconds and counts of each round."""

    share: float
    model: Transformer
    cache: KVCache
    expected: float | None
    seconds: list[float] = field(default_factory=list)
    counts: list[ExpertCounts] = field(default_factory=list)


def prose_ids(store: ModelStore, count: int) -> list[int]:
    """Tokens of prose; of a model without a tokenizer, its own random ones."""
    try:
        ids = load_tokenizer(store.folder).encode(PROSE.read_text())
    except NotFoundError:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 32000, (count,), generator=generator).tolist()
    assert len(ids) >= count, f"the text has {len(ids)} tokens"
    return ids[:count]


def open_setups(run: ModelRun, ids: list[int], shares: list[float], warm: RoutingTrace | None) -> list[Setup]:
    store, kernels = run.store, select("cpu")
    subject = Subject(store.manifest.name, store.manifest.variant, run.config, store.manifest.recipe, store)
    profile = learn(warm, None) if warm is not None else None
    setups = []
    for share in [1.0, *shares]:
        plan = replace(run.plan, ram_slots=round(share * run.plan.n_records), direct_io=True)
        hits = profile.expected_hits(plan.share) if profile else None
        look = look_up(plan, run.config.n_layers, run.config.router.top_k, hits)
        expected = forecast(look, measure_speeds(subject, plan, 1)[0])
        experts = open_experts(store, plan, profile)
        model = Transformer(run.config, load_trunk(store, run.config), experts, kernels)
        cache = run.new_cache(len(ids))
        for _ in prefill(model, ids[:PROMPT], cache):
            pass
        setups.append(Setup(share, model, cache, expected.tokens_per_s if expected else None))
    return setups


def measure(setups: list[Setup], store: ModelStore, ids: list[int], rounds: int) -> list[float]:
    """Seconds of one record's read, measured between the setups."""
    path, each, reads = store.folder / EXPERTS_FILE, (len(ids) - PROMPT) // rounds, []
    for number in range(rounds):
        part = ids[PROMPT + number * each :][:each]
        for setup in setups:
            before = replace(setup.model.experts.counts)
            start = time.perf_counter()
            for token in part:
                decode_step(setup.model, token, setup.cache)
            setup.seconds.append((time.perf_counter() - start) / each)
            setup.counts.append(setup.model.experts.counts.since(before))
            seconds = record_seconds(path, store.manifest.stride, direct=True)
            assert seconds is not None
            reads.append(seconds)
    return reads


def policies(run: ModelRun, steps: list[RoutedStep]) -> dict[str, Policy]:
    n_layers, n_experts = run.config.n_layers, run.config.router.n_experts
    return {
        "aged": AgedFrequency(n_layers, n_experts),
        "LRU": LeastRecentlyUsed(n_layers, n_experts),
        "Belady": Belady(n_layers, n_experts, [(step.layer, step.counts.nonzero()[0]) for step in steps]),
    }


def simulated(run: ModelRun, steps: list[RoutedStep], share: float) -> list[float]:
    n_layers, n_experts, found = run.config.n_layers, run.config.router.n_experts, []
    for name, policy in policies(run, steps).items():
        slots = round(share * n_layers * n_experts)
        found.append(hit_rate(steps, Residency(n_layers, n_experts, slots, policy, floor=name == "aged"), policy))
    return found


def print_table(run: ModelRun, setups: list[Setup], steps: list[RoutedStep], reads: list[float], each: int) -> None:
    stride, resident = run.plan.record_bytes, setups[0]
    print(f"records of {stride / 1e6:.1f} MB, {stride / median(reads) / 1e6:.0f} MB/s (median of {len(reads)}), ")
    print(f"all resident: {1 / median(resident.seconds):.1f} tokens/s; plan said {resident.expected or 0:.1f}\n")
    print("| share | aged | LRU | Belady | hits | MB/token | tok/s | no overlap | ratio | recall | plan | error |")
    print(f"|{'---|' * 12}")
    for setup in setups[1:]:
        total = ExpertCounts()
        for counts in setup.counts:
            total = counts.since(ExpertCounts(*(-getattr(total, name) for name in ExpertCounts.__slots__)))
        ratios, alone = [], []
        for index, (seconds, counts) in enumerate(zip(setup.seconds, setup.counts, strict=True)):
            near = reads[index * len(setups) : (index + 1) * len(setups)]
            turns = counts.reads / each * median(near) + resident.seconds[index]
            alone.append(1 / turns)
            ratios.append(turns / seconds)
        speed = 1 / median(setup.seconds)
        cells = [
            f"{setup.share:.2f}", *(f"{100 * hits:.1f} %" for hits in simulated(run, steps, setup.share)),
            f"{100 * total.ram_hits / total.looked_up:.1f} %", f"{total.bytes_read / each / len(ratios) / 1e6:.1f}",
            f"{speed:.2f}", f"{median(alone):.2f}", f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{100 * total.prefetch_recall:.0f} %" if total.prefetch_recall is not None else "-",
            f"{setup.expected or 0:.2f}", f"{100 * ((setup.expected or 0) / speed - 1):+.0f} %",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--tokens", type=int, default=240)
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    store = ModelStore.open(find_store(args.model, home()))
    ids = prose_ids(store, PROMPT + 2 * args.tokens)
    run = ModelRun(store, RunOptions(context=len(ids)))
    warm = run.load()  # the first half of the text teaches the profile and is not measured
    cache = run.new_cache(len(ids))
    for token in ids[: args.tokens]:
        decode_step(warm, token, cache)
    setups = open_setups(run, ids[args.tokens :], args.shares, warm.experts.trace)
    recorder = RoutingTrace(run.config.n_layers, run.config.router.n_experts, len(ids))
    resident = setups[0].model.experts
    resident.trace = recorder
    reads = measure(setups, store, ids[args.tokens :], args.rounds)
    print_table(run, setups, recorder.steps(), reads, args.tokens // args.rounds)


if __name__ == "__main__":
    main()
