"""The journal of a batch, torn, damaged, and on a disk that fails."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mixlocal.errors import CorruptError, DiskFullError, PermissionDeniedError
from mixlocal.store import batch_journal, durable
from mixlocal.store.batch_journal import BatchJournal

ROWS = [(bytes([n]) * 32, n % 3 > 0, b'{"n":%d}' % n) for n in range(6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = BatchJournal(tmp_path / "journal")
    for row in ROWS:
        journal.append(*row)
    journal.close()
    return tmp_path / "journal"


def rows(journal: BatchJournal) -> list[tuple[bytes, bool, bytes]]:
    return [(place.key, place.good, journal.read(place.offset, place.nbytes)) for place in journal.places()]


def reopened(path: Path) -> tuple[list[tuple[bytes, bool, bytes]], int]:
    journal = BatchJournal(path)
    found = rows(journal), journal.damaged
    journal.close()
    return found


def failing(name: str, number: int, at: int = 1) -> Callable[[str, int], int]:
    """An `on_call` that fails at the at-th call of one name."""
    calls = 0

    def on_call(called: str, nbytes: int) -> int:
        nonlocal calls
        calls += called == name
        if called == name and calls >= at:
            raise OSError(number, os.strerror(number))
        return nbytes

    return on_call


def test_what_is_appended_is_there_again(path: Path) -> None:
    assert reopened(path) == (ROWS, 0)


def test_torn_at_every_byte(path: Path) -> None:
    """A prefix of the file is a prefix of its rows; and what comes next is written behind it."""
    data = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(data) if byte == ord("\n")]
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        whole = sum(end <= length for end in ends)
        journal = BatchJournal(path)
        assert (rows(journal), journal.damaged) == (ROWS[:whole], 0)
        journal.append(*ROWS[-1])
        journal.close()
        assert reopened(path) == ([*ROWS[:whole], ROWS[-1]], 0)


def test_zeros_that_a_power_loss_left(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data + bytes(5000))
    assert reopened(path) == (ROWS, 0)
    assert path.read_bytes() == data


def test_every_flipped_bit_costs_one_row_and_is_told_once(path: Path) -> None:
    data = path.read_bytes()
    rng = random.Random(4)
    for _ in range(400):
        at = rng.randrange(len(data))
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        found, damaged = reopened(path)
        lost = [row for row in ROWS if row not in found]
        assert 1 <= len(lost) <= 2, at  # two where the newline between them is gone
        assert [row for row in ROWS if row in found] == found
        assert damaged >= 1 or at == len(data) - 1
        assert reopened(path) == (found, 0)


def test_foreign_lines_are_no_rows(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(b"hello\n\n" + data + b"0 1 2 3\n" + b"\x00\xff\n")
    assert reopened(path) == (ROWS, 4)


def test_what_changes_under_us_is_seen(path: Path) -> None:
    journal = BatchJournal(path)
    place = next(journal.places())
    with path.open("r+b") as file:
        file.seek(place.nbytes - 3)
        file.write(b"9")
    with pytest.raises(CorruptError, match="changed while it was in use"):
        journal.read(place.offset, place.nbytes)
    journal.close()


def test_it_is_on_disk_a_second_later(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    calls: list[str] = []
    monkeypatch.setattr(batch_journal.time, "monotonic", lambda: now)
    journal = BatchJournal(path)
    monkeypatch.setattr(durable, "on_call", lambda name, nbytes: calls.append(name) or nbytes)
    journal.sync_if_due()
    assert calls == []
    journal.append(*ROWS[0])
    now += 0.9
    journal.append(*ROWS[1])
    journal.sync_if_due()
    assert calls == ["write", "write"]
    now += 0.1
    journal.sync_if_due()
    journal.sync_if_due()
    assert calls == ["write", "write", "fsync"]
    journal.close()
    assert calls == ["write", "write", "fsync"]


def test_a_full_disk_tears_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = BatchJournal(path)
    with monkeypatch.context() as patched:
        patched.setattr(durable, "on_call", _short_then_full())
        with pytest.raises(DiskFullError):
            journal.append(*ROWS[0])
    journal.append(*ROWS[1])
    journal.close()
    assert reopened(path) == ([*ROWS, ROWS[1]], 0)


def _short_then_full() -> Callable[[str, int], int]:
    calls = 0

    def on_call(name: str, nbytes: int) -> int:
        nonlocal calls
        calls += name == "write"
        if name == "write" and calls > 1:
            raise OSError(errno.ENOSPC, "no space left")
        return nbytes // 2 if name == "write" else nbytes

    return on_call


def test_what_the_disk_did_not_take_is_lost_for_good(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second fsync is believed: the rows since the last good one are given up."""
    journal = BatchJournal(path)
    journal.append(*ROWS[0])
    journal.sync()
    journal.append(*ROWS[1])
    with monkeypatch.context() as patched:
        patched.setattr(durable, "on_call", failing("fsync", errno.EIO))
        with pytest.raises(CorruptError):
            journal.sync()
    journal.close()
    assert reopened(path) == ([*ROWS, ROWS[0]], 0)


def test_a_sync_that_fails_at_the_beginning_takes_nothing_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(durable, "on_call", failing("fsync", errno.EIO))
        with pytest.raises(CorruptError):
            BatchJournal(path)
    assert reopened(path) == (ROWS, 0)


def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("mine\n")
    (tmp_path / "journal").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionDeniedError):
        BatchJournal(tmp_path / "journal")
    assert (tmp_path / "elsewhere").read_text() == "mine\n"
