"""How fast the kernels of this machine are, each against the bandwidth of its memory at that moment.

Readings of the bandwidth and runs of every instruction set take turns and medians count: a busy neighbour takes from
all of them alike. Weights are random and lie in more memory than a cache holds; every run takes another copy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Literal

from mixlocal.app.bench_cases import KernelCase, stages
from mixlocal.app.hardware import Hardware
from mixlocal.app.measure import BANDWIDTH_BYTES, Running, sample_bandwidth
from mixlocal.errors import MemoryBudgetError
from mixlocal.kernels.isa import set_threads
from mixlocal.quant.format import Kind

NEEDED_BYTES = 2_500_000_000


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """threads: 1 or more each, every one measured in turn. quick: two token counts, few samples."""

    threads: tuple[int, ...]
    quick: bool = False

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 8

    @property
    def seconds(self) -> float:
        """A row gets no further sample after so long."""
        return 0.3 if self.quick else 3.0


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One measurement. Times and rates are of one run, which reads n_bytes of weights.

    test: "linear", x [n_tokens, columns] times a matrix [rows, columns]; "moe", one layer with rows = hidden and
    columns = dim; "read", the bandwidth alone over all samples of the run. read_bandwidth: bytes/s, the median of
    samples taken between this row's, None where the arithmetic decides or nothing is compiled. bandwidth_share:
    bytes_per_second of it.
    """

    test: Literal["linear", "moe", "read"]
    backend: str | None
    n_threads: int
    format: Kind | None
    rows: int | None
    columns: int | None
    n_tokens: int | None
    n_bytes: int
    median_ns: float
    samples_ns: tuple[float, ...]
    bytes_per_second: float
    flop_per_second: float | None
    read_bandwidth: float | None
    bandwidth_share: float | None


def check_memory(hardware: Hardware) -> None:
    """Raises `MemoryBudgetError` if the weights to rotate over do not fit."""
    needed, free = f"{NEEDED_BYTES / 1e9:.1f} GB", f"{hardware.ram_free / 1e9:.1f} GB"
    if hardware.ram_free < NEEDED_BYTES:
        raise MemoryBudgetError(
            f"timing the kernels takes {needed} of memory, and {free} are free", "close other programs"
        )


def run_kernels(request: KernelRequest) -> Iterator[Running | KernelRow]:
    """Measure every case on every instruction set; the bandwidth of the whole run comes last."""
    for threads in request.threads:
        set_threads(threads)
        reads: list[float] = []
        todo = stages(request.quick)
        for done, stage in enumerate(todo):
            for cases in stage():
                yield Running(cases[0].what, done, len(todo))
                yield from _measure(request, cases, threads, reads)
        if reads:
            yield _read_row(threads, reads)


def _measure(
    request: KernelRequest, cases: list[KernelCase], threads: int, all_reads: list[float]
) -> Iterator[KernelRow]:
    """Rows of cases that take turns; their readings of the bandwidth also go to `all_reads`."""
    reads: list[float] = []
    samples: list[list[float]] = [[] for _ in cases]
    for _ in range(request.rounds):
        if cases[0].memory_bound:
            reads += sample_bandwidth()
        for case, own in zip(cases, samples, strict=True):
            if sum(own) * case.calls < request.seconds * 1e9:
                own.append(_time(case))
    all_reads += reads
    for case, own in zip(cases, samples, strict=True):
        yield _row(case, threads, own[1:] or own, reads)  # the first warmed up


def _time(case: KernelCase) -> float:
    """Nanoseconds of one run, over as many as make a sample."""
    start = time.perf_counter_ns()
    for _ in range(case.calls):
        case.run()
    return (time.perf_counter_ns() - start) / case.calls


def _row(case: KernelCase, threads: int, samples: list[float], reads: list[float]) -> KernelRow:
    nanoseconds = median(samples)
    speed = case.n_bytes * 1e9 / nanoseconds
    read = median(reads) if reads else None
    return KernelRow(
        case.test, case.backend, threads, case.format, *case.shape, case.n_tokens, case.n_bytes,
        median_ns=nanoseconds, samples_ns=tuple(samples), bytes_per_second=speed,
        flop_per_second=case.n_flop * 1e9 / nanoseconds,
        read_bandwidth=read, bandwidth_share=speed / read if read else None,
    )  # fmt: skip


def _read_row(threads: int, reads: list[float]) -> KernelRow:
    speed, samples = median(reads), tuple(BANDWIDTH_BYTES * 1e9 / read for read in reads)
    return KernelRow(
        "read", None, threads, None, None, None, None, BANDWIDTH_BYTES,
        median_ns=median(samples), samples_ns=samples, bytes_per_second=speed, flop_per_second=None,
        read_bandwidth=speed, bandwidth_share=None,
    )  # fmt: skip
