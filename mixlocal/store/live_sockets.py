"""The sockets that a connection pool has open, so that a thread waiting on one of them can be woken.

urllib3 hands out a connection only with the head of an answer. What thinks for minutes before it sends one could not
be left otherwise, and would not learn that nobody waits any more.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

# Seconds, seconds, times: that the other machine is gone is noticed within two minutes.
KEEP_ALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))


class LiveSockets:
    """`pools` goes into a `PoolManager`'s pool_classes_by_scheme."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._shut = False

    @property
    def pools(self) -> dict[str, type[HTTPConnectionPool]]:
        live = self

        class Plain(HTTPConnection):
            def connect(self) -> None:
                super().connect()
                live.add(self.sock)

        class Secure(HTTPSConnection):
            def connect(self) -> None:
                super().connect()
                live.add(self.sock)

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = Secure

        return {"http": PlainPool, "https": SecurePool}

    def add(self, sock: socket.socket) -> None:
        _keep_alive(sock)
        with self._lock:
            self._open.add(sock)
            if self._shut:
                _shut(sock)

    def shut(self) -> None:
        """End all of them, and any that is still to come."""
        with self._lock:
            self._shut = True
            for sock in self._open:
                _shut(sock)


def _shut(sock: socket.socket) -> None:
    """By the socket's own method: that of an SSLSocket would take the TLS layer from under who reads."""
    with contextlib.suppress(OSError):  # it is closed
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE:
        if hasattr(socket, name):  # not everywhere
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
