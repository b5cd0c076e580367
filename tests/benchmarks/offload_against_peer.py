"""Decoding when only some of the experts fit in memory, ours and llama.cpp's in turns: Markdown on stdout.

    python tests/benchmarks/offload_against_peer.py --model big-q4 --gguf big.gguf --peer-python peer-venv/bin/python
        [--shares 0.25 0.5 0.75] [--rounds 3] [--threads 2] [--prompt 128] [--new 128] [--text FILE] [--margin 16]

Either reads the first --prompt tokens of a text, then is given its next --new tokens one by one, which are timed: real
prose, so that experts are chosen as they are in use. Each run is a fresh process in a memory cgroup of its own (which
needs root), and starts with nothing of its model in the page cache. One that had to share the cores is repeated, up to
5 times.

The number of experts that fit is the same for both. Ours is what --ram gives; its cgroup's limit is the anonymous
memory that this takes and --margin, so that the page cache is no second cache of experts. llama.cpp maps its file and
lets the page cache keep what fits: its limit is the anonymous memory it takes beside its weights, the weights that are
no experts, the bytes of that many experts, and --margin. Anonymous figures are peaks of a run without limit before the
first round, which also leaves the libraries in memory: they count to neither.

The peer's Python needs llama-cpp-python. Its weights stay in the file and are not repacked, which would copy them all.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

CGROUP = Path("/sys/fs/cgroup")
V1 = (CGROUP / "memory" / "memory.limit_in_bytes").exists()
MB = 1_000_000
QUIET = 0.1  # cores that other programs may take from a run: llama.cpp's threads wait for each other at every step
TRIES = 3


@dataclass(frozen=True)
class Job:
    """What a child does. ids: JSON file of token ids. ram: --ram of ours in bytes. limit: of the cgroup, 0 for none."""

    side: str
    python: str
    model: str
    ids: str
    prompt: int
    threads: int
    ram: int = 0
    limit: int = 0


@dataclass(frozen=True)
class Result:
    """Of the --new tokens, speed: tokens/s; disk: bytes a token that were asked of storage, by reading or by faults;
    taken: cores that other programs took from it. In bytes, rss: the peak of resident memory; anonymous: of what
    no file backs, without a limit. Of ours alone, hits: share of experts found in memory; slots: how many fit."""

    speed: float
    disk: float
    taken: float
    rss: int
    anonymous: int
    hits: float = 0.0
    slots: int = 0


@dataclass(frozen=True)
class Case:
    """One share of experts that fit, what each side is to do, and how their limits came about."""

    share: float
    ours: Job
    theirs: Job
    note: str


def ours(job: Job, ids: list[int], limit: Callable[[], None]) -> Result:
    from mixlocal import Session
    from mixlocal.engine.generate import decode_step, prefill
    from mixlocal.store.paths import home

    with (
        tempfile.TemporaryDirectory() as empty,  # a home where nothing was learnt from this text
        past_the_page_cache(),  # as a plan would have it that knew of the limit
        Session.open(
            job.model, context=len(ids), threads=job.threads, ram=job.ram, folders=home(Path(empty))
        ) as session,
    ):
        limit()  # not before: it would count for the plan
        gc.collect()
        gc.freeze()  # as the command does
        cache, counts = session.run.new_cache(len(ids)), session.model.experts.counts
        with anonymous_peak(not job.limit) as peak:
            for _ in prefill(session.model, ids[: job.prompt], cache):
                pass
            hits, reads = counts.ram_hits, counts.disk_hits
            times = timed(ids[job.prompt :], lambda token: decode_step(session.model, token, cache))
        hits, reads = counts.ram_hits - hits, counts.disk_hits - reads
        return Result(*times, status("VmHWM"), max(peak), hits / (hits + reads), session.run.plan.ram_slots)


@contextmanager
def past_the_page_cache() -> Iterator[None]:
    from mixlocal.app import model_run

    plan_run = model_run.plan_run
    model_run.plan_run = lambda *given: replace(plan_run(*given), direct_io=True)
    try:
        yield
    finally:
        model_run.plan_run = plan_run


def theirs(job: Job, ids: list[int], limit: Callable[[], None]) -> Result:
    import llama_cpp as llama

    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    limit()
    with anonymous_peak(not job.limit) as peak:
        llama.llama_backend_init()
        model_params, params = llama.llama_model_default_params(), llama.llama_context_default_params()
        model_params.use_mmap, model_params.use_extra_bufts = True, False
        model = llama.llama_model_load_from_file(job.model.encode(), model_params)
        params.n_ctx, params.n_batch, params.n_ubatch = len(ids), job.prompt, job.prompt
        params.n_threads = params.n_threads_batch = job.threads
        context = llama.llama_init_from_model(model, params)

        def evaluate(*tokens: int) -> None:
            array = (llama.llama_token * len(tokens))(*tokens)  # the batch only borrows it
            if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))) != 0:
                raise SystemExit("llama_decode failed")
            _ = llama.llama_get_logits(context)[0]

        evaluate(*ids[: job.prompt])
        times = timed(ids[job.prompt :], evaluate)
    return Result(*times, status("VmHWM"), max(peak))


def timed(tokens: list[int], step: Callable[[int], object]) -> tuple[float, float, float]:
    """`Result`'s speed, disk and taken."""
    disk, waited, others, start = storage_bytes(), waited_seconds(), others_seconds(), time.perf_counter()
    for token in tokens:
        step(token)
    seconds = time.perf_counter() - start
    disk, taken = storage_bytes() - disk, min(waited_seconds() - waited, others_seconds() - others)
    return len(tokens) / seconds, disk / len(tokens), taken / seconds


