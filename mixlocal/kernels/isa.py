"""The compiled kernels' instruction sets and threads, and what to say where there are none."""

from __future__ import annotations

import os
import time
from functools import cache
from typing import TYPE_CHECKING

import torch

from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from mixlocal.kernels.native import _native

try:
    from mixlocal.kernels.native import _native

    MISSING = ""
except ImportError as error:  # no compiler when mixlocal was installed
    MISSING = str(error)

ISA_VARIABLE = "MIXLOCAL_ISA"
REFERENCE = "reference"  # as a value of MIXLOCAL_ISA: PyTorch, although the compiled kernels are there


def native_isas() -> tuple[str, ...]:
    """The compiled instruction sets that this machine can run, best first; empty where none were built."""
    return () if MISSING else tuple(_native.available_isas())


def native_isa() -> str | None:
    """The best of `native_isas()`, or None; `MISSING` says why there is none."""
    return next(iter(native_isas()), None)


def chosen_isa() -> str | None:
    """What MIXLOCAL_ISA asks for, else the best; None means the reference.

    Raises `UsageError` if this machine does not have what is asked for.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return native_isa()
    if wanted == REFERENCE:
        return None
    if wanted not in native_isas():
        raise no_such_isa(wanted)
    return wanted


@cache
def native_kernels(isa: str) -> _native.Kernels:
    """The compiled module's kernels for one instruction set. Raises `UsageError` if this machine does not have it."""
    if isa not in native_isas():
        raise no_such_isa(isa)
    return _native.Kernels(isa)


def set_threads(count: int) -> None:
    """Compute with `count` threads, 1 or more.

    Where the compiled kernels do the work, PyTorch keeps to one thread: its own would wait for each other by spinning
    after every small operation, and a busy neighbour on the machine then costs ten times the work.
    """
    if count < 1:
        raise UsageError(f"{count} threads cannot compute anything", "use 1 or more")
    if chosen_isa() is None:
        torch.set_num_threads(count)
    else:
        torch.set_num_threads(1)
        _native.set_threads(count)


def read_bandwidth(nbytes: int, repeats: int) -> list[float]:
    """Bytes per second at which all threads together read `nbytes` of memory, `repeats` times.

    Take `nbytes` well above the last level of cache. Raises `UsageError` where nothing is compiled.
    """
    isa = chosen_isa()
    if isa is None:
        raise UsageError("memory bandwidth is measured by the compiled kernels, which are not here", MISSING)
    data = torch.ones(nbytes, dtype=torch.uint8)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        native_kernels(isa).read(data.data_ptr(), nbytes)
        rates.append(nbytes / (time.perf_counter() - start))
    return rates


def no_such_isa(isa: str) -> UsageError:
    names = ", ".join((*native_isas(), REFERENCE))
    return UsageError(f"this machine has no {isa!r} kernels", f"set {ISA_VARIABLE} to one of: {names}")
