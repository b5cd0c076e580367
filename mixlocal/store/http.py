"""GET over HTTP: the token goes to its own origin only, every wait is bounded, and a cancelled read ends at once."""

from __future__ import annotations

import email.utils
import ipaddress
import re
import ssl
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

import urllib3

from mixlocal import __version__
from mixlocal.errors import AccessError, MixlocalError, NetworkError, NotFoundError, RefusedError
from mixlocal.store.patience import Cancellation, Patience, TryAgainError

MAX_REDIRECTS = 10
MAX_MESSAGE = 200  # characters of what a server says that we pass on
RETRY_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
Origin = tuple[str, str | None, int | None]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The Hub or a mirror of it. `token` is sent to this origin only, and never in clear over a network."""

    url: str
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise RefusedError("HF_ENDPOINT is not the address of a Hub", "such as https://huggingface.co")
        if self.token and not re.fullmatch(r"[!-~]+", self.token):  # a header with it would be refused, and printed
            raise RefusedError("the token for the Hub has characters that no token has", "check HF_TOKEN")

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def safe_for_token(self) -> bool:
        parts = urlsplit(self.url)
        return parts.scheme == "https" or is_loopback(parts.hostname or "")

    def headers_for(self, url: str) -> dict[str, str]:
        if self.token and self.safe_for_token and self.is_ours(url):
            return {"Authorization": f"Bearer {self.token}"}
        return {}

    def is_ours(self, url: str) -> bool:
        return _origin(url) == _origin(self.url)


class Answer:
    """The body of a 200 or 206: a file of `total` bytes from `start` on; None where nobody said so."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response
        self.etag = response.headers.get("ETag")
        self.start, self.total = _extent(response)

    def read(self, nbytes: int) -> bytes:
        """What is there by now, at most `nbytes`; b"" at the end. Raises `TryAgainError`."""
        try:
            return self._response.read1(nbytes, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise TryAgainError(describe(error)) from error


class Client:
    """Requests of one endpoint, from any number of threads."""

    def __init__(
        self, endpoint: Endpoint, patience: Patience, cancellation: Cancellation, connections: int = 4
    ) -> None:
        self.endpoint, self.patience, self.cancellation = endpoint, patience, cancellation
        self.reached = False  # whether anyone has ever answered
        self._connections = connections
        self._pools: dict[str, urllib3.PoolManager] = {}

    @contextmanager
    def get(self, url: str, what: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Ask for `url`, follow redirects, and read the answer inside the block.

        Raises `TryAgainError` for what may pass, `CancelledError`, `NotFoundError`, `AccessError`, `NetworkError`.
        `what` is asked for, in the user's words.
        """
        response = self._follow(url, what, headers)
        try:
            with self.cancellation.reading(response.shutdown):
                yield Answer(response)
        except TryAgainError:
            self.cancellation.check()  # then it is us who ended the read
            raise
        finally:
            response.close()

    def _follow(self, url: str, what: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        for _ in range(MAX_REDIRECTS + 1):
            self.cancellation.check()
            response = self._send(url, headers)
            self.reached = True
            if response.status in (200, 206):
                return response
            _leave(response)
            if response.status not in REDIRECTS:
                raise complaint(response.status, response.headers, what, ours=self.endpoint.is_ours(url))
            target = urljoin(url, response.headers.get("Location", ""))
            if urlsplit(target).scheme not in ("http", "https") or not urlsplit(target).hostname:
                raise TryAgainError("was sent to an address that is none", odd=True)
            if url.startswith("https:") and not target.startswith("https:"):
                raise TryAgainError("was sent from https to http", odd=True)
            url = target
        raise TryAgainError(f"was sent on more than {MAX_REDIRECTS} times", odd=True)

    def _send(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        timeout = urllib3.Timeout(connect=self.patience.read, read=self.patience.read)
        ours = {"User-Agent": f"mixlocal/{__version__}", "Accept-Encoding": "identity"}
        try:
            return self._pool(url).request(
                "GET", url, headers=ours | self.endpoint.headers_for(url) | dict(headers), timeout=timeout,
                preload_content=False, decode_content=False, redirect=False, retries=False,
            )  # fmt: skip
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            if isinstance(getattr(error, "__cause__", None) or error, ssl.SSLCertVerificationError):
                raise NetworkError(
                    f"{urlsplit(url).hostname}: {describe(error)}",
                    "check this machine's clock and certificates (SSL_CERT_FILE adds one)",
                ) from error
            raise TryAgainError(describe(error)) from error

    def _pool(self, url: str) -> urllib3.PoolManager:
        proxy = proxy_for(url)
        if proxy not in self._pools:
            self._pools[proxy] = connection_pool(proxy, self._connections)
        return self._pools[proxy]


def complaint(status: int, headers: Mapping[str, str], what: str, *, ours: bool) -> MixlocalError | TryAgainError:
    """What an answer that is no success means. ours: it came from the Hub itself, and not from where it sent us."""
    code, said = headers.get("X-Error-Code", ""), _said(headers)
    if status in RETRY_STATUSES:
        return TryAgainError(f"the server answered {status}{said}", retry_after(headers))
    if not ours:  # a signed address that has expired, most likely: the Hub gives another
        return TryAgainError(f"the file's server answered {status}", odd=True)
    if code == "GatedRepo":
        return AccessError(
            f"{what}: its authors ask who you are{said}",
            "accept the terms on the model's page, then set HF_TOKEN (or run: hf auth login)",
        )
    if status in (401, 403) and code != "RepoNotFound":
        return AccessError(f"{what}: the Hub refuses ({status}){said}", "check HF_TOKEN, or run: hf auth login")
    if status in (401, 404):
        missing = {"RevisionNotFound": "no such revision", "EntryNotFound": "no such file"}
        reason = missing.get(code, "no such repository, or a private one")
        return NotFoundError(f"{what}: {reason}", "check the spelling; a private one needs HF_TOKEN")
    return TryAgainError(f"the Hub answered {status}{said}", odd=True)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds until a server wants to be asked again: Retry-After as a number or a date, or RateLimit's t."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None
    reset = re.search(r";\s*r=0\b.*;\s*t=(\d{1,9})", headers.get("RateLimit", ""))
    return float(reset[1]) + 1 if reset else None


def describe(error: BaseException) -> str:
    """A network's error in few words, without the object addresses that libraries print."""
    match error:
        case urllib3.exceptions.NameResolutionError():
            return "the name of the server cannot be resolved"
        case urllib3.exceptions.ProxyError():
            return "the proxy does not let us through"
        case urllib3.exceptions.NewConnectionError():  # a kind of the next
            return "no connection"
        case urllib3.exceptions.ConnectTimeoutError():
            return "no connection in time"
        case urllib3.exceptions.ReadTimeoutError() | TimeoutError():
            return "no data in time"
        case urllib3.exceptions.SSLError() | ssl.SSLError():
            return f"TLS failed ({_inner(error)})"
        case urllib3.exceptions.IncompleteRead():
            return "the connection ended early"
        case urllib3.exceptions.ProtocolError() | OSError():
            return f"the connection broke ({_inner(error)})"
    return f"the answer made no sense ({_inner(error)})"


def _inner(error: BaseException) -> str:
    """The reason at the bottom of a chain of errors."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = getattr(error, "strerror", None) or getattr(error, "verify_message", None) or str(error)
    return f"{text}"[:80].lower() or type(error).__name__


def _said(headers: Mapping[str, str]) -> str:
    message = " ".join(headers.get("X-Error-Message", "").split())
    return f": {message[:MAX_MESSAGE]}" if message else ""


def _extent(response: urllib3.BaseHTTPResponse) -> tuple[int, int | None]:
    """First byte and size of the whole, as the headers say. Raises `TryAgainError` for what cannot be."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise TryAgainError("the server compressed what must come as it is", odd=True)
    if response.status == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if re.fullmatch(r"\d{1,15}", length) else None
    given = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})", response.headers.get("Content-Range", ""))
    if given is None:
        raise TryAgainError("the server sent a part and did not say which", odd=True)
    return int(given[1]), int(given[2])


def _origin(url: str) -> Origin:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        return "", None, None
    return parts.scheme, parts.hostname, port or {"http": 80, "https": 443}.get(parts.scheme)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def proxy_for(url: str) -> str:
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    if urllib.request.proxy_bypass(parts.netloc):
        return ""
    return proxies.get(parts.scheme) or proxies.get("all") or ""


def connection_pool(proxy: str, connections: int) -> urllib3.PoolManager:
    if not proxy:
        return urllib3.PoolManager(maxsize=connections)
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if parts.scheme not in ("http", "https"):
        raise NetworkError(f"a {parts.scheme} proxy cannot be used", "set HTTPS_PROXY to an http:// proxy")
    login = f"{parts.username}:{parts.password or ''}" if parts.username else None
    headers = urllib3.make_headers(proxy_basic_auth=login) if login else None
    address = f"{parts.scheme}://{parts.hostname}:{parts.port or 80}"
    return urllib3.ProxyManager(address, proxy_headers=headers, maxsize=connections)


def _leave(response: urllib3.BaseHTTPResponse) -> None:
    """Done with an answer unread; its connection serves again if what is left of it is little."""
    if re.fullmatch(r"\d{1,4}", response.headers.get("Content-Length", "")):
        response.drain_conn()
    response.close()
