"""The catalogue of what may be wrong with an answer of the Hub double.

A fault is a function from a right answer to a wrong one, or to None where it cannot strike: there is no body to cut, no
range to ignore. So a fault never counts as fired when nothing was wrong on the wire.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from email.utils import formatdate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hub_answer import Answer, Fill, Request, Slice, json_answer, nbytes, part, read, refusal

if TYPE_CHECKING:
    from hub_double import HubDouble


ENDPOINTS = {
    "revision", "tree", "paths-info", "refs", "commits", "auth-check", "xet", "whoami", "harnesses", "resolve", "small",
    "loop", "cdn", "foreign",
}  # fmt: skip
PLACES = ENDPOINTS | {"api", "hub", "any"}


@dataclass(frozen=True, eq=False)
class Fault:
    """Strikes the nth request that it can strike, and so many times (-1: for ever); the rest its kind's function reads.

    where: places joined by "|"; empty is the kind's own. path: a part of the file's path. method: empty is any.
    """

    kind: str
    where: str = ""
    path: str = ""
    nth: int = 1
    times: int = 1
    method: str = ""
    at: int = 0
    how: str = ""
    step: int = 1
    seconds: float = 1.0
    code: int = 0
    count: int = 0
    value: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """A misspelt fault would never strike, and a test of it would pass."""
        if self.kind not in CATALOGUE:
            raise ValueError(f"no fault {self.kind!r}; there are {', '.join(CATALOGUE)}")
        if self.how not in ("", *CATALOGUE[self.kind].how):
            raise ValueError(f"{self.kind} knows no how={self.how!r}")
        if unknown := {place for place in self.where.split("|") if place} - PLACES:
            raise ValueError(f"no place {', '.join(unknown)}; there are {', '.join(sorted(PLACES))}")

    @classmethod
    def parse(cls, spec: str) -> Fault:
        """Of `cut,where=cdn,nth=2,at=1000,how=rst`."""
        kind, *options = spec.split(",")
        types: dict[str, Callable[[str], Any]] = {entry.name: type(entry.default) for entry in fields(cls)}
        pairs = dict(option.split("=", 1) for option in options)
        if unknown := pairs.keys() - types.keys():
            raise ValueError(f"no option {', '.join(unknown)}")
        return cls(kind, **{name: types[name](value) for name, value in pairs.items()})

    def matches(self, request: Request) -> bool:
        """Of a listing, `path` picks entries."""
        places = (self.where or CATALOGUE[self.kind].where).split("|")
        about = self.path in request.file or self.kind.startswith("tree_")
        return about and self.method in ("", request.method) and not request.places.isdisjoint(places)


@dataclass(frozen=True)
class Strike:
    fault: Fault
    request: Request
    hub: HubDouble


def attempt(answer: Answer, strike: Strike) -> Answer | None:
    """What the fault makes of `answer`; None if it cannot strike here."""
    kind = CATALOGUE[strike.fault.kind]
    if not strike.fault.matches(strike.request):
        return None
    if kind.needs_body and (strike.request.method == "HEAD" or not nbytes(answer.body)):
        return None
    return kind.change(answer, strike)


# Bodies


def cut(answer: Answer, strike: Strike) -> Answer | None:
    fault = strike.fault
    if fault.at >= nbytes(answer.body):
        return None
    return replace(answer, body=part(answer.body, 0, fault.at), ending=fault.how or "fin")


def drip(answer: Answer, strike: Strike) -> Answer:
    return replace(answer, step=strike.fault.step, pause=strike.fault.seconds)


def wrong_bytes(answer: Answer, strike: Strike) -> Answer | None:
    """One bit of each of `count` bytes."""
    start, stop, end = strike.fault.at, strike.fault.at + (strike.fault.count or 1), nbytes(answer.body)
    if stop > end:
        return None
    wrong = bytes(byte ^ 1 for piece in part(answer.body, start, stop) for byte in read(piece))
    return replace(answer, body=(*part(answer.body, 0, start), wrong, *part(answer.body, stop, end)))


def short(answer: Answer, strike: Strike) -> Answer | None:
    stop = nbytes(answer.body) - (strike.fault.count or 1)
    return None if stop < 0 else answer.with_body(*part(answer.body, 0, stop))


def long(answer: Answer, strike: Strike) -> Answer:
    return answer.with_body(*answer.body, Fill(b"\0", strike.fault.count or 1))


def declare(answer: Answer, strike: Strike) -> Answer:
    """The right body under a length that is `count` off."""
    told = max(0, nbytes(answer.body) + (strike.fault.count or 1))
    return replace(answer, ending="fin").with_headers({"Content-Length": str(told)})


def chunked(answer: Answer, strike: Strike) -> Answer:
    """No length; how="close" ends the body by closing the connection."""
    if strike.fault.how == "close":
        return replace(answer, ending="fin").with_headers({"Content-Length": None})
    return replace(answer, chunked=True).with_headers({"Content-Length": None, "Transfer-Encoding": "chunked"})


def gzip_body(answer: Answer, strike: Strike) -> Answer:
    packed = gzip.compress(b"".join(map(read, answer.body)), compresslevel=1)
    return answer.with_body(packed).with_headers({"Content-Encoding": "gzip"})


# Ranges


def ignore_range(answer: Answer, strike: Strike) -> Answer | None:
    if answer.status != 206 or answer.whole is None:
        return None
    return replace(answer, status=200).with_body(answer.whole).with_headers({"Content-Range": None})


def shift(answer: Answer, strike: Strike) -> Answer | None:
    """From `count` bytes further on; Content-Range says so, or with how="hidden" tells what was asked for."""
    if answer.status != 206 or answer.whole is None or not isinstance(answer.body[0], Slice):
        return None
    first, by, total = answer.body[0], strike.fault.count or 1, len(answer.whole)
    start = first.start + by
    if not 0 <= start < first.stop:
        return None
    if strike.fault.how == "hidden":
        return replace(answer, body=part((answer.whole, Fill(b"\0", abs(by))), start, first.stop + by))
    told = {"Content-Range": f"bytes {start}-{first.stop - 1}/{total}"}
    return answer.with_body(Slice(first.file, start, first.stop)).with_headers(told)


def bad_content_range(answer: Answer, strike: Strike) -> Answer | None:
    """`value` instead of it; how="missing" leaves it out."""
    value = None if strike.fault.how == "missing" else strike.fault.value or "bytes some/all"
    return answer.with_headers({"Content-Range": value}) if answer.status == 206 else None


def wrong_total(answer: Answer, strike: Strike) -> Answer | None:
    if answer.status != 206 or answer.whole is None:
        return None
    told = answer.headers["Content-Range"].partition("/")[0]
    return answer.with_headers({"Content-Range": f"{told}/{len(answer.whole) + (strike.fault.count or 1)}"})


def range_416(answer: Answer, strike: Strike) -> Answer | None:
    """Though the range is right."""
    if answer.status != 206 or answer.whole is None:
        return None
    return json_answer({"error": "range"}, 416, {"Content-Range": f"bytes */{len(answer.whole)}"})


# Names and promises in headers


def _with_etag(answer: Answer, change: Callable[[str], str | None]) -> Answer | None:
    told = {name: change(value) for name, value in answer.headers.items() if name in ("ETag", "X-Linked-Etag")}
    return answer.with_headers(told) if told else None


def etag_changes(answer: Answer, strike: Strike) -> Answer | None:
    """As of a file that was replaced: a range that depends on the old tag gets the whole file."""
    if "if-range" in strike.request.headers:
        answer = ignore_range(answer, strike) or answer
    return _with_etag(answer, lambda old: strike.fault.value or f'"{old.strip(chr(34))[::-1]}"')


def etag_traversal(answer: Answer, strike: Strike) -> Answer | None:
    return _with_etag(answer, lambda old: f'"{strike.fault.value or "../../x"}"')


def etag_missing(answer: Answer, strike: Strike) -> Answer | None:
    return _with_etag(answer, lambda old: None)


def commit_missing(answer: Answer, strike: Strike) -> Answer | None:
    return answer.with_headers({"X-Repo-Commit": None}) if "X-Repo-Commit" in answer.headers else None


def commit_changes(answer: Answer, strike: Strike) -> Answer | None:
    old = answer.headers.get("X-Repo-Commit")
    return answer.with_headers({"X-Repo-Commit": strike.fault.value or old[::-1]}) if old else None


def xet_advertised(answer: Answer, strike: Strike) -> Answer | None:
    """In `resolve` and the tree, for whoever speaks Xet; the token that it then asks for is not to be had."""
    if strike.request.where == "tree":
        return _edit(answer, strike, lambda entry: "lfs" in entry and entry.update(xetHash=entry["lfs"]["oid"][::-1]))
    if "X-Linked-Etag" not in answer.headers:
        return None
    route = f"{strike.hub.endpoint}/api/models/{strike.request.repository}/xet-read-token/"
    link = f'<{route}{answer.headers["X-Repo-Commit"]}>; rel="xet-auth"'
    return answer.with_headers({"X-Xet-Hash": answer.headers["X-Linked-Etag"].strip('"')[::-1], "Link": link})


# Refusals, waits and other hosts


def status(answer: Answer, strike: Strike) -> Answer:
    code = strike.fault.code or 503
    return json_answer({"error": f"status {code}"}, code, strike.fault.headers)


def retry_after(answer: Answer, strike: Strike) -> Answer:
    """429 with Retry-After: `seconds`; how="date" as an HTTP date, "huge", or "ratelimit" by that header alone."""
    seconds = strike.fault.seconds
    limit = {"RateLimit": f'"api";r=0;t={seconds:.0f}', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    headers = {
        "": {"Retry-After": f"{seconds:.0f}"},
        "date": {"Retry-After": formatdate(time.time() + seconds, usegmt=True)},
        "huge": {"Retry-After": "999999"},
        "ratelimit": limit,
    }[strike.fault.how]
    return json_answer({"error": "too many requests"}, strike.fault.code or 429, headers)


def refuse(answer: Answer, strike: Strike) -> Answer:
    return refusal(strike.fault.kind, answer.headers.get("X-Repo-Commit", ""))


def redirect_loop(answer: Answer, strike: Strike) -> Answer:
    """No address comes twice, so only a limit ends it."""
    return Answer(302, answer.headers | {"Location": f"{strike.hub.endpoint}/loop/1"}).with_body()


def redirect_foreign(answer: Answer, strike: Strike) -> Answer:
    """To a third host, which has the right bytes and must not see the token."""
    target = urlsplit(answer.headers.get("Location", strike.request.path))
    location = f"{strike.hub.foreign}{target.path}?{target.query}"
    return Answer(302, answer.headers | {"Location": location}).with_body()


def ref_moves(answer: Answer, strike: Strike) -> Answer:
    """After this answer, main is another commit: of the folder `value`, or of the same files."""
    folder = Path(strike.fault.value) if strike.fault.value else None
    return replace(answer, then=lambda: strike.hub.move(strike.request.repository, folder))


def slow_headers(answer: Answer, strike: Strike) -> Answer:
    return replace(answer, wait=strike.fault.seconds)


def close_before_headers(answer: Answer, strike: Strike) -> Answer:
    return replace(answer, status=0, body=(), ending=strike.fault.how or "fin")


def tls_garbage(answer: Answer, strike: Strike) -> Answer:
    """A TLS alert, as a server says it that was not asked for HTTP."""
    return replace(answer, status=0, body=(b"\x15\x03\x03\x00\x02\x02\x28" * 3,), ending="fin")


# Documents


def html_200(answer: Answer, strike: Strike) -> Answer:
    page = b"<!doctype html><title>Welcome to our network</title><form>Please log in</form>"
    return Answer(200, {"Content-Type": "text/html"}).with_body(page)


def json_truncated(answer: Answer, strike: Strike) -> Answer:
    return answer.with_body(*part(answer.body, 0, nbytes(answer.body) // 2))


def json_deep(answer: Answer, strike: Strike) -> Answer:
    depth = strike.fault.count or 100_000
    return answer.with_body(Fill(b"[", depth), Fill(b"]", depth))


def json_huge(answer: Answer, strike: Strike) -> Answer:
    """The right document, behind 64 MiB of white space."""
    return answer.with_body(Fill(b" ", strike.fault.count or 64 << 20), *answer.body)


def sha_traversal(answer: Answer, strike: Strike) -> Answer | None:
    content = answer.json() if answer.status == 200 else None
    if not isinstance(content, dict):
        return None
    return answer.with_body(json.dumps(content | {"sha": strike.fault.value or "../../x"}).encode())


def link_foreign(answer: Answer, strike: Strike) -> Answer:
    end = f"{strike.request.path.partition('?')[0]}?recursive=true&cursor={10**9}"
    link = answer.headers.get("Link", f'<{strike.hub.endpoint}{end}>; rel="next"')
    return answer.with_headers({"Link": link.replace(strike.hub.endpoint, strike.hub.foreign)})


def _entries(answer: Answer) -> list[dict[str, Any]]:
    """Of a listing; nothing for any other answer, such as a refusal or what another fault has left."""
    try:
        content = answer.json() if answer.status == 200 else []
    except (ValueError, RecursionError):
        return []
    return content if isinstance(content, list) else []


def _edit(answer: Answer, strike: Strike, change: Callable[[dict[str, Any]], object]) -> Answer | None:
    """Each file of a listing that `path` picks."""
    entries = _entries(answer)
    picked = [entry for entry in entries if entry["type"] == "file" and strike.fault.path in entry["path"]]
    for entry in picked:
        change(entry)
    return answer.with_body(json.dumps(entries).encode()) if picked else None


def tree_missing_keys(answer: Answer, strike: Strike) -> Answer | None:
    return _edit(answer, strike, lambda entry: entry.pop(strike.fault.value or "oid", None))


def tree_many(answer: Answer, strike: Strike) -> Answer:
    """The listing goes on with a million files more."""
    many = f"{strike.request.path.partition('?')[0]}?recursive=true&cursor=many-0-{strike.fault.count or 10**6}"
    return answer.with_headers({"Link": f'<{strike.hub.endpoint}{many}>; rel="next"'})


def tree_wrong_size(answer: Answer, strike: Strike) -> Answer | None:
    """`value`, or `count` more than it is."""

    def change(entry: dict[str, Any]) -> None:
        size = int(strike.fault.value or entry["size"] + (strike.fault.count or 1))
        for told in filter(None, (entry, entry.get("lfs"))):
            told["size"] = size

    return _edit(answer, strike, change)


def tree_wrong_sha(answer: Answer, strike: Strike) -> Answer | None:
    def change(entry: dict[str, Any]) -> None:
        told = entry.get("lfs", entry)
        told["oid"] = strike.fault.value or told["oid"][::-1]

    return _edit(answer, strike, change)


def path_evil(answer: Answer, strike: Strike) -> Answer | None:
    """One file more, of this name."""
    entries = _entries(answer)
    files = [entry for entry in entries if entry["type"] == "file"]
    if not files:
        return None
    evil = files[-1] | {"path": strike.fault.value or "../evil.safetensors"}
    return answer.with_body(json.dumps([*entries, evil]).encode())


@dataclass(frozen=True)
class Kind:
    """where: its own place. needs_body: strikes only an answer that has one. how: what it may be, besides empty."""

    change: Callable[[Answer, Strike], Answer | None]
    where: str
    needs_body: bool = False
    how: tuple[str, ...] = ()


CATALOGUE: dict[str, Kind] = {
    "cut": Kind(cut, "cdn", needs_body=True, how=("fin", "rst", "stall")),
    "drip": Kind(drip, "cdn", needs_body=True),
    "wrong_bytes": Kind(wrong_bytes, "cdn", needs_body=True),
    "short": Kind(short, "cdn", needs_body=True),
    "long": Kind(long, "cdn", needs_body=True),
    "declare": Kind(declare, "cdn", needs_body=True),
    "chunked": Kind(chunked, "cdn", needs_body=True, how=("close",)),
    "gzip": Kind(gzip_body, "cdn", needs_body=True),
    "ignore_range": Kind(ignore_range, "cdn", needs_body=True),
    "shift": Kind(shift, "cdn", needs_body=True, how=("hidden",)),
    "bad_content_range": Kind(bad_content_range, "cdn", how=("missing",)),
    "wrong_total": Kind(wrong_total, "cdn"),
    "range_416": Kind(range_416, "cdn"),
    "etag_changes": Kind(etag_changes, "cdn"),
    "etag_traversal": Kind(etag_traversal, "resolve|small"),
    "etag_missing": Kind(etag_missing, "resolve|small"),
    "commit_missing": Kind(commit_missing, "resolve|small"),
    "commit_changes": Kind(commit_changes, "resolve|small"),
    "xet_advertised": Kind(xet_advertised, "resolve|tree"),
    "status": Kind(status, "cdn"),
    "retry_after": Kind(retry_after, "cdn", how=("date", "huge", "ratelimit")),
    "gated_none": Kind(refuse, "resolve|auth-check"),
    "gated_403": Kind(refuse, "resolve|auth-check"),
    "bad_token": Kind(refuse, "hub"),
    "repo_401": Kind(refuse, "revision"),
    "repo_404": Kind(refuse, "revision"),
    "rev_404": Kind(refuse, "revision|tree|resolve"),
    "entry_404": Kind(refuse, "resolve"),
    "disabled": Kind(refuse, "revision|tree|resolve|auth-check"),
    "redirect_loop": Kind(redirect_loop, "resolve"),
    "redirect_foreign": Kind(redirect_foreign, "resolve"),
    "ref_moves": Kind(ref_moves, "revision"),
    "slow_headers": Kind(slow_headers, "cdn"),
    "close_before_headers": Kind(close_before_headers, "cdn", how=("fin", "rst", "stall")),
    "tls_garbage": Kind(tls_garbage, "cdn"),
    "html_200": Kind(html_200, "revision"),
    "json_truncated": Kind(json_truncated, "tree", needs_body=True),
    "json_deep": Kind(json_deep, "tree", needs_body=True),
    "json_huge": Kind(json_huge, "tree", needs_body=True),
    "sha_traversal": Kind(sha_traversal, "revision", needs_body=True),
    "link_foreign": Kind(link_foreign, "tree"),
    "tree_missing_keys": Kind(tree_missing_keys, "tree", needs_body=True),
    "tree_many": Kind(tree_many, "tree"),
    "tree_wrong_size": Kind(tree_wrong_size, "tree", needs_body=True),
    "tree_wrong_sha": Kind(tree_wrong_sha, "tree", needs_body=True),
    "path_evil": Kind(path_evil, "tree", needs_body=True),
}
