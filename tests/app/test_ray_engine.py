"""Batches on Ray: every row is answered once, whatever becomes of the workers."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import ray_double
import tiny
from ray_double import RayDouble, begun, reply_to, request
from stores import quantized

from mixlocal.app.batch import ray_roll
from mixlocal.app.batch.engine import Pulse, Reply, Request
from mixlocal.app.batch.engines import local_identity
from mixlocal.app.batch.ray_cluster import Cluster, import_ray
from mixlocal.app.batch.ray_crew import reason
from mixlocal.app.batch.ray_desk import Desk, capacity
from mixlocal.app.batch.ray_engine import RayEngine
from mixlocal.app.batch.ray_ledger import GIVE_UP_AFTER, SUSPECT_AFTER, Ledger
from mixlocal.app.batch.ray_local import absolute, divided
from mixlocal.app.batch.ray_places import Node, places
from mixlocal.app.batch.ray_tally import Tally, plus
from mixlocal.app.budgets import RunOptions
from mixlocal.app.hardware import Hardware, probe
from mixlocal.app.json_form import read_form
from mixlocal.app.session import Session
from mixlocal.app.template import Message
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import (
    ContextOverflowError,
    MemoryBudgetError,
    MixlocalError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from mixlocal.store.paths import home

DRIVER = Path(__file__).parent.parent / "ray_driver.py"


# --- what needs no Ray


@pytest.mark.parametrize("seed", range(40))
def test_a_row_is_answered_once_and_only_what_kills_is_given_up(seed: int) -> None:
    rng = random.Random(seed)
    deadly = {f"row-{rng.randrange(60)}" for _ in range(rng.randrange(4))}
    ledger = Ledger(request(n) for n in range(60))
    numbers = itertools.count()
    workers: dict[int, list[Request]] = {next(numbers): [] for _ in range(3)}
    answered: Counter[str] = Counter()
    given_up: Counter[str] = Counter()
    while not ledger.finished:
        worker = rng.choice(list(workers))
        held = workers[worker]
        taken = ledger.take(worker, 0.0, idle=not held) if len(held) < 4 else None
        if taken is not None:
            held.append(taken)
            continue
        dies = any(row.id in deadly for row in held)
        if held and not dies and (rng.random() < 0.9 or len(held) == 1):
            row = held.pop(rng.randrange(len(held)))
            answered[row.id] += ledger.answered(worker, row.id)
        elif held:  # a deadly row, or somebody shot it
            given_up.update(row.id for row in ledger.lost(worker, begun=4))
            del workers[worker]
            workers[next(numbers)] = []
    assert set(answered) == {f"row-{n}" for n in range(60)} - deadly
    assert set(given_up) == deadly
    assert set(answered.values()) <= {1}
    assert set(given_up.values()) <= {1}


def test_a_suspect_is_alone_and_comes_last() -> None:
    ledger = Ledger(request(n) for n in range(3))
    for worker in range(SUSPECT_AFTER):
        assert ledger.take(worker, 0.0, idle=True) == request(0)
        assert ledger.lost(worker, begun=1) == []
    assert ledger.take(8, 0.0, idle=True) == request(1)
    assert ledger.take(8, 0.0, idle=False) == request(2)
    assert ledger.take(8, 0.0, idle=False) is None, "the suspect has company"
    assert ledger.take(9, 0.0, idle=True) == request(0)
    assert ledger.take(9, 0.0, idle=False) is None
    assert ledger.lost(8, begun=2) == []
    assert ledger.take(9, 0.0, idle=False) is None, "the suspect got company"
    assert not ledger.finished


def test_what_a_worker_had_not_begun_is_not_suspected() -> None:
    ledger = Ledger(request(n) for n in range(2))
    for worker in range(SUSPECT_AFTER):
        assert [ledger.take(worker, 0.0, idle=not n) for n in range(2)] == [request(0), request(1)]
        assert ledger.lost(worker, begun=1) == []
    assert ledger.take(9, 0.0, idle=True) == request(1)


def test_a_late_row_is_done_twice_and_counts_once() -> None:
    ledger = Ledger(iter([request(0), request(1)]))
    ledger.take(1, 0.0, idle=True)
    ledger.take(1, 5.0, idle=False)
    assert ledger.take(2, 6.0, idle=True) is None
    assert ledger.take_copy(2, 9.0, patience=10.0) is None
    assert ledger.take_copy(2, 11.0, patience=10.0) == request(0)
    assert ledger.running == 2
    assert ledger.answered(2, "row-0")
    assert not ledger.answered(1, "row-0"), "the first answer wins"
    assert ledger.take_copy(2, 16.0, patience=10.0) == request(1)
    assert ledger.lost(1, begun=2) == []
    assert not ledger.waiting, "the other worker still has it"
    assert ledger.answered(2, "row-1")
    assert ledger.finished


@pytest.fixture
def log(tmp_path: Path) -> str:
    return str(tmp_path / "log")


def test_a_desk_answers_many_at_once(log: str) -> None:
    desk = Desk(partial(RayDouble, log, concurrency=4, delay=0.3))
    assert desk.opened.result().concurrency == 4
    start = time.monotonic()
    futures = [desk.ask(request(n)) for n in range(4)]
    assert [future.result() for future in futures] == [reply_to(request(n)) for n in range(4)]
    assert time.monotonic() - start < 0.9, "one after the other takes 1.2 s"
    desk.no_more(5)
    late = desk.ask(request(4))
    assert late.result(timeout=5) == reply_to(request(4)), "no_more may overtake what it is about"
    desk.close()
    assert Path(log).read_text().endswith("closed\n")


def test_a_desk_tells_news_once(log: str) -> None:
    desk = Desk(partial(RayDouble, log, delay=0.0))
    total = Pulse()
    for n in range(3):
        desk.no_more(n + 1)
        desk.ask(request(n)).result(timeout=5)
        while total.read < 3 * n + 3:
            time.sleep(0.01)
            for pulse in desk.news():
                total = plus(total, pulse)
    assert total == Pulse(read=9, generated=9, found={"ram": 9})
    assert desk.news() == [Pulse()]
    desk.close()


class Grabbing(RayDouble):
    """Takes as many as it may before it tells of one."""

    def answer(self, requests: Iterator[Request]) -> Iterator[Reply | Pulse]:
        while taken := list(itertools.islice(requests, self.concurrency)):
            held = [reply_to(request) for request in taken]
            more = list(itertools.islice(requests, self.concurrency))
            yield from [*held, *(reply_to(request) for request in more)]


class Forgetful(RayDouble):
    def answer(self, requests: Iterator[Request]) -> Iterator[Reply | Pulse]:
        yield from (reply_to(request) for request in list(requests)[1:])


def test_an_engine_that_takes_before_it_tells_does_not_wait_for_ever(log: str) -> None:
    desk = Desk(partial(Grabbing, log, concurrency=3))
    desk.opened.result()
    futures = [desk.ask(request(n)) for n in range(capacity(3))]
    assert [future.result(timeout=5) for future in futures] == [reply_to(request(n)) for n in range(capacity(3))]
    desk.close()


def test_a_row_that_an_engine_forgets_is_not_waited_for(log: str) -> None:
    desk = Desk(partial(Forgetful, log))
    forgotten, answered = desk.ask(request(0)), desk.ask(request(1))
    desk.no_more(2)
    assert answered.result(timeout=5) == reply_to(request(1))
    with pytest.raises(AssertionError, match="row-0"):
        forgotten.result(timeout=5)
    desk.close()


def test_a_broken_engine_breaks_every_row(log: str) -> None:
    desk = Desk(partial(RayDouble, log))
    before = desk.ask(request(0))
    broken = desk.ask(request(1, "refuse"))
    for future in (before, broken, desk.ask(request(2))):
        with pytest.raises(MemoryBudgetError, match="no memory for this"):
            future.result(timeout=5)
    desk.close()


def test_pulses_add_up() -> None:
    tally = Tally()
    tally.begin()
    tally.add(Pulse(3, 10, 1, {"ram": 5}, "a note"))
    tally.add(Pulse(3, 12, 4, {"ram": 6, "disk": 2}))
    assert tally.take() == [Pulse(0, 12, 4, {"ram": 6, "disk": 2}), Pulse(note="a note")]
    tally.add(Pulse(3, 13, 5, {"ram": 7, "disk": 2}))
    tally.begin()
    tally.add(Pulse(1, 2, 1, {"ram": 1}))
    assert tally.take() == [Pulse(0, 3, 2, {"ram": 2, "disk": 0})]


class TwoSlots:
    slots = (1, 2)


def test_workers_that_die_of_everything_end_the_batch() -> None:
    roll = ray_roll.Roll(TwoSlots(), local=True, strict=True)  # type: ignore[arg-type]
    for _ in range(3):
        for _ in range(2 * 5):  # two workers at once that die of a request each
            roll.died("it ended")
        for _ in range(2):
            roll.gave_up()
        roll.answered()
    for _ in range(ray_roll.GIVEN_UP_IN_A_ROW - 1):
        roll.gave_up()
    with pytest.raises(MixlocalError, match="died of 5 requests one after another"):
        roll.gave_up()
    for _ in range(2 * ray_roll.DEATHS_PER_SLOT - 1):
        roll.died("it ended")
    with pytest.raises(MixlocalError, match="died 16 times and answered nothing between: it ended"):
        roll.died("it ended")


ONE = [Node("a", 8, 0)]
MIXED = [Node("a", 8, 0), Node("b", 16, 2), Node("c", 0, 0)]


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "expected"),
    [
        (ONE, "auto", None, [("a", 1, False, 8)]),
        (ONE, "auto", 3, [("a", 3, False, 2)] * 3),
        (MIXED, "auto", None, [("b", 2, True, 8)] * 2),
        (MIXED, "cuda", 1, [("b", 1, True, 16)]),
        (MIXED, "cpu", None, [("a", 1, False, 8), ("b", 1, False, 16)]),
        (MIXED, "cpu", 3, [("a", 2, False, 4), ("b", 1, False, 16), ("a", 2, False, 4)]),
    ],
)
def test_workers_have_places(
    nodes: list[Node], device: str, workers: int | None, expected: list[tuple[str, int, bool, int]]
) -> None:
    found = [(slot.node.id, slot.share, slot.gpu, slot.cpus) for slot in places(nodes, device, workers)]
    assert found == expected


@pytest.mark.parametrize(
    ("device", "workers", "message"),
    [("cuda:1", None, "hands out"), ("cuda", 3, "2 GPUs"), ("auto", 3, "2 GPUs"), ("cpu", 0, "at least one")],
)
def test_places_that_are_not_there(device: str, workers: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        places(MIXED, device, workers)
    with pytest.raises(UsageError, match="no node"):
        places(ONE, "cuda", None)


def test_workers_of_one_machine_share_it() -> None:
    machine = Hardware(cores=8, ram_total=100_000, ram_free=60_000, disk_free=0)
    assert divided(RunOptions(ram="50%", context=77), 2, machine) == RunOptions(ram=25_000, threads=4, context=77)
    assert divided(RunOptions(ram="90K", threads=3), 2, machine) == RunOptions(ram=28_500, threads=1)
    assert divided(RunOptions(), 16, machine) == RunOptions(ram=57_000 // 16, threads=1)


def test_a_folder_is_named_so_that_a_worker_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert absolute("./mine:q8") == f"{tmp_path}/mine:q8"
    assert absolute("smolmix:q8") == "smolmix:q8"


def test_why_a_worker_died_in_a_line() -> None:
    said = (
        "The actor died.\n\tpid: 3\nWorker exit type: SYSTEM_ERROR Worker exit detail: It ended. Some common causes: x"
    )
    assert reason(said) == "It ended."
    assert reason("The node was lost\nmore") == "The node was lost"


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        RayEngine("smolmix", RunOptions(), home())
    assert caught.value.hint == "pip install 'mixlocal[ray]'"


# --- with Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One for all tests, as starting it takes longer than most of them."""
    pytest.importorskip("ray")
    import_ray(local=True).cloudpickle.register_pickle_by_value(ray_double)
    import_ray(local=True).cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cluster = Cluster(None, gpus=False)
    yield cluster
    cluster.close()


