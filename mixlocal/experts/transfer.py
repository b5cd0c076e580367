"""Disk -> memory: a few threads, each filling one slot at a time, what is waited for before what is only expected."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from enum import IntEnum

import torch

from mixlocal.errors import MixlocalError
from mixlocal.store.expert_file import ExpertFile

QUEUE_DEPTH = 4  # reads at once; the system splits a record into many requests of its own


class Urgency(IntEnum):
    """The order in which reads begin."""

    DEMAND = 0  # a layer waits for it
    PREFETCH = 1  # the next layer is thought to need it
    PRELOAD = 2  # often used, and there is room


@dataclass(slots=True, eq=False)
class Read:
    """One record on its way into `slot`. arrived: all bytes are there, or never will be. done: nothing more happens.
    loaded: it is there and checked; else error says why not, unless it was cancelled."""

    key: int
    slot: torch.Tensor
    urgency: Urgency
    begun: bool = False
    arrived: bool = False
    done: bool = False
    loaded: bool = False
    error: MixlocalError | None = None


class ExpertReader:
    """Reads of one store. Its threads only fill slots; all else is asked of the one thread that owns the slots."""

    def __init__(self, file: ExpertFile, depth: int = QUEUE_DEPTH) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._work, self._finished = threading.Condition(self._lock), threading.Condition(self._lock)
        self._queues: tuple[deque[Read], ...] = tuple(deque() for _ in Urgency)
        self._closed = False
        self._busy, self._serving = 0, depth  # reads under way, threads that are left
        for index in range(depth):
            threading.Thread(target=self._serve, name=f"experts-{index}", daemon=True).start()

    def start(self, read: Read) -> Read:
        with self._lock:
            self._queues[read.urgency].append(read)
            self._work.notify()
        return read

    def hurry(self, read: Read) -> None:
        """It is waited for now."""
        with self._lock:
            if not read.begun:
                self._queues[read.urgency].remove(read)
                read.urgency = Urgency.DEMAND
                self._queues[read.urgency].append(read)

    def cancel(self, read: Read) -> bool:
        """True if it had not begun and never will."""
        with self._lock:
            if read.begun:
                return False
            self._queues[read.urgency].remove(read)
            read.begun = read.arrived = read.done = True
            return True

    def wait(self, reads: Collection[Read]) -> list[Read]:
        """Those of `reads` that have arrived: at least one. They may not have been checked yet."""
        with self._lock:
            while True:
                arrived = [read for read in reads if read.arrived]
                if arrived:
                    return arrived
                self._finished.wait()

    def wait_done(self, reads: Collection[Read]) -> None:
        """Until all of `reads` are over: checked, failed or cancelled."""
        with self._lock:
            while not all(read.done for read in reads):
                self._finished.wait()

    def drain(self) -> None:
        """Until none is under way: those that have not begun never will."""
        with self._lock:
            for queue in self._queues:
                queue.clear()
            while self._busy:
                self._finished.wait()

    def close(self) -> None:
        """No read begins any more. The file is closed when the last that has begun is over; nobody waits for it."""
        with self._lock:
            self._closed = True
            self._work.notify_all()

    def _serve(self) -> None:
        while (read := self._next()) is not None:
            layer, expert = divmod(read.key, self._file.manifest.n_experts)
            try:
                self._file.fill(layer, expert, read.slot)
                with self._lock:
                    read.arrived = True
                    self._finished.notify_all()
                self._file.check(layer, expert, read.slot)
                read.loaded = True
            except MixlocalError as error:  # raised where the read is waited for
                read.error = error
            finally:
                with self._lock:
                    read.arrived = read.done = True
                    self._busy -= 1
                    self._finished.notify_all()

    def _next(self) -> Read | None:
        with self._lock:
            while not self._closed:
                for queue in self._queues:
                    if queue:
                        read = queue.popleft()
                        read.begun = True
                        self._busy += 1
                        return read
                self._work.wait()
            self._serving -= 1
            if not self._serving:
                self._file.close()
        return None
