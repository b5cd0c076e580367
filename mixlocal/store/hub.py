"""What a repository of the Hub holds at one commit: asked of huggingface-hub, and believed only where it is harmless.

The library follows a link to any host with the token, reads bodies of any size and waits without end; so each of its
requests is watched, and it runs on a thread that can be left behind.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mixlocal.errors import MixlocalError, NetworkError, RefusedError
from mixlocal.store.digest import Digest
from mixlocal.store.download import Event, Remote, Retries
from mixlocal.store.durable import named_errors
from mixlocal.store.http import RETRY_STATUSES, Client, Endpoint, complaint
from mixlocal.store.listing import Listing, RepoFile
from mixlocal.store.patience import TryAgainError
from mixlocal.store.repo_names import check_path, is_commit, is_wanted

DEFAULT_ENDPOINT = "https://huggingface.co"
MAX_FILES = 2000
MAX_BODY = 32 << 20
MAX_NBYTES = 1 << 42
ATTEMPT_SECONDS = 60.0
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class HubSettings:
    """What the environment says, as huggingface-hub reads it."""

    endpoint: Endpoint
    offline: bool
    cache: Path


def hub_settings() -> HubSettings:
    """HF_ENDPOINT, HF_TOKEN or the token that `hf auth login` left, HF_HUB_OFFLINE, HF_HUB_CACHE or HF_HOME."""
    root = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    root = root.expanduser()
    token_file = Path(os.environ.get("HF_TOKEN_PATH") or root / "token").expanduser()
    with named_errors(token_file):
        kept = token_file.read_text(errors="replace") if token_file.is_file() else ""
    token = (os.environ.get("HF_TOKEN") or kept).strip()
    return HubSettings(
        endpoint=Endpoint((os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/"), token or None),
        offline=_is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"),
        cache=Path(os.environ.get("HF_HUB_CACHE") or root / "hub").expanduser(),
    )


def list_repository(client: Client, repository: str, revision: str, tell: Callable[[Event], None]) -> Listing:
    """The commit that `revision` is now, and its files.

    Raises `NotFoundError`, `AccessError`, `NetworkError`, `RefusedError` for a listing that is no honest one.
    """
    remote = Remote(client, repository, "")
    retries = Retries(remote, "", tell)
    while True:
        try:
            return _attempt(client, repository, revision)
        except TryAgainError as error:
            retries.wait(error)


def _attempt(client: Client, repository: str, revision: str) -> Listing:
    """One try on a thread of its own: the library may block for ever, and we may be interrupted."""
    outcome: list[Listing | BaseException] = []

    def work() -> None:
        try:
            outcome.append(_list(client, repository, revision))
        except Exception as error:  # noqa: BLE001 - handed to the caller below
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    waited = 0.0
    while thread.is_alive() and waited < ATTEMPT_SECONDS:
        thread.join(POLL_SECONDS)
        client.cancellation.check()
        waited += POLL_SECONDS
    if not outcome:
        raise TryAgainError("the listing did not come in time")
    if isinstance(outcome[0], Listing):
        return outcome[0]
    raise _meaning(outcome[0], f"{repository}@{revision}") from outcome[0]


def _list(client: Client, repository: str, revision: str) -> Listing:
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # both are read when the library is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what goes wrong is told by us
    endpoint = client.endpoint
    _watch(huggingface_hub.get_session(), client)
    token: str | bool = endpoint.token if endpoint.token and endpoint.safe_for_token else False
    api = huggingface_hub.HfApi(endpoint=endpoint.url, token=token, library_name="mixlocal")
    commit = revision if is_commit(revision) else api.model_info(repository, revision=revision, timeout=30).sha
    if not isinstance(commit, str) or not is_commit(commit):
        raise RefusedError(f"{repository}@{revision}: the Hub names no 40-hex commit for it")
    entries = api.list_repo_tree(repository, revision=commit, recursive=True)
    found = list(islice(entries, MAX_FILES + 1))
    if len(found) > MAX_FILES:
        raise RefusedError(f"{repository}: more than {MAX_FILES} files", "this is no repository of one model")
    return _listing(repository, commit, found)


def _listing(repository: str, commit: str, entries: list[Any]) -> Listing:
    files: dict[str, RepoFile] = {}
    others = []
    for entry in entries:
        path = entry.path
        check_path(repository, path)
        if not isinstance(entry.__dict__.get("size"), int):
            continue  # a folder
        if not is_wanted(path):
            others.append(path)
            continue
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        size = entry.lfs.size if entry.lfs else entry.size
        if size != entry.size or not 0 <= size < MAX_NBYTES:
            raise RefusedError(f"{repository}/{path}: the Hub lists an impossible size")
        try:
            files[path] = RepoFile(path, size, Digest(digest))
        except (ValueError, TypeError) as error:
            raise RefusedError(f"{repository}/{path}: the Hub lists a hash that is none") from error
    if len({path.lower() for path in files}) < len(files):
        raise RefusedError(f"{repository}: lists files whose names differ in case only")
    return Listing(repository, commit, files, tuple(sorted(others)[:20]))


def _watch(session: Any, client: Client) -> None:
    """Hooks of the library's own HTTP client, httpx or its successor: no foreign host, no endless body, no waiting."""
    asked: set[str] = set()

    def before(request: Any) -> None:
        if str(request.url) in asked:  # it tries again by itself, and would wait unseen
            raise TryAgainError("the connection broke")
        asked.add(str(request.url))
        if not client.endpoint.is_ours(str(request.url)):
            raise RefusedError(f"the Hub's listing goes on at another host, {request.url.host}", "no Hub does so")

    def after(response: Any) -> None:
        client.reached = True
        if response.status_code in RETRY_STATUSES:  # it would wait as long as it is told to, and say nothing
            raise complaint(response.status_code, response.headers, "the listing", ours=True)
        body = bytearray()
        for piece in response.iter_bytes():
            body += piece
            if len(body) > MAX_BODY:
                raise RefusedError(f"the Hub's listing is larger than {MAX_BODY >> 20} MiB")
        response._content = bytes(body)  # what its own read() would keep

    theirs = {when: [h for h in hooks if h.__module__ != __name__] for when, hooks in session.event_hooks.items()}
    session.event_hooks = {
        "request": [*theirs.get("request", []), before],
        "response": [*theirs.get("response", []), after],
    }


def _meaning(error: BaseException, what: str) -> BaseException:
    """One of ours for whatever the library raises."""
    if isinstance(error, (MixlocalError, TryAgainError)):
        return error
    response = getattr(error, "response", None)
    if response is not None:
        return complaint(response.status_code, response.headers, what, ours=True)
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if modules & {"httpx", "httpx2", "httpcore", "httpcore2"} or isinstance(error, OSError):
        return TryAgainError(_reason(error))
    if isinstance(error, (KeyError, TypeError, ValueError, AttributeError, RecursionError)):
        return NetworkError(
            f"{what}: the answer is not what the Hub says", "is a login page, a proxy or a mirror in between?"
        )
    return error


def _reason(error: BaseException) -> str:
    """In the words of `describe`; the libraries' kinds are told by their names, for there are two of them."""
    kinds = " ".join(kind.__name__ for kind in type(error).__mro__)
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.strerror:
            return f"no connection ({cause.strerror.lower()})"
    if "Timeout" in kinds:
        return "no data in time"
    return "no connection" if "ConnectError" in kinds else f"the connection broke ({str(error)[:80].lower()})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
