"""Bytes of files at one commit, to this disk: whatever breaks, it goes on behind the last byte that landed.

huggingface-hub would begin a file again after every kill, compare its length only, and finish it before it obeys an
interrupt; so it only lists, and the bytes move here.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from mixlocal.errors import CorruptError, NetworkError
from mixlocal.store.digest import PIECE
from mixlocal.store.http import Answer, Client
from mixlocal.store.listing import RepoFile
from mixlocal.store.part_file import AdoptedFile, PartFile
from mixlocal.store.patience import CancelledError, RateLimit, TryAgainError

READ_BYTES = 1 << 19
GATHER_BYTES, GATHER_SECONDS = 1 << 18, 0.25  # what is held back before it is written: all that a kill can lose
MAX_ODD = 5  # answers in a row that make no sense
FIRST_WAIT, WAIT_LIMIT = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """Something went wrong with a file, and it is tried again after so many seconds."""

    file: str
    reason: str
    seconds: float

    @property
    def text(self) -> str:
        return f"{self.file + ': ' if self.file else ''}{self.reason}; again in {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class Rewound:
    """What had landed of a file was thrown away: what was made of it is worth nothing."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """A file is whole, and its hash is right."""

    file: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The download is over: its workers have stopped or are about to."""

    error: BaseException


class WrongBytesError(CorruptError):
    """What comes is not what the listing says, again and again: one of the two is wrong."""


Event = Waiting | Rewound | Arrived | Failed


@dataclass(frozen=True, slots=True)
class Remote:
    """Where the files of one commit are."""

    client: Client
    repository: str
    commit: str

    def url(self, path: str) -> str:
        return f"{self.client.endpoint.url}/{self.repository}/resolve/{self.commit}/{quote(path)}"

    def what(self, path: str) -> str:
        return f"{self.repository}/{path}" if path else self.repository


class Retries:
    """When to try again, and when to stop trying: counted from the last new byte."""

    def __init__(self, remote: Remote, path: str, tell: Callable[[Event], None]) -> None:
        self._remote, self._path, self._tell = remote, path, tell
        self._last_byte = time.monotonic()
        self._failures = self._odd = 0

    def progress(self) -> None:
        self._last_byte, self._failures, self._odd = time.monotonic(), 0, 0

    def wait(self, error: TryAgainError) -> None:
        """Sleep before another attempt. Raises `NetworkError` if there is none, `CancelledError`."""
        patience = self._remote.client.patience
        self._failures += 1
        self._odd = self._odd + 1 if error.odd else 0
        idle = time.monotonic() - self._last_byte
        if self._odd >= MAX_ODD or idle > (patience.give_up if self._remote.client.reached else patience.reach):
            raise NetworkError(
                f"{self._remote.what(self._path)}: {error.reason} ({self._failures} times, over {idle:.0f} s)",
                "run the same command again: it goes on where it was",
            )
        backoff = min(FIRST_WAIT * 2 ** min(self._failures - 1, 10), WAIT_LIMIT) * random.uniform(0.75, 1.25)
        seconds = min(max(backoff, error.wait or 0.0), patience.longest_wait)
        self._tell(Waiting(self._path, error.reason, seconds))
        self._remote.client.cancellation.wait(seconds)


def fetch_bytes(remote: Remote, file: RepoFile, tell: Callable[[Event], None], limit: int | None = None) -> bytes:
    """A small file, checked; or its first `limit` bytes, unchecked. Raises `WrongBytesError`, `NetworkError`, ..."""
    size = file.nbytes if limit is None else min(limit, file.nbytes)
    retries, wrong = Retries(remote, file.path, tell), 0
    while True:
        try:
            data = _first_bytes(remote, file, size)
        except TryAgainError as error:
            retries.wait(error)
            continue
        if limit is not None or file.digest.matches(data):
            return data
        wrong += 1
        if wrong == 2:
            raise _wrong_bytes(remote, file)


