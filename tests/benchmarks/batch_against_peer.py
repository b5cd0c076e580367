"""Many sequences at once on ours and on a peer, in turns, and the medians of the ratios: Markdown on stdout.

    python tests/benchmarks/batch_against_peer.py --model big-q4 --peer "peer-venv/bin/python llama_cpp_parallel.py
        big.gguf" [--sequences 1 4 16] [--rounds 5] [--threads 2] [--prompt 32] [--new 32]

The peer's command takes --sequences N, --prompt, --new and --threads and prints a line of JSON with tokens_per_s: of a
token for each sequence a step. Ours is `Scheduler`, each sequence's likeliest token chosen and fed to it, in a process
of its own, after the prompts are read, as theirs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from statistics import median

from mixlocal.app.budgets import RunOptions
from mixlocal.app.installed import find_store
from mixlocal.app.model_run import ModelRun
from mixlocal.engine.generate import Token
from mixlocal.engine.params import SamplingParams
from mixlocal.engine.sampling import Sampler
from mixlocal.engine.scheduler import Generation, Scheduler
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import home


def decode(args: argparse.Namespace, count: int) -> float:
    """Tokens per second of `count` sequences together."""
    context = args.prompt + args.new + 2
    options = RunOptions(context=context, threads=args.threads, sequences=count, ram=args.ram)
    run = ModelRun(ModelStore.open(find_store(args.model, home())), options)
    scheduler = Scheduler(run.load(), run.new_pool(), count)
    print(f"{run.plan.ram_slots} of {run.plan.n_records} experts in memory", file=sys.stderr)
    vocab = run.config.vocab_size
    for s in range(count):
        prompt = [(17 + 7919 * p + 104729 * s) % (vocab - 100) + 50 for p in range(args.prompt)]
        scheduler.add(Generation(prompt, Sampler(SamplingParams(temperature=0, max_tokens=args.new + 1)), (), context))
    while any(not generation.generated for generation in scheduler.running):
        scheduler.step()
    tokens, start = 0, time.perf_counter()
    while scheduler.busy:
        tokens += sum(isinstance(event.what, Token) for event in scheduler.step())
    return tokens / (time.perf_counter() - start)


def ours(args: argparse.Namespace, count: int) -> float:
    same = ["--model", args.model, "--threads", args.threads, "--prompt", args.prompt, "--new", args.new]
    ram = ["--ram", args.ram] if args.ram else []
    return float(run([sys.executable, __file__, *map(str, same), *ram, "--alone", str(count)]))


def theirs(args: argparse.Namespace, count: int) -> float:
    counts = ["--sequences", count, "--threads", args.threads, "--prompt", args.prompt, "--new", args.new]
    answer: float = json.loads(run([*shlex.split(args.peer), *map(str, counts)]).splitlines()[-1])["tokens_per_s"]
    return answer


def run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--peer")
    parser.add_argument("--ram")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(decode(args, args.alone))
        return
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in args.sequences}
    for _ in range(args.rounds):
        for count in args.sequences:
            found[count].append((ours(args, count), theirs(args, count) if args.peer else 0.0))
    print("| sequences | ours, tok/s | peer, tok/s | ours / peer: median (lowest, highest) |\n|---|---|---|---|")
    for count, pairs in found.items():
        mine, peers = zip(*pairs, strict=True)
        ratios = [a / b for a, b in pairs if b] or [0.0]
        shown = f"{median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
        print(f"| {count} | {median(mine):.1f} | {median(peers):.1f} | {shown} |")


if __name__ == "__main__":
    main()
