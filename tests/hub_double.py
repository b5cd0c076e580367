"""A double of the Hugging Face Hub: the addresses, the shapes and the headers of the real one, and faults on demand.

    python tests/hub_double.py FOLDER... [--port P] [--rate BYTES_PER_S] [--token T] [--fault SPEC ...]

Serves each checkpoint folder as `org/<its name>`; SPEC is such as `cut,where=cdn,nth=2,at=99,how=rst` (hub_faults.py).
Three origins, since the token must reach the first only: the Hub, the CDN that large files come from, and a foreign
host that has the same bytes and no business in it. They differ by host name, for some clients ignore the port.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_answer import Answer, Request, Slice, json_answer, refusal
from hub_faults import Fault, Strike, attempt
from hub_origin import Origin
from hub_repository import DATE, Entry, Repository, filler, listing, model_info, sha1

__all__ = ["Fault", "HubDouble", "Repository", "Request"]

RATE_LIMIT = {
    "RateLimit": '"resolvers";r=2998;t=172',
    "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300',
}
REPO, REV, FILE = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)", r"(?P<file>.+)"
ADDRESSES = {
    "revision": rf"/api/models/{REPO}(?:/revision/{REV})?",
    "tree": rf"/api/models/{REPO}/tree/{REV}(?:/{FILE})?",
    "paths-info": rf"/api/models/{REPO}/paths-info/{REV}",
    "refs": rf"/api/models/{REPO}/refs",
    "commits": rf"/api/models/{REPO}/commits/{REV}",
    "auth-check": rf"/api/models/{REPO}/auth-check",
    "xet": rf"/api/models/{REPO}/xet-read-token/{REV}",
    "whoami": r"/api/whoami-v2",
    "harnesses": r"/api/agent-harnesses",
    "small": rf"/api/resolve-cache/models/{REPO}/{REV}/{FILE}",
    "loop": r"/loop/(?P<file>\d+)",
    "cdn": rf"/cdn/{REPO}/{REV}/{FILE}",
    "resolve": rf"/{REPO}/resolve/{REV}/{FILE}",
}


class _RefusedError(Exception):
    def __init__(self, answer: Answer) -> None:
        self.answer = answer


class HubDouble:
    """Runs inside `with`, on threads of this process; all of them and their sockets are gone afterwards.

    token: the one that is good; any is, if None. others: good too, but on no gated repository's list. rate: bytes per
    second of each connection, 0 for as fast as can be. page_size: entries of a tree in one answer. direct: small files
    without the detour over `/api/resolve-cache`, as private and gated repositories always do.

    requests, fired (by kind of fault), leaks (tokens seen, by origin) tell what happened; `faults` may be changed.
    """

    def __init__(
        self, repositories: Mapping[str, Path | Repository], *, token: str | None = None, others: Iterable[str] = (),
        faults: Iterable[Fault] = (), rate: int = 0, page_size: int = 1000, direct: bool = False, port: int = 0,
    ) -> None:  # fmt: skip
        self.repositories = {
            name: held if isinstance(held, Repository) else Repository(held) for name, held in repositories.items()
        }
        self.token, self.others = token, tuple(others)
        self.faults, self.rate, self.page_size, self.direct, self.port = list(faults), rate, page_size, direct, port
        self.requests: list[Request] = []
        self.fired: Counter[str] = Counter()
        self.leaks: Counter[str] = Counter()
        self.closing = threading.Event()
        self.origins: dict[str, Origin] = {}
        self._seen: Counter[Fault] = Counter()
        self._lock = threading.Lock()
        self._answers: dict[str, Callable[[Request, dict[str, str]], Answer]] = {
            "revision": self._revision, "tree": self._tree, "paths-info": self._paths_info, "refs": self._refs,
            "commits": self._commits, "auth-check": self._auth_check, "xet": self._xet, "whoami": self._whoami,
            "harnesses": self._harnesses, "small": self._small, "loop": self._loop, "cdn": self._cdn,
            "resolve": self._resolve,
        }  # fmt: skip

    def __enter__(self) -> HubDouble:
        try:
            for name, host in (("hub", "127.0.0.1"), ("cdn", "127.0.0.2"), ("foreign", "127.0.0.3")):
                self.origins[name] = Origin(name, (host, self.port if name == "hub" else 0), self)
        except OSError:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.closing.set()
        for origin in self.origins.values():
            origin.close()

    @property
    def endpoint(self) -> str:
        return self.origins["hub"].url

    @property
    def cdn(self) -> str:
        return self.origins["cdn"].url

    @property
    def foreign(self) -> str:
        return self.origins["foreign"].url

    def commit(self, repository: str, ref: str = "main") -> str:
        return self.repositories[repository].heads[ref]

    def move(self, repository: str, folder: Path | None = None) -> str:
        """Make main another commit: what is in `folder`, or the same files once more. The old one stays."""
        held = self.repositories[repository]
        if folder is not None:
            return held.commit("main", folder)
        old = held.heads["main"]
        return held.point("main", sha1(f"after {old}".encode()), held.commits[old])

    def sent(self, file: str = "") -> int:
        """Bytes of files whose path holds `file`, by whatever address."""
        return sum(request.sent for request in tuple(self.requests) if request.start >= 0 and file in request.file)

    def answer(self, request: Request) -> Answer:
        """The right one, then the faults in their order."""
        self.requests.append(request)
        if request.origin != "hub" and request.token is not None:
            return self._leak(request)
        try:
            answer = self._route(request)
        except _RefusedError as refused:
            answer = refused.answer
        for fault in tuple(self.faults):
            answer = self._strike(fault, request, answer)
        request.status = answer.status
        return answer

    def _leak(self, request: Request) -> Answer:
        self.leaks[request.origin] += 1
        request.status = 400
        print(f"LEAK: a token was sent to {request.origin}: {request.method} {request.path}", file=sys.stderr)
        return json_answer({"error": "a token was sent here"}, 400)

    def _strike(self, fault: Fault, request: Request, answer: Answer) -> Answer:
        last = fault.nth + fault.times - 1 if fault.times >= 0 else None
        if last is not None and self._seen[fault] >= last:
            return answer
        wrong = attempt(answer, Strike(fault, request, self))
        if wrong is None:
            return answer
        with self._lock:
            self._seen[fault] += 1
            if self._seen[fault] < fault.nth or (last is not None and self._seen[fault] > last):
                return answer
            self.fired[fault.kind] += 1
        request.faults.append(fault.kind)
        return wrong

    def _route(self, request: Request) -> Answer:
        """The foreign host has whatever the others have."""
        path = request.path.partition("?")[0]
        for where, address in ADDRESSES.items():
            match = re.fullmatch(address, path)
            if match and request.origin in ("cdn" if where == "cdn" else "hub", "foreign"):
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value}
                request.where = where
                request.repository, request.file = groups.get("repo", ""), groups.get("file", "")
                return self._answers[where](request, groups)
        return json_answer({"error": "no such address"}, 404)

    # Who may see what

    def _repository(self, request: Request, names: dict[str, str]) -> Repository:
        self._check_token(request)
        held = self.repositories.get(names["repo"])
        if held is None or (held.private and not self._is_allowed(request, held)):
            raise _RefusedError(refusal("repo_404" if request.token else "repo_401"))
        if held.disabled:
            raise _RefusedError(refusal("disabled"))
        return held

    def _check_token(self, request: Request) -> None:
        if request.token is not None and self.token is not None and request.token not in (self.token, *self.others):
            raise _RefusedError(refusal("bad_token"))

    def _is_allowed(self, request: Request, held: Repository) -> bool:
        allowed = (self.token,) if held.allowed is None else held.allowed
        return request.token is not None and request.token in allowed

    def _check_gate(self, request: Request, held: Repository) -> None:
        """Anyone may list a gated repository; its files are for those on the list."""
        if held.gated != "none" and not self._is_allowed(request, held):
            raise _RefusedError(refusal("gated_403" if request.token else "gated_none"))

    def _at(self, held: Repository, names: dict[str, str]) -> tuple[str, dict[str, Entry]]:
        rev = names.get("rev", "main")
        sha = held.heads.get(rev, rev)
        if sha not in held.commits:
            raise _RefusedError(refusal("rev_404"))
        return sha, held.commits[sha]

    # The API

    def _revision(self, request: Request, names: dict[str, str]) -> Answer:
        held = self._repository(request, names)
        sha, entries = self._at(held, names)
        blobs = "blobs" in _query(request)
        return json_answer(model_info(names["repo"], held, sha, entries, blobs))

    def _tree(self, request: Request, names: dict[str, str]) -> Answer:
        entries = self._at(self._repository(request, names), names)[1]
        query = _query(request)
        cursor, recursive = query.get("cursor", "0"), query.get("recursive", "false")
        if cursor.startswith("many-"):
            start, total = map(int, cursor.split("-")[1:])
            stop = min(start + self.page_size, total)
            page, following = [filler(i) for i in range(start, stop)], f"many-{stop}-{total}" if stop < total else ""
        else:
            told = listing(entries, names.get("file", ""), recursive == "true")
            stop = int(cursor) + self.page_size
            page, following = told[int(cursor) : stop], str(stop) if stop < len(told) else ""
        link = f"{self.endpoint}{urlsplit(request.path).path}?expand=false&recursive={recursive}"
        return json_answer(page, headers={"Link": f'<{link}&cursor={following}>; rel="next"'} if following else {})

    def _paths_info(self, request: Request, names: dict[str, str]) -> Answer:
        entries = self._at(self._repository(request, names), names)[1]
        asked = parse_qs(request.body.decode()).get("paths", [])
        return json_answer([told for told in listing(entries, "", True) if told["path"] in asked])

    def _refs(self, request: Request, names: dict[str, str]) -> Answer:
        heads = self._repository(request, names).heads
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in heads.items()
            if not name.startswith("refs/")
        ]
        return json_answer({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def _commits(self, request: Request, names: dict[str, str]) -> Answer:
        sha = self._at(self._repository(request, names), names)[0]
        return json_answer([{"id": sha, "title": "Upload", "message": "", "date": DATE, "authors": [{"user": "org"}]}])

    def _auth_check(self, request: Request, names: dict[str, str]) -> Answer:
        self._check_gate(request, self._repository(request, names))
        return json_answer({"ok": True})

    def _xet(self, request: Request, names: dict[str, str]) -> Answer:
        self._repository(request, names)
        return json_answer({"error": "no Xet here"}, 500)

    def _whoami(self, request: Request, names: dict[str, str]) -> Answer:
        self._check_token(request)
        if request.token is None:
            raise _RefusedError(refusal("bad_token"))
        token = {"displayName": "t", "role": "read"}
        return json_answer({"type": "user", "name": "u", "auth": {"accessToken": token}, "orgs": []})

    def _harnesses(self, request: Request, names: dict[str, str]) -> Answer:
        return json_answer({"standardEnvVars": [], "harnesses": {}})

    # Files

    def _resolve(self, request: Request, names: dict[str, str]) -> Answer:
        held = self._repository(request, names)
        self._check_gate(request, held)
        sha, entry = self._file(held, names)
        where = f"{names['repo']}/{sha}/{quote(entry.path)}"
        headers = {"X-Repo-Commit": sha, "X-Request-Id": "Root=1-double", **RATE_LIMIT}
        if entry.sha256:
            linked = {"X-Linked-Size": str(entry.nbytes), "X-Linked-Etag": entry.etag, "Accept-Ranges": "bytes"}
            location = f"{self.cdn}/cdn/{where}?Expires=4102444800&Signature={_signature(sha, entry.path)}"
            return Answer(302, headers | linked | {"Location": location}).with_body()
        if self.direct or held.private or held.gated != "none":
            return _served(request, entry, headers)
        query = f"{quote(request.path.partition('?')[0], safe='')}=&etag={quote(entry.etag)}"
        return Answer(307, headers | {"Location": f"/api/resolve-cache/models/{where}?{query}"}).with_body()

    def _small(self, request: Request, names: dict[str, str]) -> Answer:
        sha, entry = self._file(self._repository(request, names), names)
        return _served(request, entry, {"X-Repo-Commit": sha})

    def _cdn(self, request: Request, names: dict[str, str]) -> Answer:
        """A signed address is all that it asks for."""
        held = self.repositories.get(names["repo"])
        if held is None or _query(request).get("Signature") != _signature(names["rev"], names["file"]):
            return json_answer({"error": "bad signature"}, 403)
        return _served(request, self._file(held, names)[1], {})

    def _loop(self, request: Request, names: dict[str, str]) -> Answer:
        return Answer(302, {"Location": f"/loop/{int(names['file']) + 1}"}).with_body()

    def _file(self, held: Repository, names: dict[str, str]) -> tuple[str, Entry]:
        sha, entries = self._at(held, names)
        if names["file"] not in entries:
            raise _RefusedError(refusal("entry_404", sha))
        return sha, entries[names["file"]]


def _query(request: Request) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(urlsplit(request.path).query).items()}


def _signature(sha: str, path: str) -> str:
    return hashlib.sha256(f"double {sha} {path}".encode()).hexdigest()[:32]


def _served(request: Request, entry: Entry, headers: dict[str, str]) -> Answer:
    """The file, or the range of it that was asked for."""
    whole = Slice(entry.file, 0, entry.nbytes)
    told = {"ETag": entry.etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    asked = _range(request, entry)
    if asked is None:
        return Answer(200, told, whole=whole).with_body(whole)
    start, stop = asked
    if start >= stop:
        return json_answer({"error": "range"}, 416, told | {"Content-Range": f"bytes */{entry.nbytes}"})
    told["Content-Range"] = f"bytes {start}-{stop - 1}/{entry.nbytes}"
    return Answer(206, told, whole=whole).with_body(whole[start:stop])


def _range(request: Request, entry: Entry) -> tuple[int, int] | None:
    """Start and stop; None for the whole file, as for a range of a file that has changed since."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if match is None or request.headers.get("if-range", entry.etag) != entry.etag:
        return None
    first, last = match.groups()
    if not first:
        return (max(0, entry.nbytes - int(last)), entry.nbytes) if last else None
    return int(first), min(int(last) + 1, entry.nbytes) if last else entry.nbytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--rate", type=int, default=0, help="bytes per second of each connection")
    parser.add_argument("--token")
    parser.add_argument("--fault", type=Fault.parse, action="append", default=[], metavar="SPEC")
    args = parser.parse_args()
    repositories = {f"org/{folder.resolve().name}": folder for folder in args.folders}
    options: dict[str, Any] = {"token": args.token, "faults": args.fault, "rate": args.rate, "port": args.port}
    with HubDouble(repositories, **options) as hub, suppress(KeyboardInterrupt):
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
        for name in repositories:
            print(name, hub.commit(name), flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