def _first_bytes(remote: Remote, file: RepoFile, size: int) -> bytes:
    part = {"Range": f"bytes=0-{size - 1}"} if size < file.nbytes else {}
    data = bytearray()
    with remote.client.get(remote.url(file.path), remote.what(file.path), part) as answer:
        _check_extent(answer, 0, file.nbytes)
        while len(data) < size and (piece := answer.read(min(READ_BYTES, size - len(data)))):
            data += piece
    if len(data) < size:
        raise TryAgainError("the connection ended early")
    return bytes(data)


class FileDownload:
    """One file on its way, driven by one worker; `landed` may be read by anyone."""

    def __init__(self, remote: Remote, part: PartFile, tell: Callable[[Event], None], limit: RateLimit) -> None:
        self.file, self.part = part.file, part
        self._remote, self._tell, self._limit = remote, tell, limit
        self._retries = Retries(remote, part.file.path, tell)
        self._rejected = False

    @property
    def landed(self) -> int:
        return self.part.landed

    def run(self) -> None:
        """To the last byte. Raises `NetworkError`, `WrongBytesError`, `DiskFullError`, ..., `CancelledError`."""
        self._hasher = self.part.rehash()
        while True:
            while self.part.landed < self.file.nbytes:
                try:
                    self._stream()
                except TryAgainError as error:
                    self._retries.wait(error)
            self.part.sync()
            if self._hasher.value == self.file.digest.value:
                self._tell(Arrived(self.file.path))
                return
            self._reject()

    def _stream(self) -> None:
        """What one connection brings, to the end of the file or of the connection."""
        start = self.part.landed
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and self.part.etag:
            headers["If-Range"] = self.part.etag
        what = self._remote.what(self.file.path)
        with self._remote.client.get(self._remote.url(self.file.path), what, headers) as answer:
            skip = self._align(answer)
            self._receive(answer, skip)
        if self.part.landed < self.file.nbytes:
            raise TryAgainError("the connection ended early")

    def _align(self, answer: Answer) -> int:
        """Bytes of the answer to pass over, because they are here already. Rewinds if the file is another now."""
        _check_extent(answer, self.part.landed if answer.start else 0, self.file.nbytes)
        known = self.part.etag
        if known and answer.etag and known != answer.etag and self.part.landed:
            self._rewind("it changed on the server")
            if answer.start:
                raise TryAgainError("the file changed on the server", odd=True)
        self.part.etag = _usable_etag(answer.etag)
        return self.part.landed - answer.start

    def _receive(self, answer: Answer, skip: int) -> None:
        gathered, pace = bytearray(), _Pace(self._remote.client)
        size = min(READ_BYTES, self._limit.piece or READ_BYTES)
        try:
            while True:
                room = self.file.nbytes - self.part.landed - len(gathered) + skip
                data = answer.read(min(size, room + 1))  # one more, to notice a body without end
                if len(data) > room:
                    raise TryAgainError("the server sent more than the file has", odd=True)
                pace.note(len(data))
                fresh = memoryview(data)[skip:]
                skip = max(0, skip - len(data))
                gathered += fresh
                if len(gathered) >= GATHER_BYTES or not data or pace.due():
                    self._land(gathered)
                    gathered = bytearray()
                if not data:
                    return
                self._remote.client.cancellation.wait(self._limit.delay(len(data)))
        finally:
            self._land(gathered)

    def _land(self, data: bytearray) -> None:
        if data:
            self.part.append(data)
            self._hasher.update(data)
            self._retries.progress()

    def _rewind(self, reason: str) -> None:
        self.part.rewind()
        self._hasher = self.file.digest.start(self.file.nbytes)
        self._tell(Rewound(self.file.path, reason))

    def _reject(self) -> None:
        """All bytes are here and the hash is wrong: put them aside and fetch the file once more."""
        bad = self.part.quarantine(self._hasher.value)
        self._hasher = self.file.digest.start(self.file.nbytes)
        self._tell(Rewound(self.file.path, f"what came is not what the Hub lists; kept as {bad.name}"))
        if self._rejected:
            raise _wrong_bytes(self._remote, self.file)
        self._rejected = True


