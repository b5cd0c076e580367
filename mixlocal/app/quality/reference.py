"""The file with a reference's logits: found, or made, or gone on with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from mixlocal.app.hardware import existing_parent
from mixlocal.errors import CorruptError, DiskFullError, NotFoundError, RefusedError
from mixlocal.store.lock import locked
from mixlocal.store.logit_file import SUFFIX, LogitHead, LogitReader, LogitWriter, create
from mixlocal.store.paths import Home

# What each field of a head says, where it is not as it should be.
_FROM_ANOTHER = {
    "model": "model", "manifest_sha256": "store of the model", "text_sha256": "text", "tokens_sha256": "text",
    "context": "--ctx", "experts_per_token": "number of experts per token", "arithmetic": "device",
    "kv_dtype": "--kv-dtype", "mixlocal": "version of mixlocal", "scored": "--ctx", "vocab_size": "model",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reference:
    """path: named by what the numbers depend on, so that other numbers are another file; or as the user says (named),
    and then it is refused if it is of another kind. chunks: how many are wanted."""

    path: Path
    guard: Path
    named: bool
    head: LogitHead
    chunks: int

    @classmethod
    def of(cls, head: LogitHead, chunks: int, named: Path | None, folders: Home) -> Reference:
        """Raises `RefusedError` for a named file from another text, model or setting, or that is no such file,
        `NotFoundError` for one whose folder is not there."""
        if named is None:
            name = head.model.replace(":", ".")
            path = folders.logits / f"{name}-{head.digest()[:16]}{SUFFIX}"
            return cls(path, path, False, head, chunks)
        path = named.absolute()
        if not path.parent.is_dir():
            raise NotFoundError(f"--logits {named}: there is no folder {path.parent}", "make it first")
        guard = folders.logits / xxhash.xxh3_64_hexdigest(str(path).encode(errors="surrogateescape"))
        found = cls(path, guard, True, head, chunks)
        found.count_ready()
        return found

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self.head.file_bytes(self.chunks)

    def count_ready(self) -> int:
        """How many chunks, from the first on, are on the disk and whole. Raises as `of`."""
        try:
            with LogitReader(self.path) as reader:
                if reader.head == self.head:
                    return reader.good_chunks(self.chunks)
                if self.named:
                    raise RefusedError(self._refusal(reader.head), "remove it, or give --logits another name")
        except NotFoundError:
            return 0
        except (CorruptError, RefusedError):
            if self.named:
                raise
        return 0

    def description(self) -> str:
        """What becomes of the disk, for people."""
        ready = self.count_ready()
        if ready == self.chunks:
            return f"reference logits: {self.path}"
        so_far = f", {ready} of {self.chunks} chunks are there" if ready else ""
        return (
            f"the reference's logits take {self.nbytes / 1e6:.{0 if self.nbytes > 1e7 else 1}f} MB{so_far}: {self.path}"
        )

    def check_disk(self) -> None:
        """Raises `DiskFullError` before anything is computed that could not be kept."""
        there = self.path.stat().st_size if self.path.is_file() else 0
        needed, free = max(0, self.nbytes - there), shutil.disk_usage(existing_parent(self.path)).free
        if needed > free:
            sizes = f"{needed / 1e9:.2f} GB more and {free / 1e9:.2f} are free"
            raise DiskFullError(
                f"{self.path.parent}: the reference's logits need {sizes}",
                "free some space, put the file elsewhere with --logits, or take fewer --chunks",
            )

    @contextmanager
    def writing(self) -> Iterator[tuple[int, LogitWriter]]:
        """Chunks that are there by now, and the writer of the next.

        Raises `LockedError` if another process writes the same.
        """
        with locked(self.guard):
            ready = self.count_ready()
            if not ready:
                create(self.path, self.head)
            with LogitWriter(self.path, self.head, ready) as writer:
                yield ready, writer

    def open(self) -> LogitReader:
        return LogitReader(self.path)

    def _refusal(self, found: LogitHead) -> str:
        names = [name for name in _FROM_ANOTHER if getattr(found, name) != getattr(self.head, name)]
        others = list(dict.fromkeys(_FROM_ANOTHER[name] for name in names))
        was = f", {found.model}" if "model" in others else f", {found.context}" if "--ctx" in others else ""
        return f"{self.path}: a reference from another {' and another '.join(others)}{was}"
