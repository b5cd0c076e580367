"""Kill and fail `batch` at random moments and at every durable call; a rerun must give what an undisturbed run gives.

    python -m tests.faults.batch_faults [--kills 50] [--rows 200] [--every 1] [--model smolmix:q4]

Kills: the same command again and again, each `kill -9`ed after a random time, until as many have struck a running one.
No row may be lost or doubled, at most those in flight may be computed again for each kill, and the output must be that
of an undisturbed run, but for its times. With --model, the real program with that installed model; else a double, as
forks of this process, so that a kill costs milliseconds; and then {KILL, EIO, ENOSPC, a short write} at every n-th
call that changes the disk, of a new batch and of one whose input grew.

Prints what fired, as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from batch_double import Behaviour, Double

from faults.striking import CODES, KINDS, OnCall, exit_code, fault
from mixlocal.app.batch import engines
from mixlocal.cli import batch as command
from mixlocal.cli import main as mixlocal
from mixlocal.store import durable

IMPORTED_ON_THE_WAY = (
    "mixlocal.app.batch.job", "mixlocal.app.batch.source", "mixlocal.cli.batch_setup", "mixlocal.cli.prompt_request",
    "mixlocal.cli.loading", "mixlocal.store.paths", "mixlocal.app.config", "mixlocal.app.catalog",
)  # fmt: skip
Start = Callable[[Path], int]  # a folder with in.jsonl -> the pid of a batch from it to out.jsonl
MODEL_TOKENS = 12


def write_rows(folder: Path, count: int) -> None:
    """One in 40 cannot be asked."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        '{"id": "broken' if n % 40 == 7 else json.dumps({"id": f"r{n}", "prompt": f"Count to {n}."})
        for n in range(count)
    ]
    (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))


