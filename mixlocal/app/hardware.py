"""What this machine has, as far as this process may use it."""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 1 << 62
THREAD_BYTES = 450_000_000  # of address space: glibc reserves 64 MB a thread, and 8 MB of stack
TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device; bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """Bytes and counts; cgroup limits and CPU affinity are respected. cores: physical ones, at least 1."""

    cores: int
    ram_total: int
    ram_free: int
    disk_free: int
    gpus: tuple[Gpu, ...] = ()


def probe(folder: Path) -> Hardware:
    """disk_free is of the file system that holds `folder`, or its nearest existing parent."""
    memory = psutil.virtual_memory()
    limit, free = _cgroup_memory()
    total = min(memory.total, limit)
    return Hardware(
        cores=max(1, min(physical_cores(TOPOLOGY), _cgroup_cores())),
        ram_total=total,
        ram_free=max(0, min(memory.available, free, _addresses())),
        disk_free=shutil.disk_usage(existing_parent(folder)).free,
        gpus=_gpus(),
    )


def _gpus() -> tuple[Gpu, ...]:
    torch = sys.modules.get("torch")  # who has not loaded it computes nothing
    if torch is None or not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(torch.cuda.get_device_name(index), total, free))
    return tuple(found)


def _addresses() -> int:
    """Bytes that this process may still map under its RLIMIT_AS (ulimit -v), but for threads' stacks and heaps."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return UNLIMITED
    used: int = psutil.Process().memory_info().vms
    return limit - used - THREAD_BYTES


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
    """Whole processors' worth of time that this process's cgroup and all above it may use, rounded up; without a
    limit, beyond any machine."""
    v2 = [(folder / "cpu.max",) for folder in _cgroup_folders("", CGROUP)]
    v1 = [
        (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us") for folder in _cgroup_folders("cpu", CGROUP / "cpu")
    ]
    cores = UNLIMITED
    for files in [*v2, *v1]:
        try:
            quota, period = " ".join(file.read_text() for file in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def existing_parent(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _cgroup_memory() -> tuple[int, int]:
    """(limit, free) of this process's memory cgroup and all above it; without any, beyond any machine.

    Page cache that the kernel takes back when it is needed counts as free.
    """
    limit = free = UNLIMITED
    v2 = [(folder / "memory.max", folder / "memory.current") for folder in _cgroup_folders("", CGROUP)]
    v1 = [
        (folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes")
        for folder in _cgroup_folders("memory", CGROUP / "memory")
    ]
    for limit_file, used_file in [*v2, *v1]:
        try:
            allowed, used = limit_file.read_text().strip(), int(used_file.read_text())
        except (OSError, ValueError):
            continue
        if allowed != "max":
            stat = _cgroup_stat(limit_file.parent)
            prefix = "total_" if "total_inactive_file" in stat else ""  # with what lies below it, as `used` is
            reclaimable = sum(int(stat.get(f"{prefix}{state}_file", 0)) for state in ("inactive", "active"))
            limit = min(limit, int(allowed))
            free = min(free, max(0, int(allowed) - max(0, used - reclaimable)))
    return limit, free


def _cgroup_stat(folder: Path) -> dict[str, str]:
    """What its memory is used for; empty where that is not told."""
    try:
        return dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return {}


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """This process's own cgroup and all above it up to `root`, where it is mounted. controller: "" for version 2."""
    try:
        lines = [line.split(":", 2) for line in MEMBERSHIP.read_text().splitlines()]
    except OSError:
        lines = []
    paths = [path for number, names, path in lines if controller in names.split(",") and (controller or number == "0")]
    own = root / paths[0].lstrip("/") if paths else root
    return [folder for folder in (own, *own.parents) if folder.is_relative_to(root)]
