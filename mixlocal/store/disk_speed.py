"""How long a record takes to come from a disk, read and checked as the runtime does it."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from statistics import fmean

import xxhash

from mixlocal.quant.format import RECORD_ALIGNMENT
from mixlocal.quant.packing import byte_view
from mixlocal.store.durable import named_errors
from mixlocal.store.expert_file import open_to_read
from mixlocal.store.memory import page_memory

SECONDS = 0.8
MOST_READS = 200


def record_seconds(path: Path, nbytes: int, *, direct: bool) -> float | None:
    """Mean seconds of one read of `nbytes`, whole pages, at random places of a file; None if the file is too small.

    direct: past the page cache; else from wherever the bytes happen to be.
    """
    with named_errors(path):
        descriptor, _ = open_to_read(path, direct)
        try:
            places = os.fstat(descriptor).st_size // nbytes
            if not places:
                return None
            order = random.sample(range(places), min(places, MOST_READS))
            return fmean(_timed(descriptor, order, nbytes))
        finally:
            os.close(descriptor)


def _timed(descriptor: int, order: list[int], nbytes: int) -> list[float]:
    assert nbytes % RECORD_ALIGNMENT == 0
    slot = page_memory(nbytes)
    slot.zero_()  # the first touch of memory is not the disk's
    seconds: list[float] = []
    begin = time.perf_counter()
    for place in order:
        start = time.perf_counter()
        os.preadv(descriptor, [byte_view(slot)], place * nbytes)
        xxhash.xxh3_128(byte_view(slot)).digest()
        seconds.append(time.perf_counter() - start)
        if time.perf_counter() - begin > SECONDS:
            break
    return seconds