def forked(folder: Path, delay: float, on_call: OnCall | None = None) -> int:
    """A child that runs the command with the double, and logs each row that it asks."""
    pid = os.fork()
    if pid:
        return pid
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    engines.ENGINES["local"] = lambda _: Double(Behaviour(delay, pulse=0.01, log="log"))
    command.install_default = lambda *_: None  # type: ignore[assignment]
    durable.on_call = on_call
    code = 99  # an exception that is not ours: the child must say so and not run the parent's code
    try:
        mixlocal(["batch", "in.jsonl", "-o", "out.jsonl", "--seed", "1"])
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def spawned(folder: Path, model: str) -> int:
    """The real program."""
    words = ["batch", "in.jsonl", "-o", "out.jsonl", "--seed", "1", "-m", model, "-T", "0", "-n", str(MODEL_TOKENS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mixlocal", *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return process.pid


def output(folder: Path) -> list[Any]:
    """Without what differs between two runs; empty if there is none. Raises for one that is half written."""
    path = folder / "out.jsonl"
    if not path.exists():
        return []
    data = path.read_bytes()
    assert data.endswith(b"\n"), "half a line"
    return [without(json.loads(line), {"timings", "created"}) for line in data.splitlines()]


def without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {key: without(inner, names) for key, inner in value.items() if key not in names}
    return value


def journal_lines(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (folder / "out.jsonl.batch" / "journal").read_bytes().count(b"\n")
    return 0


def kill_at_random(start: Start, root: Path, rows: int, kills: int, seconds: float, rng: random.Random) -> Any:
    """seconds: of the longest wait before a kill; it is counted from when the run has added a row to the journal, or
    in one of five from its beginning."""
    reference = root / "reference"
    write_rows(reference, rows)
    assert exit_code(start(reference)) == 10
    expected = output(reference)
    result: dict[str, Any] = {"rows": rows, "kills": 0, "batches": 0, "recomputed": 0, "bad": []}
    while result["kills"] < kills:
        folder = root / f"batch{result['batches']}"
        write_rows(folder, rows)
        struck = 0
        while result["kills"] < kills and not (folder / "out.jsonl").exists():
            pid = start(folder)
            if rng.random() < 0.8:
                wait_for_row(folder, journal_lines(folder), pid)
            time.sleep(rng.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
            hit = exit_code(pid) == -signal.SIGKILL
            struck += hit
            result["kills"] += hit
        result["batches"] += 1
        judge(start, folder, expected, struck, result)
    return result


def wait_for_row(folder: Path, before: int, pid: int) -> None:
    while journal_lines(folder) <= before and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)


def judge(start: Start, folder: Path, expected: list[Any], struck: int, result: dict[str, Any]) -> None:
    code, found, name = exit_code(start(folder)), output(folder), folder.name
    if code != 10 or found != expected:
        names = Counter(line["id"] for line in found)
        lost, doubled = len(expected) - len(names), sum(count > 1 for count in names.values())
        result["bad"].append(f"{name}: exit {code}, {lost} lost, {doubled} doubled, or not as they should be")
    if journal_lines(folder) != len(expected):
        result["bad"].append(f"{name}: {journal_lines(folder)} lines in the journal, for {len(expected)} rows")
    log = folder / "log"
    if log.exists():
        asked = Counter(log.read_text().split())
        again = sum(asked.values()) - len(asked)
        result["recomputed"] += again
        if again > struck * Behaviour().concurrency:
            result["bad"].append(f"{name}: {again} rows computed again after {struck} kills")


def strike_everywhere(root: Path, before: int, rows: int, every: int) -> Any:
    """Each kind of fault at every n-th durable call. before: rows that were answered in an earlier run."""

    def prepared(name: str) -> Path:
        folder = root / name
        if before:
            write_rows(folder, before)
            assert exit_code(forked(folder, 0)) == 10
        write_rows(folder, rows)
        return folder

    calls = count_calls(prepared("counted"))
    old, expected = (output(prepared("old")) if before else []), output(root / "counted")
    points = [(k, kind) for k in range(1, calls + 1, every) for kind in KINDS]
    result: dict[str, Any] = {"calls": calls, "points": len(points), "fired": 0, "bad": []}
    for k, kind in points:
        folder = prepared("struck")
        read_end, write_end = os.pipe()
        code = exit_code(forked(folder, 0, fault(kind, k, write_end)))
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            result["fired"] += bool(pipe.read())
        what, wanted = f"{kind} at call {k}", -signal.SIGKILL if kind == "KILL" else CODES[kind]
        if code not in (wanted, 10):  # 10: what only helps may fail, such as noting the lock's process number
            result["bad"].append(f"{what}: exit {code}")
        if output(folder) not in (old, expected):
            result["bad"].append(f"{what}: an output that is neither the old one nor the new one")
        code = exit_code(forked(folder, 0))
        if code != 10 or output(folder) != expected:
            result["bad"].append(f"{what}: rerun gave exit {code} or another output")
        left = [path.name for path in folder.iterdir() if path.name.endswith(".part")]
        if left:
            result["bad"].append(f"{what}: left {left}")
        shutil.rmtree(folder)
    return result


def count_calls(folder: Path) -> int:
    read_end, write_end = os.pipe()

    def on_call(name: str, nbytes: int) -> int:
        os.write(write_end, b".")
        return nbytes

    pid = forked(folder, 0, on_call)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        calls = len(pipe.read())
    assert exit_code(pid) == 10
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--every", type=int, default=1, help="strike at every n-th call")
    parser.add_argument("--model", help="an installed one, by name; a double by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="longest wait before a kill")
    given = parser.parse_args()
    for name in IMPORTED_ON_THE_WAY:  # once, and not in every child
        importlib.import_module(name)
    root, rng = Path(tempfile.mkdtemp()), random.Random(given.seed)
    if given.model:
        start, seconds = (lambda folder: spawned(folder, given.model)), given.seconds or 3.0
    else:
        start, seconds = (lambda folder: forked(folder, 0.01)), given.seconds or 0.03
    try:
        result = {"kill": kill_at_random(start, root / "kill", given.rows, given.kills, seconds, rng)}
        if given.model:
            del result["kill"]["recomputed"]  # only the double tells
        else:
            result["new"] = strike_everywhere(root / "new", 0, 10, given.every)
            result["grown"] = strike_everywhere(root / "grown", 9, 12, given.every)
    finally:
        shutil.rmtree(root)
    print(json.dumps(result))
    sys.exit(any(part["bad"] for part in result.values()))


if __name__ == "__main__":
    main()
