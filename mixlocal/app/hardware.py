"""What this machine has, as far as this process may use it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Hardware:
    """Bytes and counts; cgroup limits and CPU affinity are respected."""

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
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        ram_total=total,
        ram_free=max(0, min(memory.available, limit - used)),
        disk_free=shutil.disk_usage(existing_parent(folder)).free,
    )


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
    return 1 << 62, 0


def _cgroup_files() -> list[tuple[Path, Path]]:
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = [CGROUP / line.split(":", 2)[2].lstrip("/") for line in own if line.startswith("0::")]
    files = [(folder / "memory.max", folder / "memory.current") for folder in [*folders, CGROUP]]
    v1 = CGROUP / "memory"
    return [*files, (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes")]
