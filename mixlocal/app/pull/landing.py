"""Shards on their way to this disk, quantized tensor by tensor behind the last byte that landed.

What is made of bytes whose hash is not known yet counts only when the whole shard has proved right; then the shard is
freed. So downloading and quantizing overlap, and no bytes of a damaged or changed file get into a store.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle

import torch

from mixlocal.app.progress import FileProgress, Notice, Progress, Step
from mixlocal.app.pull.survey import Shard
from mixlocal.app.quantization import Quantization
from mixlocal.errors import CorruptError, RefusedError
from mixlocal.quant.packing import byte_view
from mixlocal.store.building import Origin
from mixlocal.store.checkpoint import TensorRef
from mixlocal.store.download import Arrived, Event, Failed, Fetcher, Rewound, Waiting, Work
from mixlocal.store.part_file import PartFile
from mixlocal.store.patience import Cancellation

POLL_SECONDS = 0.01
TELL_SECONDS = 0.1
STOP_SECONDS = 0.3


@dataclass
class Landing:
    """A shard and how far it has come. next: index of its next tensor. round: grows when it begins again."""

    shard: Shard
    work: Work
    next: int = 0
    round: int = 0
    arrived: bool = False
    doubt: bool = False  # a tensor made no sense: perhaps the bytes are wrong, which its hash will tell
    header_seen: bool = False

    @property
    def name(self) -> str:
        return self.shard.file.path

    @property
    def used_up(self) -> bool:
        return self.arrived and self.next == len(self.shard.tensors)

    def begin_again(self) -> None:
        self.next, self.round = 0, self.round + 1
        self.arrived = self.doubt = self.header_seen = False


@dataclass(frozen=True, slots=True)
class _Read:
    """A tensor that is being read while another is quantized."""

    landing: Landing
    round: int
    index: int
    ref: TensorRef
    data: Future[torch.Tensor]


@dataclass
class Landings:
    """Drives the shards to their end. total: bytes of all shards, those of earlier calls included."""

    task: Quantization
    landings: list[Landing]
    fetcher: Fetcher
    events: deque[Event]
    cancellation: Cancellation
    total: int
    keep: bool
    done: int = 0  # bytes of shards that need no more work
    _ahead: _Read | None = None
    _freeing: list[tuple[Landing, Future[None]]] = field(default_factory=list)
    _told: float = 0.0
    _notices: list[Notice] = field(default_factory=list)

    def run(self) -> Iterator[Step]:
        """Raises whatever ends the download or the quantizing."""
        size = max((ref.nbytes for one in self.landings for ref in one.shard.tensors), default=0)
        buffers = cycle([torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)])
        reader, syncer = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        try:
            self.fetcher.start()
            while self.landings:
                self._hear()
                found = self._find()
                if found is None and self._ahead is None and not self._free(syncer):
                    self.cancellation.wait(POLL_SECONDS)
                ahead, self._ahead = self._ahead, self._start(found, reader, next(buffers)) if found else None
                if ahead is not None:
                    self._use(ahead)
                self._free(syncer)
                yield from self._progress()
        finally:
            self.cancellation.cancel()
            self.fetcher.stop(STOP_SECONDS)
            for pool in (reader, syncer):  # a sync may take long, and nobody needs it any more
                pool.shutdown(wait=False, cancel_futures=True)

    def _hear(self) -> None:
        """What the workers have to tell."""
        while self.events:
            match self.events.popleft():
                case Waiting() as waiting:
                    self._notices.append(Notice(waiting.text))
                case Rewound(file, reason):
                    self._notices.append(Notice(f"{file}: {reason}; fetching it again"))
                    self._begin_again(self._named(file))
                case Arrived(file):
                    self._check_arrived(self._named(file))
                case Failed(error):
                    raise error

    def _named(self, file: str) -> Landing:
        return next(one for one in self.landings if one.name == file)

    def _begin_again(self, landing: Landing) -> None:
        landing.begin_again()
        self.task.revoke(landing.name, 0)

    def _check_arrived(self, landing: Landing) -> None:
        """Its hash is right. Raises `CorruptError` if what we read of its header beforehand was not."""
        landing.arrived, landing.doubt = True, False
        if not self._header_is_right(landing):
            self.task.revoke(landing.name, 0)
            raise CorruptError(f"{landing.name}: its header came differently at first", "run the same command again")

    def _header_is_right(self, landing: Landing) -> bool:
        header = bytearray(len(landing.shard.header))
        landing.work.part.read_into(0, memoryview(header))
        return header == landing.shard.header

    def _find(self) -> tuple[Landing, int] | None:
        """A tensor that has landed and is not in the store yet."""
        for landing in self.landings:
            if landing.doubt or not self._header_landed(landing):
                continue
            tensors = landing.shard.tensors
            while landing.next < len(tensors) and not self.task.lacks(tensors[landing.next].name):
                landing.next += 1
            if landing.next == len(tensors):
                continue
            ref = tensors[landing.next]
            if landing.work.landed >= ref.offset + ref.nbytes:
                landing.next += 1
                return landing, landing.next - 1
        return None

    def _header_landed(self, landing: Landing) -> bool:
        if not landing.header_seen and landing.work.landed >= len(landing.shard.header):
            try:
                landing.doubt = not self._header_is_right(landing)
            except CorruptError:  # it was begun again meanwhile, and we shall hear of that
                return False
            landing.header_seen = True
        return landing.header_seen and not landing.doubt

    def _start(self, found: tuple[Landing, int], reader: ThreadPoolExecutor, buffer: torch.Tensor) -> _Read:
        landing, index = found
        ref = landing.shard.tensors[index]

        def read() -> torch.Tensor:
            data = buffer[: ref.nbytes]
            landing.work.part.read_into(ref.offset, byte_view(data))
            return data.view(ref.dtype).view(ref.shape)

        return _Read(landing, landing.round, index, ref, reader.submit(read))

    def _use(self, read: _Read) -> None:
        """Quantize a tensor. One that makes no sense is tried again when its shard's hash is known to be right."""
        landing = read.landing
        try:
            tensor = read.data.result()
        except CorruptError as error:  # the file ended early: it was begun again meanwhile, or our disk is bad
            self._put_off(read, error)
            return
        if read.round != landing.round:
            return
        try:
            self.task.add(read.ref, tensor, Origin(landing.name, read.ref.offset + read.ref.nbytes))
        except RefusedError as error:
            self._put_off(read, error)

    def _put_off(self, read: _Read, error: CorruptError | RefusedError) -> None:
        """Raises `error` if the bytes are known to be right."""
        landing = read.landing
        if landing.arrived and landing.round == read.round:
            raise error
        if landing.round == read.round:
            landing.next, landing.doubt = min(landing.next, read.index), True

    def _free(self, syncer: ThreadPoolExecutor) -> bool:
        """Let go of shards that are used up, once what was made of them is on the disk; whether any was."""
        reading = self._ahead.landing if self._ahead else None
        for landing in self.landings:
            if landing.used_up and landing is not reading and all(one is not landing for one, _ in self._freeing):
                self.task.accept(landing.name, landing.shard.file.digest.value)
                self._freeing.append((landing, syncer.submit(self.task.sync)))
        freed = [(landing, synced) for landing, synced in self._freeing if synced.done()]
        for landing, synced in freed:
            synced.result()
            self._freeing.remove((landing, synced))
            self._let_go(landing)
        return bool(freed)

    def _let_go(self, landing: Landing) -> None:
        part = landing.work.part
        if not isinstance(part, PartFile):
            part.close()
        elif self.keep:
            part.keep()
        else:
            part.remove()
        self.landings.remove(landing)
        self.done += landing.shard.file.nbytes
        self.fetcher.release()

    def _progress(self) -> Iterator[Step]:
        yield from self._notices
        self._notices.clear()
        now = time.monotonic()
        if now - self._told < TELL_SECONDS and self.landings:
            return
        self._told = now
        quantized, landed = self.done, self.done
        for landing in self.landings:
            landed += landing.work.landed
            quantized += sum(ref.nbytes for ref in landing.shard.tensors[: landing.next])
            if landing.work.landed:
                yield FileProgress(landing.name, landing.work.landed, landing.shard.file.nbytes)
        yield Progress("download", landed, self.total)
        yield Progress("quantize", quantized, self.total)
