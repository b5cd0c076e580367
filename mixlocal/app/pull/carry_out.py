"""From a model of the Hub to a finished store: it can be killed at any moment, and goes on at the next call."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from mixlocal.app.hardware import existing_parent
from mixlocal.app.progress import Step
from mixlocal.app.pull.landing import Landing, Landings
from mixlocal.app.pull.survey import Shard, Survey
from mixlocal.app.quantization import DISK_MARGIN, Quantization, StoreJob
from mixlocal.errors import DiskFullError, LockedError, NetworkError, PermissionDeniedError
from mixlocal.store.building import building_folder, journal_path, sweep
from mixlocal.store.download import AdoptedCheck, Event, Fetcher, FileDownload, Remote, Work, WrongBytesError
from mixlocal.store.download_folder import DownloadFolder
from mixlocal.store.http import Client
from mixlocal.store.journal import shards_used_up
from mixlocal.store.lock import locked
from mixlocal.store.manifest import MANIFEST, Source, SourceFile
from mixlocal.store.model_store import SMALL_FILES, ModelStore
from mixlocal.store.part_file import AdoptedFile, PartFile
from mixlocal.store.paths import Home
from mixlocal.store.patience import Cancellation, RateLimit


@dataclass(frozen=True, slots=True)
class DiskNeeds:
    """Bytes. fetch: still to come over the network. store: the finished model. peak: what all takes at most, of which
    `there` is on the disk already. jobs: how many shards may be on the disk at once."""

    where: Path
    fetch: int
    store: int
    peak: int
    there: int
    free: int
    jobs: int

    @property
    def missing(self) -> int:
        return max(0, self.peak - self.there - self.free)

    def check(self) -> None:
        """Raises `DiskFullError` before anything is fetched."""
        if self.missing:
            raise DiskFullError(
                f"{self.where}: {self.peak / 1e9:.1f} GB are needed at most, {self.there / 1e9:.1f} GB are there, "
                f"and {self.free / 1e9:.1f} GB are free",
                f"free {self.missing / 1e9:.1f} GB, or move everything with --home",
            )


@dataclass(frozen=True, slots=True)
class Line:
    """The connection to the Hub, and how to break it off. client: None offline."""

    client: Client | None
    cancellation: Cancellation


@dataclass(frozen=True, slots=True)
class PullOptions:
    """jobs: files fetched at once. rate: bytes/s over all of them, None for what the network gives."""

    jobs: int
    rate: float | None = None
    keep_source: bool = False


def disk_needs(survey: Survey, home: Home, options: PullOptions) -> DiskNeeds:
    """With as many shards at once as the disk has room for, at least one."""
    folder = DownloadFolder(home.downloads / survey.model.name)
    final = home.store(survey.model.name, survey.model.variant)
    used = shards_used_up(journal_path(final))
    files = [s.file for s in survey.shards if s.copy is None and s.file.path not in used]
    landed = sum(folder.landed(file) for file in files)
    store = survey.blueprint.store_bytes + sum(map(len, survey.small.values()))
    building = building_folder(final)
    there = landed + sum(path.stat().st_blocks * 512 for path in building.glob("*")) if building.is_dir() else landed
    free = shutil.disk_usage(existing_parent(final)).free
    sizes = sorted((file.nbytes for file in files), reverse=True)
    for jobs in range(options.jobs, 0, -1):
        at_once = sum(sizes if options.keep_source else sizes[:jobs])
        peak = store + at_once + DISK_MARGIN
        needs = DiskNeeds(final, sum(sizes) - landed, store, peak, there, free, jobs)
        if not needs.missing:
            break
    return needs


def carry_out(
    survey: Survey, line: Line, home: Home, needs: DiskNeeds, options: PullOptions
) -> Generator[Step, None, ModelStore]:
    """Fetch, quantize, publish. Raises `NetworkError`, `DiskFullError`, `CorruptError`, `LockedError`, ..."""
    model = survey.model
    final = home.store(model.name, model.variant)
    folder = DownloadFolder(home.downloads / model.name)
    with locked(final), locked(folder.path):
        sweep(final)
        sweep(folder.path)
        if (final / MANIFEST).is_file():  # another process was faster
            return ModelStore.open(final)
        folder.begin(survey.listing, model.revision)
        for name, data in survey.small.items():
            folder.keep(name, data)
        entry = model.entry
        job = StoreJob(
            out=final, name=model.name, variant=model.variant, recipe=survey.recipe,
            licence=entry.licence if entry else None, template=entry.template if entry else None,
        )  # fmt: skip
        with Quantization(job, survey.blueprint, _fingerprint(survey)) as task:
            try:
                yield from _land(task, survey, line, folder, needs.jobs, options)
            except WrongBytesError:
                folder.forget()
                raise
            task.finish(_source(survey), {name: survey.small[name] for name in SMALL_FILES if name in survey.small})
        if not options.keep_source:
            folder.remove()
    return ModelStore.open(final)


def clean_up(final: Path, folder: DownloadFolder) -> None:
    """Remove what a call left that was killed behind its last step; the model is finished, so nothing depends on it."""
    if not (journal_path(final).exists() or folder.is_leftover() or any(folder.path.parent.glob(".*.removed"))):
        return
    with contextlib.suppress(LockedError, PermissionDeniedError), locked(final, 0.1), locked(folder.path, 0.1):
        sweep(final)
        sweep(folder.path)
        if folder.is_leftover():
            folder.remove()


def _land(
    task: Quantization, survey: Survey, line: Line, folder: DownloadFolder, jobs: int, options: PullOptions
) -> Iterator[Step]:
    events: deque[Event] = deque()
    workshop = _Workshop(survey, line, folder, RateLimit(options.rate), events.append)
    landings = [
        Landing(shard, workshop.begin(shard, task))
        for shard in survey.shards
        if any(task.lacks(ref.name) for ref in shard.tensors) or not task.accepted(shard.file.path)
    ]
    total = sum(shard.file.nbytes for shard in survey.shards)
    left = sum(landing.shard.file.nbytes for landing in landings)
    slots = len(landings) if options.keep_source else jobs
    fetcher = Fetcher([landing.work for landing in landings], min(jobs, max(1, len(landings))), slots, events.append)
    try:
        yield from Landings(
            task, landings, fetcher, events, line.cancellation, total, options.keep_source, total - left
        ).run()
    finally:
        for landing in landings:
            landing.work.part.close()


@dataclass(frozen=True, slots=True)
class _Workshop:
    """Makes the work that brings a shard here."""

    survey: Survey
    line: Line
    folder: DownloadFolder
    limit: RateLimit
    tell: Callable[[Event], None]

    def begin(self, shard: Shard, task: Quantization) -> Work:
        """What was made of bytes that are lost since counts no more."""
        if shard.copy is not None:
            return AdoptedCheck(AdoptedFile(shard.file, shard.copy), self.tell, self.line.cancellation.check)
        if self.line.client is None:
            raise NetworkError(f"{self.survey.model}/{shard.file.path}: offline, and this file is not here")
        part = PartFile(self.folder.path, shard.file, self.survey.listing.commit)
        task.revoke(shard.file.path, part.landed)
        remote = Remote(self.line.client, self.survey.listing.repository, self.survey.listing.commit)
        return FileDownload(remote, part, self.tell, self.limit)


def _source(survey: Survey) -> Source:
    files = (SourceFile(s.file.path, s.file.nbytes, s.file.digest.sha256) for s in survey.shards)
    return Source(survey.model.repository, survey.listing.commit, tuple(files))


def _fingerprint(survey: Survey) -> str:
    """Changes whenever the result could."""
    files = [(s.file.path, s.file.nbytes, s.file.digest.value) for s in survey.shards]
    return json.dumps([survey.listing.repository, survey.listing.commit, files])
