"""What `doctor` looks at."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from mixlocal import __version__
from mixlocal.app.hardware import Hardware, existing_parent, probe
from mixlocal.app.measure import sample_bandwidth
from mixlocal.app.model_run import NO_KERNELS_COST, REFERENCE_COST
from mixlocal.errors import MixlocalError, UsageError
from mixlocal.kernels import select
from mixlocal.kernels.isa import ISA_VARIABLE, MISSING, chosen_isa, native_isas, set_threads
from mixlocal.store.disk_speed import record_seconds
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.model_store import ModelStore, find_stores
from mixlocal.store.paths import Home

LIBRARIES = ("torch", "tokenizers", "sentencepiece", "safetensors")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. cost: what a lack means for the user."""

    verdict: Literal["good", "lack", "bad"]
    what: str
    found: str
    cost: str = ""


def checkup(folders: Home) -> list[Finding]:
    hardware = probe(folders.models)
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    bandwidth = _bandwidth(hardware.cores)
    return [
        Finding(
            "good",
            "mixlocal",
            f"{__version__}, Python {platform.python_version()}, {sys.platform} {platform.machine()}",
        ),
        Finding("good", "libraries", libraries),
        _kernels(),
        *_gpus(hardware),
        Finding("good", "processor", f"{hardware.cores} physical cores this process may use"),
        Finding("good", "memory", f"{hardware.ram_free / 1e9:.1f} GB free of {hardware.ram_total / 1e9:.1f} GB"),
        *([bandwidth] if bandwidth else []),
        _disk(folders, hardware.disk_free),
        *_storage(folders),
    ]


def _kernels() -> Finding:
    if MISSING:
        return Finding("lack", "kernels", f"not compiled: {MISSING}", NO_KERNELS_COST)
    try:
        isa = chosen_isa()
    except UsageError as error:
        return Finding("bad", "kernels", error.message, error.hint)
    if isa is None:
        return Finding("lack", "kernels", f"{ISA_VARIABLE} asks for PyTorch", REFERENCE_COST)
    others = ", ".join(name for name in native_isas() if name != isa)
    return Finding("good", "kernels", f"compiled, {isa} (also here: {others})")


def _bandwidth(cores: int) -> Finding | None:
    """What decoding is bound by. None where there is nothing to measure it with."""
    try:
        if chosen_isa() is None:
            return None
    except UsageError:
        return None
    set_threads(cores)
    rates = sample_bandwidth() + sample_bandwidth()
    return Finding("good", "bandwidth", f"{max(rates) / 1e9:.0f} GB/s of memory read by {cores} threads")


def _gpus(hardware: Hardware) -> list[Finding]:
    none = Finding("lack", "GPU", "none", "everything works on the processor, at the speed of its memory")
    found = []
    for index, gpu in enumerate(hardware.gpus):
        what = f"{gpu.name}, {gpu.free / 1e9:.1f} GB free of {gpu.total / 1e9:.1f} GB"
        try:
            select(f"cuda:{index}")
        except UsageError as error:
            found.append(Finding("bad", "GPU", what, f"{error.message}; {error.hint}"))
        else:
            found.append(Finding("good", "GPU", what))
    return found or [none]


def _storage(folders: Home) -> list[Finding]:
    """What experts that do not fit in memory wait for. Measured on a model that is here, if there is one."""
    stores = [store for store in find_stores(folders.models) if isinstance(store, ModelStore)]
    if not stores:
        return []
    largest = max(stores, key=lambda store: store.manifest.experts_bytes)
    record = largest.manifest.stride
    try:
        seconds = record_seconds(largest.folder / EXPERTS_FILE, record, direct=True)
    except MixlocalError as error:
        return [Finding("bad", "disk speed", error.message, error.hint)]
    if not seconds:
        return []
    return [Finding("good", "disk speed", f"{record / seconds / 1e6:.0f} MB/s, reads of {record / 1e6:.1f} MB")]


def _disk(folders: Home, free: int) -> Finding:
    parent = existing_parent(folders.models)
    if not os.access(parent, os.W_OK):
        return Finding("bad", "disk", f"{parent} is not writable", "nothing can be pulled; choose a folder with --home")
    if free < 2_000_000_000:
        return Finding("lack", "disk", f"{free / 1e9:.1f} GB free in {parent}", "building smolmix takes 2 GB")
    return Finding("good", "disk", f"{free / 1e9:.1f} GB free in {parent}")