def storage_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("\nread_bytes:")[1].split()[0])


def waited_seconds() -> float:
    """How long threads were ready to run and others had the cores, be they of this process or not."""
    return sum(int(file.read_text().split()[1]) for file in Path("/proc/self/task").glob("*/schedstat")) / 1e9


def others_seconds() -> float:
    """Processor time of other programs, be it that we needed the cores or waited for the disk."""
    user, nice = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:3])
    return (user + nice) / os.sysconf("SC_CLK_TCK") - os.times().user


def status(*fields: str) -> int:
    """The sum of some of this process's memory figures, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[field].split()[0]) * 1024 for field in fields)


@contextmanager
def anonymous_peak(wanted: bool) -> Iterator[list[int]]:
    """A list that grows by what this process holds that no file backs, looked at all the time."""
    seen, over = [0], threading.Event()

    def watch() -> None:
        while wanted and not over.wait(0.005):
            seen.append(status("RssAnon", "RssShmem"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def child(job: Job, group: Path) -> None:
    def limit() -> None:
        if job.limit:
            (group / ("memory.limit_in_bytes" if V1 else "memory.max")).write_text(str(job.limit))

    side = {"ours": ours, "theirs": theirs}[job.side]
    print(json.dumps(asdict(side(job, json.loads(Path(job.ids).read_text()), limit))))


@contextmanager
def memory_cgroup() -> Iterator[Path]:
    """A memory cgroup for one child, without swap."""
    group = (CGROUP / "memory" if V1 else CGROUP) / f"offload-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.swappiness" if V1 else "memory.swap.max")).write_text("0")
    except OSError as error:
        raise SystemExit(f"no memory cgroup, which needs root and its controller: {error}") from None
    try:
        yield group
    finally:
        group.rmdir()


def run(job: Job) -> Result:
    """`job`, again where other programs disturbed it."""
    for _ in range(TRIES):
        result = run_once(job)
        found = f"{result.speed:.1f} tok/s, {result.disk / MB:.2f} MB a token from disk"
        print(f"{job.side}: {found}; other programs took {result.taken:.2f} cores", file=sys.stderr)
        if result.taken <= QUIET:
            break
    return result


def run_once(job: Job) -> Result:
    """In a process that is in its cgroup from the start."""
    drop_pages(Path(job.model))
    with memory_cgroup() as group:
        command = [job.python, __file__, "--child", json.dumps(asdict(job)), str(group)]
        enter = lambda: (group / "cgroup.procs").write_text(str(os.getpid()))  # noqa: E731
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
    if done.returncode:
        why = "killed, probably for memory: raise --margin" if done.returncode < 0 else f"exit code {done.returncode}"
        raise SystemExit(f"{job.side}: {why}")
    return Result(**json.loads(done.stdout.splitlines()[-1]))


def drop_pages(model: Path) -> None:
    """Take a model out of the page cache; not more of it, as libraries would then count to who loads them next."""
    os.sync()
    for path in [path for path in model.iterdir() if path.is_file()] if model.is_dir() else [model]:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ram_for(share: float, job: Job, context: int) -> tuple[int, int, int]:
    """The least --ram, to a tenth of an MB, that keeps `share` of the experts; how many it keeps, and of how many."""
    from mixlocal.app.budgets import RunOptions
    from mixlocal.app.model_run import ModelRun
    from mixlocal.errors import MemoryBudgetError
    from mixlocal.store.model_store import ModelStore

    store = ModelStore.open(Path(job.model))
    total = len(store.manifest.records)

    def slots(ram: int) -> int:
        try:
            return ModelRun(store, RunOptions(context=context, threads=job.threads, ram=ram)).plan.ram_slots
        except MemoryBudgetError:
            return 0

    low, high = 0, 2 * store.manifest.nbytes + 4000 * MB
    while high - low > MB // 10:
        middle = (low + high) // 2
        low, high = (low, middle) if slots(middle) >= round(share * total) else (middle, high)
    if slots(high) < round(share * total):
        raise SystemExit(f"{share:.0%} of the experts do not fit in what is free")
    return high, slots(high), total


def gguf_bytes(path: str) -> tuple[int, int]:
    """Bytes of the experts, and of all other weights."""
    from gguf import GGUFReader

    sizes = [("_exps." in tensor.name, int(tensor.n_bytes)) for tensor in GGUFReader(path).tensors]
    gc.collect()  # the reader maps the file, and what is mapped stays in the page cache
    return sum(n for expert, n in sizes if expert), sum(n for expert, n in sizes if not expert)


def make_cases(args: argparse.Namespace, ids_file: Path) -> Iterator[Case]:
    """Measures what either takes without a limit."""
    from mixlocal.app.installed import find_store
    from mixlocal.store.paths import home

    folder = find_store(args.model, home())
    ids_file.write_text(json.dumps(token_ids(folder, args)))
    mine = Job("ours", sys.executable, str(folder), str(ids_file), args.prompt, args.threads)
    peer = replace(mine, side="theirs", python=args.peer_python, model=args.gguf)
    experts, trunk = gguf_bytes(args.gguf)
    beside, margin = run_once(peer).anonymous, args.margin * MB
    for share in args.shares:
        ram, slots, total = ram_for(share, mine, args.prompt + args.new)
        alone = run_once(replace(mine, ram=ram))
        if alone.slots != slots:
            raise SystemExit(f"--ram {ram} keeps {alone.slots} experts; {slots} were planned")
        limit, peer_limit = alone.anonymous + margin, beside + trunk + experts * slots // total + margin
        note = (
            f"{slots} of {total} experts. Ours: --ram {ram / MB:.0f}M takes {alone.anonymous / MB:.0f} MB of anonymous "
            f"memory; + {args.margin} = {limit / MB:.0f} MB. llama.cpp: {beside / MB:.0f} MB of anonymous memory + "
            f"{trunk / MB:.0f} of weights that are no experts + {slots}/{total} of {experts / MB:.0f} of experts + "
            f"{args.margin} = {peer_limit / MB:.0f} MB."
        )
        yield Case(slots / total, replace(mine, ram=ram, limit=limit), replace(peer, limit=peer_limit), note)


def token_ids(folder: Path, args: argparse.Namespace) -> list[int]:
    import mixlocal
    from mixlocal.app.tokenizers import load_tokenizer

    text = args.text or Path(mixlocal.__file__).parent / "data" / "evaluation.txt"
    ids = load_tokenizer(folder).encode(text.read_text())
    if len(ids) < args.prompt + args.new:
        raise SystemExit(f"{text} has {len(ids)} tokens, fewer than --prompt and --new together")
    return ids[: args.prompt + args.new]


def readahead_kb(path: str) -> int:
    """A setting of the disk that holds a file."""
    device = os.stat(path).st_dev
    return int(Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text())


def print_table(cases: list[Case], results: list[list[tuple[Result, Result]]]) -> None:
    print("\n".join(f"- {case.note}" for case in cases))
    print("\n| experts that fit | | tok/s | found in memory | MB a token from disk | peak RSS, MB | ours / llama.cpp |")
    print("|---|---|---|---|---|---|---|")
    for case, pairs in zip(cases, results, strict=True):
        ratios = [mine.speed / peer.speed for mine, peer in pairs]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        mine, peer = zip(*pairs, strict=True)
        print(f"| {case.share:.0%} | ours | {medians(mine, f'{median(r.hits for r in mine):.0%}')} | {ratio} |")
        print(f"| | llama.cpp | {medians(peer, '')} | |")
    taken = max(result.taken for pairs in results for pair in pairs for result in pair)
    print(f"\nOther programs took {taken:.2f} cores at most. Page faults of llama.cpp read up to twice the disk's")
    print(f"readahead, here {readahead_kb(cases[0].theirs.model)} kB; 128 is usual.")


def medians(results: tuple[Result, ...], hits: str) -> str:
    speed, disk = median(r.speed for r in results), median(r.disk for r in results)
    return f"{speed:.1f} | {hits} | {disk / MB:.2f} | {median(r.rss for r in results) / MB:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="name or folder, as for mixlocal bench -m")
    parser.add_argument("--gguf", required=True, help="the same weights for llama.cpp")
    parser.add_argument("--peer-python", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="of the experts that fit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--text", type=Path, help="the package's evaluation text by default")
    parser.add_argument("--margin", type=int, default=16, help="MB beyond what was measured, for both")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the cgroup goes
    with tempfile.TemporaryDirectory() as scratch:
        cases = list(make_cases(args, Path(scratch) / "ids.json"))
        results: list[list[tuple[Result, Result]]] = [[] for _ in cases]
        for done in range(args.rounds):
            print(f"round {done + 1} of {args.rounds}", file=sys.stderr)
            for case, pairs in zip(cases, results, strict=True):
                pairs.append((run(case.ours), run(case.theirs)))
    print_table(cases, results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Job(**json.loads(sys.argv[2])), Path(sys.argv[3]))
    else:
        main()
