"""The same work on ours and on a peer, in turns, and the medians of the ratios: Markdown on stdout.

    python tests/benchmarks/against_peer.py --model big-q4 --peer "peer-venv/bin/python llama_cpp_bench.py big.gguf"
        [--rounds 5] [--threads 2] [--prompt 512] [--new 64] [--busy]

The peer's command takes --prompt, --new and --threads and prints a line of JSON with prompt_tps and decode_ms_mean:
tokens per second of a prompt, and milliseconds per token of --new tokens after it. Ours is `mixlocal bench` with the
same numbers, in a process of its own, not warmed up either. --busy: a second pass of every round with another process
that keeps one core busy; the ratio of both passes says what a neighbour costs.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Speeds:
    """Tokens per second of prompt and decode."""

    prompt: float
    decode: float


def ours(args: argparse.Namespace) -> Speeds:
    base = [sys.executable, "-m", "mixlocal", "-q", "bench", "-m", args.model, "--threads", str(args.threads)]
    base += ["-r", "1", "--no-warmup", "-o", "json"]
    prompt = run([*base, "-p", str(args.prompt), "-n", "0"])
    decode = run([*base, "-p", "0", "-n", str(args.new), "-d", str(args.prompt)])
    return Speeds(json.loads(prompt)[0]["avg_ts"], json.loads(decode)[0]["avg_ts"])


def theirs(args: argparse.Namespace) -> Speeds:
    counts = ["--prompt", str(args.prompt), "--new", str(args.new), "--threads", str(args.threads)]
    answer = json.loads(run([*shlex.split(args.peer), *counts]).strip().splitlines()[-1])
    return Speeds(answer["prompt_tps"], 1000 / answer["decode_ms_mean"])


def run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process:
            process.kill()
            process.wait()


def measure(args: argparse.Namespace, busy: bool) -> tuple[Speeds, Speeds]:
    with neighbour(busy):
        return ours(args), theirs(args)


def print_table(alone: list[tuple[Speeds, Speeds]], busy: list[tuple[Speeds, Speeds]]) -> None:
    print("| | ours, tok/s | peer, tok/s | ours / peer: median (lowest, highest) |\n|---|---|---|---|")
    for title, pairs in (("", alone), (", one core busy", busy)):
        for part in ("prompt", "decode") if pairs else ():
            mine, peer = ([getattr(pair[side], part) for pair in pairs] for side in (0, 1))
            ratios = [m / p for m, p in zip(mine, peer, strict=True)]
            shown = f"{median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f})"
            print(f"| {part}{title} | {median(mine):.1f} | {median(peer):.1f} | {shown} |")
    for part in ("prompt", "decode") if busy else ():
        costs = [
            median(getattr(a[side], part) / getattr(b[side], part) for a, b in zip(alone, busy, strict=True))
            for side in (0, 1)
        ]
        print(f"\nA busy core makes {part} {costs[0]:.2f} times slower for ours, {costs[1]:.2f} times for the peer.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="name or folder, as for mixlocal bench -m")
    parser.add_argument("--peer", required=True, help="command of the peer's benchmark on the same weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--busy", action="store_true")
    args = parser.parse_args()
    alone, busy = [], []
    for done in range(args.rounds):
        print(f"round {done + 1} of {args.rounds}", file=sys.stderr)
        alone.append(measure(args, False))
        if args.busy:
            busy.append(measure(args, True))
    print_table(alone, busy)


if __name__ == "__main__":
    main()
