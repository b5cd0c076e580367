"""One origin of the Hub double: a socket that listens, a thread for each connection, HTTP/1.1 with keep-alive.

`http.server` is not used, for an answer must be able to end in the middle, or to have no head.
"""

from __future__ import annotations

import fcntl
import http.client
import os
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, BinaryIO

from hub_answer import Answer, Body, Request, Slice, read

if TYPE_CHECKING:
    from hub_double import HubDouble

PIECE = 1 << 20
PACES = 50  # pieces per second of a connection that has a rate


class Origin:
    """name: what a request's `origin` says."""

    def __init__(self, name: str, address: tuple[str, int], hub: HubDouble) -> None:
        self.name, self.hub = name, hub
        self.listener = socket.create_server(address, backlog=128)
        host, port = self.listener.getsockname()
        self.url = f"http://{host}:{port}"
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, name=f"double-{name}")]
        self._threads[0].start()

    def close(self) -> None:
        """A shut socket wakes whoever waits for it, the stalled ones among them."""
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self.listener.close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(connection)
            thread = threading.Thread(target=self._converse, args=(connection,), name=f"double-{self.name}-talk")
            thread.start()
            self._threads[1:] = [other for other in self._threads[1:] if other.is_alive()] + [thread]

    def _converse(self, connection: socket.socket) -> None:
        """Until either side has enough; a client that goes away, or talks nonsense, is no error of ours."""
        try:
            with suppress(OSError, http.client.HTTPException), connection, connection.makefile("rb") as stream:
                while (request := _read_request(self.name, stream)) is not None:
                    if not _Sending(connection, request, self.hub).send(self.hub.answer(request)):
                        return
        finally:
            with self._lock:
                self._connections.discard(connection)


def _read_request(origin: str, stream: BinaryIO) -> Request | None:
    words = stream.readline(65536).decode("latin-1").split()
    if len(words) != 3:
        return None
    headers = {name.lower(): value for name, value in http.client.parse_headers(stream).items()}
    length = headers.get("content-length", "0")
    body = stream.read(int(length)) if length.isdecimal() else b""
    return Request(origin, words[0], words[1], headers, body)


class _Sending:
    """Of one answer. Bytes are counted before they are sent, lest a client looks at the count before we do."""

    def __init__(self, connection: socket.socket, request: Request, hub: HubDouble) -> None:
        self.connection, self.request, self.hub = connection, request, hub
        self.started = time.monotonic()

    def send(self, answer: Answer) -> bool:
        """Whether the connection goes on."""
        self._wait(answer.wait)
        if answer.then:
            answer.then()
        head = _head(answer) if answer.status else b""
        if self.request.method == "HEAD":
            self.connection.sendall(head)
        else:
            self._send_body(answer, head)
        if answer.ending == "rst":
            self._reset()
        if answer.ending == "stall":
            while self.connection.recv(PIECE):
                pass
        return answer.ending == "keep" and self.request.headers.get("connection", "").lower() != "close"

    def _send_body(self, answer: Answer, head: bytes) -> None:
        if slices := [piece for piece in answer.body if isinstance(piece, Slice)]:
            self.request.start = slices[0].start
        self.connection.sendall(head)
        size = answer.step or (max(1, self.hub.rate // PACES) if self.hub.rate else PIECE)
        for piece in _pieces(answer.body, size):
            if isinstance(piece, Slice) and not answer.chunked:
                self._send_file(piece)
            else:
                data = read(piece) if isinstance(piece, Slice) else piece
                self._send_bytes(b"%x\r\n%b\r\n" % (len(data), data) if answer.chunked else data, len(data))
            self._wait(answer.pause)
            if self.hub.rate:
                self._wait(self.started + self.request.sent / self.hub.rate - time.monotonic())
        if answer.chunked:
            self.connection.sendall(b"0\r\n\r\n")

    def _send_bytes(self, data: bytes, nbytes: int) -> None:
        self.request.sent += nbytes
        try:
            self.connection.sendall(data)
        except OSError:
            self.request.sent -= nbytes
            raise

    def _send_file(self, piece: Slice) -> None:
        self.request.sent += len(piece)
        at = piece.start
        try:
            with piece.file.open("rb", buffering=0) as file:
                while at < piece.stop:
                    count = os.sendfile(self.connection.fileno(), file.fileno(), at, piece.stop - at)
                    if not count:
                        raise ConnectionAbortedError("the file has become shorter")
                    at += count
        finally:
            self.request.sent -= piece.stop - at

    def _wait(self, seconds: float) -> None:
        if seconds > 0 and self.hub.closing.wait(seconds):
            raise ConnectionAbortedError("the double is closed")

    def _reset(self) -> None:
        """Once the other side has all that was sent: what waits in the kernel would be lost with the connection."""
        deadline = time.monotonic() + 1
        while _unacknowledged(self.connection) and time.monotonic() < deadline:
            self._wait(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _unacknowledged(connection: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0])


def _head(answer: Answer) -> bytes:
    phrase = HTTPStatus(answer.status).phrase if answer.status in HTTPStatus._value2member_map_ else "Unknown"
    lines = [f"HTTP/1.1 {answer.status} {phrase}", *(f"{name}: {value}" for name, value in answer.headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def _pieces(body: Body, size: int) -> Iterator[bytes | Slice]:
    """Of at most `size` bytes each."""
    for piece in body:
        for start in range(0, len(piece), size):
            small = piece[start : start + size]
            yield small if isinstance(small, Slice) else read(small)
