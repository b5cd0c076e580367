"""A server that speaks OpenAI's API, as vLLM does: one request, and what its answer means.

The key goes to the address that the user gave and nowhere else: no redirect is followed, and over plain http it goes
to this machine only, past any proxy. To try again is up to the caller.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec
import urllib3

from mixlocal import __version__
from mixlocal.errors import (
    AccessError,
    ContextOverflowError,
    MixlocalError,
    NetworkError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from mixlocal.store.http import REDIRECTS, Endpoint, connection_pool, describe, is_loopback, proxy_for, retry_after
from mixlocal.store.live_sockets import LiveSockets
from mixlocal.store.patience import Cancellation, Patience, TryAgainError

# read: an answer comes whole, so its first byte may take as long as all its tokens.
PATIENCE = Patience(give_up=600.0, reach=30.0, read=1800.0)
CONNECT_SECONDS = 10.0
MAX_ANSWER, MAX_COMPLAINT = 64 << 20, 64 << 10  # bytes of a body that we read
MAX_MESSAGE = 300  # characters of what a server says that we pass on
PIECE = 1 << 16
DECLINED = frozenset({409, 425, 429, 503})  # not now
FAILED = frozenset({408, *range(500, 600)})
NOT_REACHED = (
    urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError, urllib3.exceptions.ProxyError,
)  # fmt: skip
# Of a code or a message: vLLM has no code for it, and llama.cpp another.
TOO_LONG = re.compile(
    r"context_length_exceeded|exceed_context_size|maximum context length|maximum model length|longer than the model's"
    r"|exceeds? the (available|model's) context"
)


class NotTakenError(TryAgainError):
    """The server did not begin with the request: nobody there, or too busy."""


@dataclass(frozen=True, slots=True)
class ApiAddress:
    """url: as OpenAI's clients want it, such as http://127.0.0.1:8000/v1. Raises `UsageError`."""

    url: str
    key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise UsageError("--base-url is not the address of a server", "such as http://127.0.0.1:8000/v1")
        if self.key and not re.fullmatch(r"[!-~]+", self.key):  # a header with it would be refused, and printed
            raise UsageError("the API key has characters that no key has", "check OPENAI_API_KEY")
        if self.key and not Endpoint(self.url).safe_for_token:
            raise UsageError(
                f"the API key would go to {self.host} in clear",
                "use an https:// address, or a tunnel to this machine, or unset OPENAI_API_KEY",
            )

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def is_here(self) -> bool:
        return is_loopback(urlsplit(self.url).hostname or "")

    @property
    def headers(self) -> dict[str, str]:
        ours = {
            "User-Agent": f"mixlocal/{__version__}", "Accept": "application/json", "Accept-Encoding": "identity",
            "Content-Type": "application/json",
        }  # fmt: skip
        return ours | ({"Authorization": f"Bearer {self.key}"} if self.key else {})