@pytest.fixture
def engine(cluster: Cluster, log: str) -> Iterator[RayEngine]:
    engine = make(partial(RayDouble, log))
    yield engine
    engine.close()


def make(make_engine: partial[RayDouble], workers: int | None = 2, patience: float = 60.0) -> RayEngine:
    options = RunOptions(device="cpu")
    return RayEngine("double", options, home(), workers=workers, make_engine=make_engine, patience=patience)


def answers(engine: RayEngine, rows: list[Request]) -> dict[str, Reply]:
    replies = [event for event in engine.answer(iter(rows)) if isinstance(event, Reply)]
    assert sorted(reply.id for reply in replies) == sorted(row.id for row in rows), "lost or doubled"
    return {reply.id: reply for reply in replies}


def test_rows_are_taken_as_there_is_room_and_answered_by_all_workers(engine: RayEngine, log: str) -> None:
    assert engine.identity == {"model": "double"}
    assert engine.defaults.temperature == 0.5
    assert engine.concurrency == 2 * (3 + 1)
    taken, replied, last = 0, {}, Pulse()

    def rows() -> Iterator[Request]:
        nonlocal taken
        for n in range(30):
            taken += 1
            yield request(n)

    for event in engine.answer(rows()):
        assert taken - len(replied) <= engine.concurrency + 1  # the one that ends the input is taken too
        if isinstance(event, Reply):
            replied[event.id] = event
        else:
            last = event
    assert replied == {f"row-{n}": reply_to(request(n)) for n in range(30)}
    assert (last.running, last.read, last.generated, last.found) == (0, 90, 90, {"ram": 90})
    assert len({line.split()[0] for line in Path(log).read_text().splitlines()}) == 2


