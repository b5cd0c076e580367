"""Disk space that finished and abandoned work still takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixlocal.errors import LockedError
from mixlocal.store.building import journal_path
from mixlocal.store.durable import folder_bytes, remove_file, remove_folder
from mixlocal.store.lock import locked
from mixlocal.store.logit_file import SUFFIX as LOGITS_SUFFIX
from mixlocal.store.manifest import MANIFEST
from mixlocal.store.paths import BUILDING_SUFFIX, Home

LOCK_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Leftover:
    """paths: what would go, files and folders. guard: the folder whose lock says that nobody is at work there.
    unfinished: a pull or quantize that could go on from it."""

    what: str
    paths: tuple[Path, ...]
    guard: Path
    unfinished: bool

    @property
    def nbytes(self) -> int:
        """On the disk: a store under construction is allocated at once."""
        return sum(folder_bytes(path) if path.is_dir() else path.stat().st_size for path in self.paths if path.exists())


def find_leftovers(home: Home) -> Iterator[Leftover]:
    """What nobody needs to run a model, sorted by kind."""
    for grave in sorted([*home.models.glob("*/.*.removed"), *home.downloads.glob(".*.removed")]):
        yield Leftover(f"a removed folder: {grave.name}", (grave,), grave, False)
    for building in sorted(home.models.glob(f"*/*{BUILDING_SUFFIX}")):
        final = building.with_name(building.name.removesuffix(BUILDING_SUFFIX))
        name = f"{final.parent.name}:{final.name}"
        yield Leftover(
            f"{name}, begun and not finished", (building, journal_path(final)), final, not _is_finished(final)
        )
    for entry in sorted(home.downloads.glob("*")):
        if entry.name.startswith("."):
            continue
        bad = tuple(sorted(entry.glob("*.bad-*"))) if entry.is_dir() else ()
        if bad:
            yield Leftover(f"damaged downloads of {entry.name}", bad, entry, False)
        model = home.models / entry.name.removesuffix("-checkpoint")  # as the source that smolmix is built of is called
        done = any(_is_finished(final) for final in model.glob("*"))
        yield Leftover(f"downloads of {entry.name}", (entry,), entry, entry.is_dir() and not done)
    for file in sorted(home.logits.glob(f"*{LOGITS_SUFFIX}")):
        yield Leftover(f"reference logits {file.name}", (file,), file, False)


def prune(leftover: Leftover) -> bool:
    """Remove it; False if somebody is at work there."""
    try:
        with locked(leftover.guard, LOCK_SECONDS):
            for path in leftover.paths:
                if path.is_dir():
                    remove_folder(path)
                else:
                    remove_file(path)
    except LockedError:
        return False
    return True


def _is_finished(final: Path) -> bool:
    return not final.name.endswith(BUILDING_SUFFIX) and (final / MANIFEST).is_file()
