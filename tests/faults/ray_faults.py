"""Kills workers of a local Ray cluster at random while they answer a batch, and looks whether it is whole.

    .venv/bin/python -m tests.faults.ray_faults [--kills 20] [--rows 100] [--workers 2] [--seed 1] [--model smolmix:q4]

Every row must be answered once, as a run without kills answers it. Without --model workers have a double for an engine,
whose rows take --delay seconds. Prints what was seen as JSON; exit 1 if anything was lost, doubled or other.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

import ray_double
from ray_double import RayDouble, begun, request

from mixlocal.app.batch.engine import BatchEngine, Pulse, Reply, Request
from mixlocal.app.batch.ray_cluster import import_ray
from mixlocal.app.batch.ray_engine import RayEngine
from mixlocal.app.budgets import RunOptions
from mixlocal.engine.params import SamplingParams
from mixlocal.store.paths import home

SUBJECTS = ("the sea", "a clock", "rye bread", "old maps", "a lighthouse", "snow", "a violin", "the tide")


@dataclass
class Report:
    """rounds: how often the batch was answered until all kills were done. deaths: what the engine told of dead workers.
    begun: how often a worker began a row meanwhile (with a double only). seconds: of all rounds; undisturbed: of the
    one without kills. failed, lost, doubled, other: ids of rows that were not as they ought to be."""

    rows: int
    rounds: int = 0
    kills: int = 0
    deaths: int = 0
    begun: int = 0
    seconds: float = 0.0
    undisturbed_seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.failed or self.lost or self.doubled or self.other)


class Killer(threading.Thread):
    """Kills a worker of this process's cluster now and then, loading ones too, until it killed `count`."""

    def __init__(self, count: int, pause: float, rng: random.Random) -> None:
        super().__init__(daemon=True)
        self.count, self.pause, self.rng = count, pause, rng
        self.done = 0

    def run(self) -> None:
        while self.done < self.count:
            time.sleep(self.rng.uniform(0.2, 1.8) * self.pause)
            found = workers()
            if found:
                self.done += kill(self.rng.choice(found))


def workers() -> list[psutil.Process]:
    """The actors below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def kill(process: psutil.Process) -> bool:
    try:
        process.send_signal(signal.SIGKILL)
    except psutil.Error:
        return False
    return True


def by_value() -> None:
    """Workers cannot import what lies in tests/."""
    import_ray(local=True).cloudpickle.register_pickle_by_value(ray_double)


def campaign(rows: list[Request], make_engine: Callable[[], RayEngine], killer: Killer) -> Report:
    report = Report(len(rows))
    engine = make_engine()
    try:
        start = time.monotonic()
        wanted = {reply.id: reply for reply in replies(engine, rows, report)}
        report.undisturbed_seconds = round(time.monotonic() - start, 1)
        start = time.monotonic()
        killer.start()
        while killer.is_alive():
            report.rounds += 1
            judge(report, wanted, list(replies(engine, rows, report)))
        report.seconds = round(time.monotonic() - start, 1)
    finally:
        engine.close()
    report.kills = killer.done
    return report


def replies(engine: BatchEngine, rows: list[Request], report: Report) -> Iterator[Reply]:
    for event in engine.answer(iter(rows)):
        if isinstance(event, Pulse):
            report.deaths += event.note.startswith("a worker died")
        else:
            yield event


def judge(report: Report, wanted: dict[str, Reply], got: list[Reply]) -> None:
    counts = Counter(reply.id for reply in got)
    report.lost += sorted(set(wanted) - set(counts))
    report.doubled += sorted(id for id, count in counts.items() if count > 1)
    report.failed |= {reply.id: str(reply.error) for reply in got if reply.error}
    report.other += sorted(reply.id for reply in got if not reply.error and not same(reply, wanted.get(reply.id)))


def same(reply: Reply, wanted: Reply | None) -> bool:
    return wanted is not None and (reply.text, reply.finish, reply.token_ids) == (
        wanted.text, wanted.finish, wanted.token_ids,
    )  # fmt: skip


def model_rows(count: int) -> list[Request]:
    texts = (f"Write {5 + n % 7} words about {SUBJECTS[n % len(SUBJECTS)]}." for n in range(count))
    return [
        Request(f"row-{n}", text, SamplingParams(seed=n, max_tokens=16 + 4 * (n % 8))) for n, text in enumerate(texts)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in [("kills", 20), ("rows", 100), ("workers", 2), ("seed", 1), ("concurrency", 3)]:
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two kills, about")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds that a row of the double takes")
    parser.add_argument("--model", help="instead of the double")
    asked = parser.parse_args()
    by_value()
    killer = Killer(asked.kills, asked.pause, random.Random(asked.seed))
    with tempfile.TemporaryDirectory() as folder:
        log = str(Path(folder) / "log")
        double = None if asked.model else partial(RayDouble, log, asked.concurrency, asked.delay)
        rows = model_rows(asked.rows) if asked.model else [request(n) for n in range(asked.rows)]
        make = partial(
            RayEngine, asked.model or "double", RunOptions(sequences=asked.concurrency), home(), workers=asked.workers,
            concurrency=asked.concurrency, make_engine=double,
        )  # fmt: skip
        report = campaign(rows, make, killer)
        report.begun = max(0, len(begun(log)) - asked.rows)
    print(json.dumps(asdict(report)))
    sys.exit(0 if report.good and report.kills == asked.kills else 1)


if __name__ == "__main__":
    main()