class ChatApi:
    """Requests to one server, from as many threads as there are `connections`. `cancellation` ends them all at once:
    the server sees its connections close, and need not go on."""

    def __init__(self, address: ApiAddress, cancellation: Cancellation, patience: Patience, connections: int) -> None:
        self.address, self.patience, self.cancellation = address, patience, cancellation
        self.reached = False  # whether anyone has ever answered
        self._sockets = LiveSockets()
        self._pool = connection_pool("" if address.is_here else proxy_for(address.url), connections)
        self._pool.pool_classes_by_scheme = self._sockets.pools

    def models(self) -> list[str]:
        """The names of what the server serves. Raises as `post`."""
        data = self._exchange("GET", "models", None)
        try:
            return [model.id for model in msgspec.json.decode(data, type=_Models).data]
        except (ValueError, RecursionError) as error:
            raise TryAgainError("the server's list of models is none", odd=True) from error

    def post(self, path: str, body: bytes) -> bytes:
        """The body of a good answer.

        Raises `NotTakenError`, `TryAgainError` and `CancelledError`; `RefusedError`, `ContextOverflowError` or
        `NotFoundError` for what the server has against this request; `AccessError`, `NetworkError` or `UsageError` for
        what would befall any other too.
        """
        return self._exchange("POST", path, body)

    def close(self) -> None:
        self._sockets.shut()
        self._pool.clear()

    def _exchange(self, method: str, path: str, body: bytes | None) -> bytes:
        deadline = time.monotonic() + self.patience.read
        with self.cancellation.reading(self._sockets.shut):
            try:
                response = self._send(method, path, body)
                self.reached = True
                with contextlib.closing(response):
                    data = _read(response, deadline, MAX_ANSWER if response.status == 200 else MAX_COMPLAINT)
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                self.cancellation.check()  # then it is us who ended it
                raise self._trouble(error) from error
        if response.status != 200:
            raise self._complaint(response, data)
        return data

    def _send(self, method: str, path: str, body: bytes | None) -> urllib3.BaseHTTPResponse:
        timeout = urllib3.Timeout(connect=min(CONNECT_SECONDS, self.patience.read), read=self.patience.read)
        return self._pool.request(
            method, f"{self.address.url}/{path}", body=body, headers=self.address.headers, timeout=timeout,
            preload_content=False, decode_content=False, redirect=False, retries=False,
        )  # fmt: skip

    def _trouble(self, error: Exception) -> NetworkError | TryAgainError:
        if isinstance(error.__cause__ or error, ssl.SSLCertVerificationError):
            return NetworkError(
                f"{self.address.host}: {describe(error)}",
                "check this machine's clock and certificates (SSL_CERT_FILE adds one)",
            )
        if isinstance(error.__cause__, urllib3.exceptions.IncompleteRead):
            return TryAgainError(describe(error.__cause__))
        return NotTakenError(describe(error)) if isinstance(error, NOT_REACHED) else TryAgainError(describe(error))

    def _complaint(self, response: urllib3.BaseHTTPResponse, data: bytes) -> MixlocalError | TryAgainError:
        """What an answer that is no success means."""
        status, host, (code, said) = response.status, self.address.host, _said(data)
        said = one_line(said.replace(self.address.key, "***") if self.address.key else said)
        told = f"the server answered {status}{': ' if said else ''}{said}"
        if status in REDIRECTS:
            target = one_line(response.headers.get("Location", ""))
            return UsageError(f"{host} sends requests on to {target or 'nowhere'}", "give that address as --base-url")
        if status in (401, 403) or code == "insufficient_quota":  # which comes as a 429, and does not pass
            return AccessError(f"{host}: {told}", "check OPENAI_API_KEY")
        if status in DECLINED:
            return NotTakenError(told, retry_after(response.headers))
        if status in FAILED:
            return TryAgainError(told, retry_after(response.headers))
        if status == 404:
            return NotFoundError(told)
        if TOO_LONG.search(code) or TOO_LONG.search(said):
            return ContextOverflowError(told, "shorten the prompt, or ask for fewer tokens")
        return RefusedError(told)


def one_line(text: str) -> str:
    """What a server says, fit to be part of a message."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}..."


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _is_address(url: str) -> bool:
    if not re.fullmatch(r"[!-~]+", url):
        return False
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    plain = parts.username is None and not parts.query and not parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def _read(response: urllib3.BaseHTTPResponse, deadline: float, limit: int) -> bytes:
    """The whole body; of a complaint, its beginning. A server that drips is not waited for without end."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("compressed, and nobody asked for that")
    data = bytearray()
    while piece := response.read1(PIECE, decode_content=False):
        data += piece
        if len(data) > limit:
            if response.status != 200:
                break
            raise RefusedError(f"the answer is larger than {limit >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError("too slow")
    return bytes(data[:limit])


def _said(data: bytes) -> tuple[str, str]:
    """Code and message in the body of a complaint: OpenAI's form, vLLM's older one, FastAPI's, or just a text."""
    try:
        value: Any = msgspec.json.decode(data)
    except (ValueError, RecursionError):
        return "", data.decode("utf-8", "replace")
    match value:
        case {"error": {"message": str(message), **rest}} | {"message": str(message), **rest}:
            codes = (rest.get("code"), rest.get("type"))  # vLLM's and llama.cpp's code is the status again
            return next((code for code in codes if isinstance(code, str)), ""), message
        case {"error": str(message)} | {"detail": str(message)}:
            return "", message
    return "", data.decode("utf-8", "replace")