def test_a_node_says_what_it_has(cluster: Cluster) -> None:
    (node,) = cluster.nodes()
    there, here = cluster.machine(node), probe(Path("/"))
    assert (there.cores, there.ram_total) == (here.cores, here.ram_total)
    assert there.ram_free == pytest.approx(here.ram_free, rel=0.2)
    with pytest.raises(RefusedError, match="joined a Ray cluster already"):
        Cluster("auto", gpus=False)


def test_a_worker_with_the_model_answers_as_it_does_here(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is a folder named from where we are; a reply that is an error is one there too."""
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=256)
    quantized(checkpoint, tmp_path / "tiny" / "q4", template="mistral-v1")
    form = read_form(b'{"type": "array", "items": {"enum": [1, 22]}, "minItems": 2, "maxItems": 4}', "it")
    params = SamplingParams(temperature=1.0, max_tokens=20, seed=5)
    rows = [
        Request("talk", (Message("user", "One"), Message("assistant", "Two"), Message("user", "Three")), params),
        Request("raw", "Once upon a time", replace(params, logprobs=2), raw=True),
        Request("form", "List", params, form=form),
        Request("too long", "y" * 300, params, raw=True),
    ]
    monkeypatch.chdir(tmp_path)
    options = RunOptions(device="cpu", threads=1, sequences=3)
    engine = RayEngine("./tiny:q4", options, home(), workers=1)
    replies = answers(engine, rows)
    with Session.load("./tiny:q4", options, home()) as session:
        wanted = {reply.id: reply for reply in session.batch(rows)}
        assert engine.identity == local_identity(session.run.store.manifest, options)
        assert engine.defaults == session.defaults
    engine.close()
    assert isinstance(replies["too long"].error, ContextOverflowError)
    assert vars(replies["too long"].error) == vars(wanted["too long"].error)
    assert replies["form"].error is None
    for id in ("talk", "raw", "form"):
        timed = replace(replies[id], ttft_s=wanted[id].ttft_s, total_s=wanted[id].total_s)
        assert timed == wanted[id]


def test_a_row_that_kills_fails_and_the_others_do_not(engine: RayEngine, log: str) -> None:
    rows = [request(n, "die now" if n == 4 else "") for n in range(12)]
    replies = answers(engine, rows)
    failed = replies.pop("row-4")
    assert isinstance(failed.error, RefusedError)
    assert "died" in failed.error.message
    assert replies == {row.id: reply_to(row) for row in rows if row.id != "row-4"}
    assert begun(log).count("row-4") == SUSPECT_AFTER + GIVE_UP_AFTER


def test_errors_that_concern_all_rows_arrive_as_they_are(engine: RayEngine) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        answers(engine, [request(0), request(1, "refuse"), request(2)])
    assert type(caught.value) is MemoryBudgetError
    assert vars(caught.value) == {"message": "no memory for this", "hint": "give it more"}


def missing() -> RayDouble:
    raise NotFoundError("smolmix:q4 is not installed", "get it")


def test_a_model_that_is_not_there_is_said_as_ever(cluster: Cluster) -> None:
    engine = make(partial(missing))
    with pytest.raises(NotFoundError, match=r"^smolmix:q4 is not installed$") as caught:
        _ = engine.identity
    assert caught.value.hint == "get it"
    engine.close()


def small_or_not(log: str) -> RayDouble:
    """The first to come gets no memory."""
    with socket.socket(socket.AF_UNIX) as lot:
        try:
            lot.bind(f"{log}.lot")
        except OSError:
            return RayDouble(log)
    raise MemoryBudgetError("too small", "buy more")


@pytest.mark.parametrize("strict", [False, True])
def test_a_node_without_the_memory_is_left_out_unless_it_was_asked_for(
    cluster: Cluster, log: str, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    nodes = cluster.nodes()
    monkeypatch.setattr(Cluster, "nodes", lambda _: nodes * 2)  # two places, of one worker each
    engine = make(partial(small_or_not, log), 2 if strict else None)
    if strict:
        with pytest.raises(MemoryBudgetError, match="too small"):
            answers(engine, [request(n) for n in range(4)])
    else:
        assert len(answers(engine, [request(n) for n in range(4)])) == 4
        assert engine.concurrency == capacity(3)
    engine.close()


def differing(log: str) -> RayDouble:
    return RayDouble(log, identity={"model": "double", "weights": str(os.getpid())})


def test_workers_with_different_models_do_not_work_together(cluster: Cluster, log: str) -> None:
    engine = make(partial(differing, log))
    with pytest.raises(RefusedError, match=r"weights is \d+ on .* and \d+ on"):
        answers(engine, [request(n) for n in range(200)])
    engine.close()


def test_leaving_is_quick_and_not_the_end(engine: RayEngine) -> None:
    events = engine.answer(request(n) for n in range(1000))
    while not isinstance(next(events), Reply):
        pass
    start = time.monotonic()
    events.close()
    assert time.monotonic() - start < 1
    assert len(answers(engine, [request(n) for n in range(5)])) == 5


def test_a_worker_that_hangs_does_not_hold_up_the_batch(cluster: Cluster, log: str) -> None:
    engine = make(partial(RayDouble, log), patience=1.0)
    rows = [request(n, "hang once" if n == 3 else "") for n in range(14)]
    start = time.monotonic()
    assert answers(engine, rows) == {row.id: reply_to(row) for row in rows}
    assert time.monotonic() - start < 30
    engine.close()


def dying() -> RayDouble:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_workers_that_only_die_are_not_replaced_for_ever(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_roll, "DEATHS_PER_SLOT", 2)
    engine = make(partial(dying), 1)
    with pytest.raises(MixlocalError, match="died 2 times and answered nothing"):
        _ = engine.identity
    engine.close()


def test_a_disturbed_driver_talks_only_itself_and_leaves_nothing(tmp_path: Path, log: str) -> None:
    """A terminal's Ctrl-C reaches only the driver; Ray says nothing of a dead worker; killing the driver ends all."""
    pytest.importorskip("ray")
    command = [sys.executable, str(DRIVER), log]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True,
        env=plain | {"HOME": str(tmp_path)},
    ) as driver:  # fmt: skip
        said = [json.loads(line) for line in read(driver, "answered", 3)]
        assert said[0] == {"ray": False}, "imported before it was wanted"
        assert said[1]["refused"].startswith("no Ray cluster answers at 127.0.0.1:1")
        os.killpg(driver.pid, signal.SIGINT)
        said += [json.loads(line) for line in read(driver, "answered", 10)]
        assert {"interrupted": True} in said
        assert not any("note" in what for what in said), "a worker heard the interrupt"
        below = psutil.Process(driver.pid).children(recursive=True)
        actors = [process for process in below if process.cmdline()[0].startswith("ray::Worker")]
        actors[0].kill()
        said += [json.loads(line) for line in read(driver, "note", 1)]
        driver.send_signal(signal.SIGTERM)
        said += [json.loads(line) for line in read(driver, "answered", 12)]
        assert {"terminated": True} in said, "Ray took the signal"
        below = psutil.Process(driver.pid).children(recursive=True)
        assert len([process for process in below if process.is_running()]) >= 4
        assert listening(below) <= {"127.0.0.1", "::ffff:127.0.0.1"}
        agents = [process for process in below if process.cmdline()[0].endswith("Agent")]  # these take a minute
        driver.kill()
        _, alive = psutil.wait_procs([process for process in below if process not in agents], timeout=15)
        assert alive == []
        assert driver.stderr is not None
        assert driver.stderr.read() == ""
    assert not (tmp_path / ".ray").exists()


def read(driver: subprocess.Popen[str], what: str, count: int) -> list[str]:
    """Lines until so many tell of that."""
    assert driver.stdout is not None
    lines: list[str] = []
    while sum(f'"{what}"' in line for line in lines) < count:
        lines.append(driver.stdout.readline())
        assert lines[-1], driver.stderr and driver.stderr.read()
    return lines


def listening(processes: list[psutil.Process]) -> set[str]:
    """The addresses where any of them takes connections."""
    found = set()
    for process in processes:
        try:
            found |= {link.laddr.ip for link in process.net_connections("tcp") if link.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return found
