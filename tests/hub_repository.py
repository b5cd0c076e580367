"""Repositories of the Hub double: folders at commits, and the JSON that the Hub tells of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_NBYTES = 10 << 20  # the Hub keeps larger files outside of git
DATE = "2024-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Entry:
    """A file at a commit. oid: of its git blob, which for a large file is the pointer to `sha256`."""

    path: str
    file: Path
    nbytes: int
    oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return f'"{self.sha256 or self.oid}"'


@dataclass
class Repository:
    """refs: folders of other branches and tags. gated: none, auto or manual. allowed: tokens that are on its list.

    By default those are the double's own token alone. Digests of large files are read from `<folder>/sha256sums`, if
    there is one, as `sha256sum` writes it.
    """

    folder: Path
    refs: Mapping[str, Path] = field(default_factory=dict)
    gated: str = "none"
    private: bool = False
    disabled: bool = False
    allowed: tuple[str, ...] | None = None
    lfs_nbytes: int = LFS_NBYTES
    heads: dict[str, str] = field(init=False, default_factory=dict)
    commits: dict[str, dict[str, Entry]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for ref, folder in {"main": self.folder, **self.refs}.items():
            self.commit(ref, folder)

    def commit(self, ref: str, folder: Path) -> str:
        """Make `ref` what is in the folder now; the name of a commit is a hash of it, the same every time."""
        entries = {entry.path: entry for entry in entries_of(folder, self.lfs_nbytes)}
        lines = [f"{entry.path} {entry.oid} {entry.sha256}" for entry in entries.values()]
        return self.point(ref, sha1("\n".join(lines).encode()), entries)

    def point(self, ref: str, sha: str, entries: dict[str, Entry]) -> str:
        self.commits[sha] = entries
        self.heads[ref] = sha
        return sha


def entries_of(folder: Path, lfs_nbytes: int) -> Iterable[Entry]:
    listed = folder / "sha256sums"
    known = dict(line.split(maxsplit=1)[::-1] for line in listed.read_text().splitlines()) if listed.is_file() else {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path != listed):
        path, nbytes = file.relative_to(folder).as_posix(), file.stat().st_size
        if path.endswith((".safetensors", "tokenizer.model")) or nbytes > lfs_nbytes:
            sha256 = known.get(path) or _sha256(file)
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {nbytes}\n"
            yield Entry(path, file, nbytes, _blob(pointer.encode()), sha256)
        else:
            yield Entry(path, file, nbytes, _blob(file.read_bytes()), None)


_digests: dict[tuple[Path, int, int], str] = {}


def _sha256(path: Path) -> str:
    """Once per content, however many doubles a test session makes."""
    state = path.stat()
    key = (path.resolve(), state.st_size, state.st_mtime_ns)
    if key not in _digests:
        with path.open("rb") as file:
            _digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _digests[key]


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _blob(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content)


def model_info(name: str, held: Repository, sha: str, entries: dict[str, Entry], blobs: bool) -> dict[str, Any]:
    weights = sum(entry.nbytes for path, entry in entries.items() if path.endswith(".safetensors")) // 2
    config = json.loads(entries["config.json"].file.read_bytes()) if "config.json" in entries else {}
    return {
        "_id": sha[:24], "id": name, "modelId": name, "author": name.split("/")[0], "sha": sha,
        "private": held.private, "gated": False if held.gated == "none" else held.gated, "disabled": held.disabled,
        "lastModified": DATE, "createdAt": DATE, "tags": [], "downloads": 0, "likes": 0,
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "config": {key: config[key] for key in ("architectures", "model_type") if key in config},
        "safetensors": {"parameters": {"BF16": weights}, "total": weights},
        "usedStorage": sum(entry.nbytes for entry in entries.values()),
        "siblings": [_sibling(entry, blobs) for entry in entries.values()],
    }  # fmt: skip


def _sibling(entry: Entry, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": entry.path}
    told = {"rfilename": entry.path, "size": entry.nbytes, "blobId": entry.oid}
    return told | ({"lfs": {"sha256": entry.sha256, "size": entry.nbytes, "pointerSize": 135}} if entry.sha256 else {})


def listing(entries: dict[str, Entry], below: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders, by path."""
    told: dict[str, dict[str, Any]] = {}
    for entry in entries.values():
        for parent in list(Path(entry.path).parents)[:-1]:
            folder = parent.as_posix()
            told[folder] = {"type": "directory", "oid": sha1(folder.encode()), "size": 0, "path": folder}
        told[entry.path] = {"type": "file", "oid": entry.oid, "size": entry.nbytes, "path": entry.path}
        if entry.sha256:
            told[entry.path]["lfs"] = {"oid": entry.sha256, "size": entry.nbytes, "pointerSize": 135}
    prefix = f"{below}/" if below else ""
    inside = sorted(path for path in told if path.startswith(prefix))
    return [told[path] for path in inside if recursive or "/" not in path.removeprefix(prefix)]


def filler(i: int) -> dict[str, Any]:
    return {"type": "file", "oid": _blob(b""), "size": 0, "path": f"filler/{i:07d}.txt"}
