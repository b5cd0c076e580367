"""A template from a repository, run in a process of its own with little time, little memory and no way out."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NoReturn

import msgspec

from mixlocal.errors import RefusedError, UsageError

_START_SECONDS = 30.0  # to start Python and import jinja2, from a cold disk on a busy machine
_CHILD = Path(__file__).with_name("template_child.py")
_HINT = "Choose one of the built-in templates instead."


@dataclass(frozen=True, slots=True)
class Limits:
    """cpu: seconds of processor time for one answer; wall: seconds on the clock; memory: address space in bytes."""

    cpu: float = 2.0
    wall: float = 3.0
    memory: int = 512 << 20


class _Reply(msgspec.Struct):
    texts: list[str] = []
    error: Literal["", "no", "fault", "limit"] = ""
    text: str = ""


class Sandbox:
    """One template and the process that runs it: started when first needed, and again when it was killed.

    It ends with this object, or with our process, however that ends: its standard input ends then. Any exception, an
    interrupt too, kills it, so that no answer is ever read as the answer to a later question.
    """

    def __init__(self, source: str, origin: str, limits: Limits | None = None) -> None:
        """origin: the file to name in errors."""
        self._source, self._origin, self._limits = source, origin, limits or Limits()
        self._child: _Child | None = None
        self._lock = threading.Lock()

    def compile(self) -> None:
        """RefusedError if the template does not compile."""
        with self._lock:
            self._running()

    def render(
        self, conversations: Sequence[Sequence[Mapping[str, str]]], values: Mapping[str, object], limit: int
    ) -> list[str]:
        """The text of each conversation, at the same moment by `strftime_now`. limit: characters that each may have.

        UsageError if the template does not take a conversation, RefusedError if it fails or wants too much.
        """
        now = datetime.now().isoformat()
        request = {"conversations": conversations, "values": values, "now": now, "limit": limit}
        longest = len(conversations) * 6 * limit + 4096  # JSON writes a control character in six bytes
        with self._lock:
            try:
                return self._ask(self._running(), request, longest)
            except _KilledError:
                return self._ask(self._running(), request, longest)

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        if self._child is not None:
            self._child.end()
        self._child = None

    def _running(self) -> _Child:
        """The process with its template compiled."""
        if self._child is None or not self._child.alive():
            self.close()
            try:
                self._child = _Child(self._limits)
            except (OSError, msgspec.MsgspecError) as error:
                raise self._refusal(f"no process could be started for the chat template: {error}") from error
            self._ask(self._child, {"source": self._source}, 4096)
        return self._child

    def _ask(self, child: _Child, request: Mapping[str, object], longest: int) -> list[str]:
        try:
            reply = child.ask(self._encode(request), longest, self._limits.wall)
        except TimeoutError:
            self.close()
            raise self._too_slow() from None
        except (ConnectionError, msgspec.MsgspecError) as error:
            self.close()
            self._raise_death(child.returncode, error)
        except BaseException:
            self.close()
            raise
        if reply.error:
            self._raise_error(reply)
        return reply.texts

    def _encode(self, request: Mapping[str, object]) -> bytes:
        try:
            return msgspec.json.encode(request)
        except UnicodeEncodeError as error:
            raise self._refusal("the chat template or what it is given is not Unicode text") from error

    def _raise_error(self, reply: _Reply) -> NoReturn:
        text = "".join([char if char.isprintable() else "?" for char in reply.text[:300]])
        if reply.error == "no":
            raise UsageError(f"{self._origin} does not take this conversation: {text}")
        if reply.error == "fault":
            raise RefusedError(f"{self._origin} cannot be used: {text}", _HINT)
        self.close()  # its memory is spent
        raise self._refusal(f"the chat template {text}")

    def _raise_death(self, returncode: int | None, error: Exception) -> NoReturn:
        if returncode == -signal.SIGPROF:
            raise self._too_slow() from error
        if returncode is not None and -returncode in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
            raise _KilledError(f"{self._origin}: the process that runs the chat template was killed", _HINT) from error
        raise self._refusal(f"the chat template broke the process that ran it ({returncode})") from error

    def _too_slow(self) -> RefusedError:
        return self._refusal(f"the chat template took more than {min(self._limits.cpu, self._limits.wall):g} s")

    def _refusal(self, reason: str) -> RefusedError:
        return RefusedError(f"{self._origin}: {reason}", _HINT)


class _KilledError(RefusedError):
    """Somebody else's signal ended the process."""


class _Child:
    """The process, ready to be asked."""

    def __init__(self, limits: Limits) -> None:
        """OSError if it cannot be started."""
        self._socket, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                _command(limits), stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL,
                cwd="/", env=_environment(), start_new_session=True,  # Ctrl-C in the terminal is not for it
            )  # fmt: skip
        except BaseException:
            self._socket.close()
            raise
        finally:
            theirs.close()
        self.end = weakref.finalize(self, _end, self._process, self._socket)
        try:
            self._receive(2, time.monotonic() + _START_SECONDS)
        except BaseException:
            self.end()
            raise

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes, longest: int, seconds: float) -> _Reply:
        """TimeoutError, ConnectionError if it died, MsgspecError if it does not speak our language."""
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        self._socket.sendall(len(request).to_bytes(4, "big") + request)
        return msgspec.json.decode(self._receive(longest, deadline), type=_Reply)

    def _receive(self, longest: int, deadline: float) -> bytes:
        size = int.from_bytes(self._receive_exactly(4, deadline), "big")
        if size > longest:
            raise msgspec.DecodeError(f"an answer of {size} bytes, {longest} at most were expected")
        return self._receive_exactly(size, deadline)

    def _receive_exactly(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            piece = self._socket.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise ConnectionResetError("the process ended")
            data += piece
        return bytes(data)


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _command(limits: Limits) -> list[str]:
    """Isolated, without site: nothing is imported but the standard library and what lies in the folders named."""
    flags = ["-I", "-S", "-W", "ignore", *(["-B"] if sys.dont_write_bytecode else [])]
    folders = dict.fromkeys(_folder(name) for name in ("jinja2", "markupsafe"))
    return [sys.executable, *flags, str(_CHILD), str(limits.cpu), str(limits.memory), *folders]


def _folder(package: str) -> str:
    """Where a package is installed, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    return str(Path(spec.origin).parent.parent)


def _environment() -> dict[str, str]:
    """Only what some builds of Python need to find their own library."""
    return {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
