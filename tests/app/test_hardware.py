"""How many threads are worth starting, and how much memory is free, in a container as on a plain machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixlocal.app import hardware
from mixlocal.app.hardware import physical_cores, probe


def test_processors_that_share_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5}, raising=False)
    for processor, siblings in ((0, "0,4"), (1, "1,5"), (4, "0,4")):
        (tmp_path / str(processor)).write_text(siblings + "\n")
    assert physical_cores(str(tmp_path / "{}")) == 3  # nothing is known of processor 5
    assert physical_cores(str(tmp_path / "none" / "{}")) == 4


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 8)])
def test_a_cgroup_limits_the_cores(quota: str, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    monkeypatch.setattr(hardware, "physical_cores", lambda _: 8)
    assert probe(tmp_path).cores == cores


def test_a_cgroup_limits_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("600000\n")
    (tmp_path / "memory.stat").write_text("active_file 50000\ninactive_file 50000\nanon 500000\n")
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    found = probe(tmp_path)
    assert (found.ram_total, found.ram_free) == (1000000, 500000)
