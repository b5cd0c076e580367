"""Copies that huggingface-hub's cache has already: read, checked, and never changed.

Layout: models--ORG--REPO/{refs/REVISION, snapshots/COMMIT/PATH -> ../../blobs/DIGEST}.
"""

from __future__ import annotations

from pathlib import Path

from mixlocal.store.digest import Digest
from mixlocal.store.listing import Listing, RepoFile
from mixlocal.store.repo_names import is_commit, is_wanted


def cached_copy(cache: Path, repository: str, commit: str, file: RepoFile) -> Path | None:
    """A file of the right length under this name; its hash is still to be checked."""
    path = _folder(cache, repository) / "snapshots" / commit / file.path
    return path if path.is_file() and path.stat().st_size == file.nbytes else None


def cached_listing(cache: Path, repository: str, revision: str) -> Listing | None:
    """What the cache holds of a revision, without asking anybody: its blobs are named by their hashes."""
    folder = _folder(cache, repository)
    commit = revision if is_commit(revision) else _read_ref(folder / "refs" / revision)
    snapshot = folder / "snapshots" / (commit or "")
    if commit is None or not snapshot.is_dir():
        return None
    files = {}
    for path in sorted(snapshot.iterdir()):
        digest = _blob_digest(path)
        if digest is not None and is_wanted(path.name):
            files[path.name] = RepoFile(path.name, path.stat().st_size, digest)
    return Listing(repository, commit, files)


def _folder(cache: Path, repository: str) -> Path:
    return cache / f"models--{repository.replace('/', '--')}"


def _read_ref(path: Path) -> str | None:
    commit = path.read_text().strip() if path.is_file() else ""
    return commit if is_commit(commit) else None


def _blob_digest(path: Path) -> Digest | None:
    try:
        return Digest(path.readlink().name) if path.is_symlink() and path.is_file() else None
    except ValueError:
        return None