class AdoptedCheck:
    """As `FileDownload`, of a copy that is here already: only its hash is to be checked."""

    def __init__(self, adopted: AdoptedFile, tell: Callable[[Event], None], check: Callable[[], None]) -> None:
        self.file, self.part = adopted.file, adopted
        self._tell, self._check = tell, check

    @property
    def landed(self) -> int:
        return self.part.landed

    def run(self) -> None:
        hasher, buffer = self.file.digest.start(self.file.nbytes), memoryview(bytearray(PIECE))
        while self.part.landed < self.file.nbytes:
            self._check()
            piece = buffer[: min(PIECE, self.file.nbytes - self.part.landed)]
            self.part.read_into(self.part.landed, piece)
            hasher.update(piece)
            self.part.landed += len(piece)
        if hasher.value != self.file.digest.value:
            raise CorruptError(
                f"{self.part.path}: not what the Hub lists under this name", "remove that copy; it is not ours to mend"
            )
        self._tell(Arrived(self.file.path))


Work = FileDownload | AdoptedCheck


class Fetcher:
    """Runs downloads on `jobs` threads, at most `slots` of them unfinished or not yet used up."""

    def __init__(self, todo: Sequence[Work], jobs: int, slots: int, tell: Callable[[Event], None]) -> None:
        self._queue, self._tell = deque(todo), tell
        self._free = threading.Semaphore(slots)
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(jobs)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def release(self) -> None:
        """A file has been used up: its disk space is free for the next."""
        self._free.release()

    def stop(self, wait: float) -> None:
        """The caller has cancelled the client: let the threads end, for at most `wait` seconds."""
        self._stopped.set()
        for _ in self._threads:
            self._free.release()
        limit = time.monotonic() + wait
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, limit - time.monotonic()))

    def _work(self) -> None:
        while self._queue:
            self._free.acquire()
            if self._stopped.is_set() or not self._queue:
                return
            try:
                self._queue.popleft().run()
            except CancelledError:
                return
            except Exception as error:  # noqa: BLE001 - who waits for this thread would wait for ever
                self._tell(Failed(error))
                return


class _Pace:
    """Notices a connection that brings next to nothing, and when gathered bytes have waited long enough."""

    def __init__(self, client: Client) -> None:
        self._patience, self._check = client.patience, client.cancellation.check
        self._begun = self._written = time.monotonic()
        self._bytes = 0

    def note(self, nbytes: int) -> None:
        """Raises `TryAgainError`, `CancelledError`."""
        self._check()
        self._bytes += nbytes
        seconds = time.monotonic() - self._begun
        if seconds < self._patience.window:
            return
        if self._bytes < self._patience.slowest * seconds:
            raise TryAgainError(f"only {self._bytes / seconds:.0f} bytes/s came")
        self._begun, self._bytes = time.monotonic(), 0

    def due(self) -> bool:
        now = time.monotonic()
        if now - self._written < GATHER_SECONDS:
            return False
        self._written = now
        return True


def _check_extent(answer: Answer, start: int, nbytes: int) -> None:
    """Raises `TryAgainError` unless the answer is the file from `start` to its end (or a piece from there)."""
    if answer.start != start:
        raise TryAgainError(f"the server sent bytes from {answer.start} where {start} was asked for", odd=True)
    if answer.total is not None and answer.total != nbytes:
        raise TryAgainError(f"the server's file has {answer.total} bytes where {nbytes} are listed", odd=True)


def _usable_etag(etag: str | None) -> str | None:
    """A strong one of sane length: what If-Range may carry."""
    return etag if etag and len(etag) <= 200 and etag.isascii() and etag.startswith('"') else None


def _wrong_bytes(remote: Remote, file: RepoFile) -> WrongBytesError:
    return WrongBytesError(
        f"{remote.what(file.path)}: what came twice is not what the Hub lists (its hash is wrong)",
        "try again later, or without the mirror or proxy in between",
    )
