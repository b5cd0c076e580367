"""What a repository holds at one commit."""

from __future__ import annotations

from dataclasses import dataclass

from mixlocal.store.digest import Digest


@dataclass(frozen=True, slots=True)
class RepoFile:
    path: str
    nbytes: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class Listing:
    """files: those that may be of use, by name; whatever else is there is never fetched. others: some of the rest."""

    repository: str
    commit: str
    files: dict[str, RepoFile]
    others: tuple[str, ...] = ()
