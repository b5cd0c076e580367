"""What this machine has, as far as this process may use it."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 62
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@dataclass(frozen=True, slots=True)
class Hardware:
    """Bytes and counts; cgroup limits and CPU affinity are respected. cores: physical ones, at least 1."""

    cores: int
    ram_total: int
    ram_free: int
    disk_free: int


def probe(folder: Path) -> Hardware:
    """disk_free is of the file system that holds `folder`, or its nearest existing parent."""
    memory = psutil.virtual_memory()
    limit, used = _cgroup_memory()
    total = min(memory.total, limit)
    return Hardware(
        cores=max(1, min(physical_cores(TOPOLOGY), _cgroup_cores())),
        ram_total=total,
        ram_free=max(0, min(memory.available, limit - used)),
        disk_free=shutil.disk_usage(existing_parent(folder)).free,
    )


def physical_cores(topology: str) -> int:
    """Cores behind the processors this process may run on: two that share a core do the work of one.

    `topology` names the file that lists a processor's siblings; where it is not there each processor is a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return len({_siblings(topology, processor) for processor in os.sched_getaffinity(0)})


def _siblings(topology: str, processor: int) -> str:
    try:
        return Path(topology.format(processor)).read_text().strip()
    except OSError:
        return str(processor)


def _cgroup_cores() -> int:
    """Whole processors' worth of time that this cgroup may use, rounded up; without a limit, beyond any machine."""
    for folder in _cgroup_folders():
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max":
            return math.ceil(int(quota) / int(period))
    try:
        v1 = CGROUP / "cpu"
        quota, period = (v1 / "cpu.cfs_quota_us").read_text(), (v1 / "cpu.cfs_period_us").read_text()
    except OSError:
        return UNLIMITED
    return math.ceil(int(quota) / int(period)) if int(quota) > 0 else UNLIMITED


def existing_parent(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _cgroup_memory() -> tuple[int, int]:
    """(limit, used) of this memory cgroup, page cache not counted; without one, a limit beyond any machine."""
    for limit_file, used_file in _cgroup_files():
        try:
            limit, used = limit_file.read_text().strip(), used_file.read_text().strip()
            stat = dict(line.split() for line in (limit_file.parent / "memory.stat").read_text().splitlines())
        except OSError:
            continue
        if limit != "max":
            reclaimable = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            return int(limit), max(0, int(used) - reclaimable)
    return UNLIMITED, 0


def _cgroup_folders() -> list[Path]:
    """This process's own cgroup (version 2) and the root."""
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    return [*(CGROUP / line.split(":", 2)[2].lstrip("/") for line in own if line.startswith("0::")), CGROUP]


def _cgroup_files() -> list[tuple[Path, Path]]:
    files = [(folder / "memory.max", folder / "memory.current") for folder in _cgroup_folders()]
    v1 = CGROUP / "memory"
    return [*files, (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes")]
