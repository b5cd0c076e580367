"""What the Hub double was asked and what it answers: plain data, so that a fault can be a function of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Slice:
    """Bytes `start` to `stop` of a file on disk."""

    file: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, part: slice) -> Slice:
        start, stop, _ = part.indices(len(self))
        return Slice(self.file, self.start + start, self.start + stop)


@dataclass(frozen=True, slots=True)
class Fill:
    """One byte, `count` times; made while it is sent, so a gigabyte costs nothing."""

    byte: bytes
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> Fill:
        start, stop, _ = part.indices(self.count)
        return Fill(self.byte, stop - start)


Piece = bytes | Slice | Fill
Body = tuple[Piece, ...]


def nbytes(body: Body) -> int:
    return sum(len(piece) for piece in body)


def part(body: Body, start: int, stop: int) -> Body:
    result = []
    for piece in body:
        if max(start, 0) < min(stop, len(piece)):
            result.append(piece[max(start, 0) : min(stop, len(piece))])
        start, stop = start - len(piece), stop - len(piece)
    return tuple(result)


def read(piece: Piece) -> bytes:
    if isinstance(piece, bytes):
        return piece
    if isinstance(piece, Fill):
        return piece.byte * piece.count
    with piece.file.open("rb") as file:
        file.seek(piece.start)
        return file.read(len(piece))


@dataclass(frozen=True)
class Answer:
    """status: 0 sends no head at all. whole: the file that the body is a part of. then: done just before it is sent.

    wait: seconds before the head. step, pause: so many bytes, then so many seconds. ending: keep, fin, rst or stall.
    """

    status: int
    headers: dict[str, str]
    body: Body = ()
    whole: Slice | None = None
    wait: float = 0
    step: int = 0
    pause: float = 0
    chunked: bool = False
    ending: str = "keep"
    then: Callable[[], object] | None = None

    def with_body(self, *body: Piece) -> Answer:
        """The same with another body, whose length is told truly."""
        return replace(self, body=body).with_headers({"Content-Length": str(nbytes(body))})

    def with_headers(self, changes: Mapping[str, str | None]) -> Answer:
        """None takes a header away."""
        headers = {name: value for name, value in (self.headers | dict(changes)).items() if value is not None}
        return replace(self, headers=headers)

    def json(self) -> Any:
        return json.loads(b"".join(map(read, self.body)))


def json_answer(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    answer = Answer(status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})
    return answer.with_body(json.dumps(content).encode())


REFUSALS = {
    "gated_none": (401, "GatedRepo", "Access to this model is restricted. You must be authenticated to access it."),
    "gated_403": (403, "GatedRepo", "Access to this model is restricted and you are not in the authorized list."),
    "bad_token": (401, "", "Invalid credentials in Authorization header"),
    "repo_401": (401, "RepoNotFound", "Invalid username or password."),
    "repo_404": (404, "RepoNotFound", "Repository not found"),
    "rev_404": (404, "RevisionNotFound", "Invalid rev id"),
    "entry_404": (404, "EntryNotFound", "Entry not found"),
    "disabled": (403, "", "Access to this resource is disabled."),
}


def refusal(name: str, commit: str = "") -> Answer:
    """What huggingface-hub makes its exceptions of; it goes by the code, and for two of them by the message."""
    status, code, message = REFUSALS[name]
    headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
    return json_answer({"error": message}, status, {name: value for name, value in headers.items() if value})


@dataclass(eq=False)
class Request:
    """origin: hub, cdn or foreign. where: the endpoint. file: its path in the repository, if it is about one.

    sent: bytes of body handed to the kernel. start: the first byte of the file among them, -1 without any.
    faults: kinds that struck.
    """

    origin: str
    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes = b""
    where: str = ""
    repository: str = ""
    file: str = ""
    status: int = 0
    start: int = -1
    sent: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def token(self) -> str | None:
        return self.headers["authorization"].removeprefix("Bearer ") if "authorization" in self.headers else None

    @property
    def places(self) -> set[str]:
        if self.origin == "foreign":
            return {"foreign", "any"}
        api = self.path.startswith("/api/") and self.where != "small"
        return {self.where, self.origin, "any"} | ({"api"} if api else set())
