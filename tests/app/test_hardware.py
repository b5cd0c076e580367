"""How many threads are worth starting, and how much memory is free, in a container as on a plain machine."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from mixlocal.app import hardware
from mixlocal.app.hardware import physical_cores, probe


def test_processors_that_share_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5}, raising=False)
    for processor, siblings in ((0, "0,4"), (1, "1,5"), (4, "0,4")):
        (tmp_path / str(processor)).write_text(siblings + "\n")
    assert physical_cores(str(tmp_path / "{}")) == 3  # nothing is known of processor 5
    assert physical_cores(str(tmp_path / "none" / "{}")) == 4


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the groups of a made-up machine are mounted; this process is in the one at the top."""
    root = tmp_path / "cgroup"
    root.mkdir()
    monkeypatch.setattr(hardware, "CGROUP", root)
    monkeypatch.setattr(hardware, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(hardware, "physical_cores", lambda _: 8)
    member(root, "0::/")
    return root


def member(root: Path, *lines: str) -> None:
    """What the system says of the groups that this process is in."""
    hardware.MEMBERSHIP.write_text("".join(line + "\n" for line in lines))


def write(folder: Path, **files: str) -> None:
    """Files of a group; an underscore in a name is a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text + "\n")


def group2(folder: Path, limit: str, used: int, cached: int = 0) -> None:
    write(folder, memory_max=limit, memory_current=str(used), memory_stat=f"anon 1\ninactive_file {cached}")


def group1(folder: Path, limit: int, used: int, cached: int = 0) -> None:
    """With what lies below it, as `used` is, and alone, which is less."""
    stat = f"cache 1\ninactive_file 1\nactive_file 1\ntotal_inactive_file {cached - 1}\ntotal_active_file 1"
    write(folder, memory_limit_in_bytes=str(limit), memory_usage_in_bytes=str(used), memory_stat=stat)


def memory(root: Path) -> tuple[int, int]:
    found = probe(root)
    return found.ram_total, found.ram_free


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("10000 100000", 1), ("max 100000", 8)])
def test_a_cgroup_limits_the_cores(quota: str, cores: int, cgroups: Path) -> None:
    write(cgroups, cpu_max=quota)
    assert probe(cgroups).cores == cores


@pytest.mark.parametrize(("quota", "cores"), [("250000", 3), ("-1", 8)])
def test_a_cgroup_of_version_1_limits_the_cores(quota: str, cores: int, cgroups: Path) -> None:
    member(cgroups, "4:cpu,cpuacct:/box", "0::/")
    write(cgroups / "cpu" / "box", cpu_cfs_quota_us=quota, cpu_cfs_period_us="100000")
    assert probe(cgroups).cores == cores


@pytest.mark.parametrize(("inner", "outer"), [("600000", "300000"), ("300000", "600000"), ("max", "300000")])
def test_the_tightest_of_nested_groups_limits_the_cores(inner: str, outer: str, cgroups: Path) -> None:
    member(cgroups, "0::/outer/inner")
    write(cgroups / "outer" / "inner", cpu_max=f"{inner} 100000")
    write(cgroups / "outer", cpu_max=f"{outer} 100000")
    assert probe(cgroups).cores == 3


def test_page_cache_counts_as_free(cgroups: Path) -> None:
    write(
        cgroups,
        memory_max="1000000",
        memory_current="600000",
        memory_stat="active_file 50000\ninactive_file 50000\nanon 500000",
    )
    assert memory(cgroups) == (1000000, 500000)


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        (("1000000", 100_000), ("2000000", 200_000), (1_000_000, 900_000)),
        (("2000000", 100_000), ("1000000", 300_000), (1_000_000, 700_000)),
        (("1000000", 100_000), ("2000000", 1_700_000), (1_000_000, 300_000)),  # neighbours use what is above
        (("max", 100_000), ("2000000", 500_000), (2_000_000, 1_500_000)),
        (("1000000", 1_200_000), ("max", 1_200_000), (1_000_000, 0)),  # over its limit for a moment
    ],
)
def test_the_tightest_of_the_own_group_and_all_above_it_counts(
    inner: tuple[str, int], outer: tuple[str, int], expected: tuple[int, int], cgroups: Path
) -> None:
    member(cgroups, "0::/outer/middle/inner")  # of the middle one nothing is known
    group2(cgroups / "outer" / "middle" / "inner", *inner)
    group2(cgroups / "outer", *outer)
    group2(cgroups / "other", "1000", 0)  # not ours
    assert memory(cgroups) == expected


@pytest.mark.parametrize(("ours", "expected"), [("/box/inner", (1_000_000, 600_000)), ("/", (1 << 30, 1 << 29))])
def test_groups_of_version_1(ours: str, expected: tuple[int, int], cgroups: Path) -> None:
    member(cgroups, "9:name=systemd:/elsewhere", f"4:memory:{ours}", "1:cpu,cpuacct:/box", "0::/")
    group1(cgroups / "memory", 1 << 30, 1 << 29)
    group1(cgroups / "memory" / "box", 1_000_000, 500_000, cached=100_000)
    group1(cgroups / "memory" / "box" / "inner", (1 << 63) - 4096, 100_000)  # that is version 1's "no limit"
    group1(cgroups / "memory" / "elsewhere", 1000, 0)
    assert memory(cgroups) == expected


def test_a_group_that_a_container_does_not_see_is_the_one_it_sees(cgroups: Path) -> None:
    """Its path is that of the machine, and what is mounted is the group itself."""
    member(cgroups, "4:memory:/docker/0123456789ab")
    group1(cgroups / "memory", 1_000_000, 300_000, cached=100_000)
    assert memory(cgroups) == (1_000_000, 800_000)


@pytest.mark.parametrize("missing", ["membership", "files", "nonsense"])
def test_what_is_missing_is_skipped(missing: str, cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole)
    group2(cgroups, "1000000", 300_000)
    if missing == "membership":
        hardware.MEMBERSHIP.unlink()
        assert memory(cgroups) == (1_000_000, 700_000)
        return
    if missing == "nonsense":
        (cgroups / "memory.current").write_text("many\n")
    else:
        (cgroups / "memory.max").unlink()
    assert memory(cgroups) == (whole.total, whole.available)
