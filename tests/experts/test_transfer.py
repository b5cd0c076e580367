"""Reads from disk: which begins first, and what becomes of those that fail, are given up, or are under way at the end.

A file that stands still at a gate in the middle of a read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from mixlocal.errors import CorruptError
from mixlocal.experts.transfer import ExpertReader, Read, Urgency

PATIENCE = 20.0  # seconds after which a test has failed rather than waits on
DEMAND, PREFETCH, PRELOAD = Urgency


class GatedFile:
    """Writes its key into a slot once the gate lets a read through; keys above 99 are damaged."""

    def __init__(self) -> None:
        self.manifest = SimpleNamespace(n_experts=8)
        self.order: list[int] = []
        self.readers: list[ExpertReader] = []
        self.closed = threading.Event()
        self._entered, self._gate = threading.Semaphore(0), threading.Semaphore(0)

    def fill(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        key = layer * 8 + expert
        self.order.append(key)
        self._entered.release()
        assert self._gate.acquire(timeout=PATIENCE)
        assert not self.closed.is_set()
        slot.fill_(key)

    def check(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        key = layer * 8 + expert
        if key > 99:
            raise CorruptError(f"record {key} is damaged")

    def close(self) -> None:
        assert not self.closed.is_set()
        self.closed.set()

    def until_begun(self, count: int = 1) -> None:
        for _ in range(count):
            assert self._entered.acquire(timeout=PATIENCE)

    def let(self, count: int) -> None:
        """So many reads go on."""
        self._gate.release(count)

    def reader(self, depth: int) -> ExpertReader:
        self.readers.append(ExpertReader(self, depth))  # type: ignore[arg-type]
        return self.readers[-1]


@pytest.fixture
def file() -> Iterator[GatedFile]:
    file = GatedFile()
    yield file
    file.let(1000)
    for reader in file.readers:
        reader.close()


def read(key: int, urgency: Urgency = DEMAND) -> Read:
    return Read(key, torch.zeros(4, dtype=torch.uint8), urgency)


def busy(file: GatedFile, depth: int = 1) -> tuple[ExpertReader, list[Read]]:
    """A reader all of whose threads stand at the gate, with reads of keys 0, 1, ..."""
    reader = file.reader(depth)
    reads = [reader.start(read(key)) for key in range(depth)]
    file.until_begun(depth)
    return reader, reads


def all_done(reader: ExpertReader, reads: list[Read]) -> None:
    left = reads
    while left:
        done = reader.wait(left)
        left = [read for read in left if read not in done]


def test_what_is_waited_for_begins_before_guesses_and_those_before_preloads(file: GatedFile) -> None:
    reader, reads = busy(file)
    for key, urgency in ((10, PRELOAD), (11, PREFETCH), (12, DEMAND), (13, PRELOAD), (14, PREFETCH), (15, DEMAND)):
        reads.append(reader.start(read(key, urgency)))
    file.let(7)
    all_done(reader, reads)
    assert file.order == [0, 12, 15, 11, 14, 10, 13]
    assert all(read.loaded and read.slot.tolist() == [read.key] * 4 for read in reads)


def test_a_guess_that_came_true_overtakes(file: GatedFile) -> None:
    reader, (first,) = busy(file)
    early, demanded = reader.start(read(10, PREFETCH)), reader.start(read(11))
    chosen, late = reader.start(read(12, PRELOAD)), reader.start(read(13, PREFETCH))
    reader.hurry(chosen)
    reader.hurry(first)  # is on its way: nothing to hurry
    file.let(5)
    all_done(reader, [first, early, demanded, chosen, late])
    assert file.order == [0, 11, 12, 10, 13]
    assert chosen.urgency is DEMAND


def test_a_read_can_be_given_up_until_it_has_begun(file: GatedFile) -> None:
    reader, (first,) = busy(file)
    wrong, right = reader.start(read(10, PREFETCH)), reader.start(read(11, PREFETCH))
    assert reader.cancel(wrong)
    assert (wrong.done, wrong.loaded, wrong.error) == (True, False, None)
    assert not reader.cancel(wrong)
    assert not reader.cancel(first)
    file.let(2)
    all_done(reader, [first, right])
    assert file.order == [0, 11]
    assert wrong.slot.tolist() == [0] * 4
    assert first.loaded


def test_waiting_ends_with_the_first_that_is_done(file: GatedFile) -> None:
    reader, reads = busy(file, depth=2)
    later = reader.start(read(2))
    threading.Timer(0.02, file.let, (1,)).start()
    (done,) = reader.wait([*reads, later])
    assert done in reads
    assert done.loaded
    assert sum(read.done for read in (*reads, later)) == 1
    file.let(2)
    all_done(reader, [*reads, later])
    assert set(reader.wait([*reads, later])) == {*reads, later}  # all of them, at once


def test_an_error_is_kept_with_its_read_and_the_others_go_on(file: GatedFile) -> None:
    reader, reads = busy(file)
    bad, good = reader.start(read(101)), reader.start(read(12))
    file.let(3)
    all_done(reader, [*reads, bad, good])
    assert (bad.done, bad.loaded) == (True, False)
    assert isinstance(bad.error, CorruptError)
    assert bad.error.message == "record 101 is damaged"
    assert (good.loaded, good.error) == (True, None)


def test_draining_ends_what_has_begun_and_drops_the_rest(file: GatedFile) -> None:
    reader, reads = busy(file, depth=2)
    waiting = [reader.start(read(key, urgency)) for key, urgency in ((10, DEMAND), (11, PREFETCH), (12, PRELOAD))]
    threading.Timer(0.02, file.let, (2,)).start()
    reader.drain()
    assert all(read.loaded for read in reads)
    assert not any(read.begun or read.done for read in waiting)
    again = reader.start(read(13))
    file.let(1)
    all_done(reader, [again])
    assert sorted(file.order) == [0, 1, 13]
    reader.drain()  # of nothing


def test_closing_waits_for_nobody_and_the_last_read_closes_the_file(file: GatedFile) -> None:
    reader, reads = busy(file, depth=2)
    never = reader.start(read(10))
    reader.close()
    assert not any(read.done for read in reads)
    file.let(1)
    (first,) = reader.wait(reads)
    assert not file.closed.is_set()
    file.let(1)
    assert file.closed.wait(PATIENCE)
    assert all(read.loaded for read in (first, *reads))
    assert (never.begun, len(file.order)) == (False, 2)


def test_closing_with_nothing_to_do_closes_the_file(file: GatedFile) -> None:
    reader = file.reader(depth=3)
    assert not file.closed.is_set()
    reader.close()
    assert file.closed.wait(PATIENCE)
