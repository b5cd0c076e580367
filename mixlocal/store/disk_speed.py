"""How long a record takes to come from a disk, read and checked as the runtime does it."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
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


def record_seconds(path: Path, nbytes: int, *, direct: bool, pause: float = 0.0) -> float | None:
    """Mean seconds of one read of `nbytes`, whole pages, at random places of a file; None if the file is too small.

    direct: past the page cache; else from wherever the bytes happen to be.  pause: seconds between two reads, each of
    which is then handed to a thread and waited for, as while decoding; without, one follows the other.
    """
    with named_errors(path):
        descriptor, _ = open_to_read(path, direct)
        try:
            places = os.fstat(descriptor).st_size // nbytes
            if not places:
                return None
            order = random.sample(range(places), min(places, MOST_READS))
            return fmean(_timed(descriptor, order, nbytes, pause))
        finally:
            os.close(descriptor)


def _timed(descriptor: int, order: list[int], nbytes: int, pause: float) -> list[float]:
    assert nbytes % RECORD_ALIGNMENT == 0
    slot = page_memory(nbytes)
    slot.zero_()  # the first touch of memory is not the disk's
    seconds: list[float] = []

    def read(place: int) -> None:
        os.preadv(descriptor, [byte_view(slot)], place * nbytes)
        xxhash.xxh3_128(byte_view(slot)).digest()

    begin = time.perf_counter()
    with ThreadPoolExecutor(1) as reader:
        for place in order:
            time.sleep(pause)
            start = time.perf_counter()
            if pause:
                reader.submit(read, place).result()
            else:
                read(place)
            seconds.append(time.perf_counter() - start)
            if time.perf_counter() - begin > SECONDS:
                break
    return seconds
