"""A batch begins, or goes on where it was left: only as it was begun, and only over an output that is its own."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from mixlocal.app.batch.fingerprint import check_same, fingerprint
from mixlocal.app.batch.source import Source, Survey
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import RefusedError
from mixlocal.store.batch_folder import BatchFolder, BatchManifest, InputNote


@dataclass(frozen=True, slots=True)
class Terms:
    """identity and defaults: of the engine that will answer. seed: of the command line. fresh: throw away what an
    earlier run did. retry: ask rows that failed once more. max_failures: stop when so many have, in this run."""

    identity: Mapping[str, str]
    defaults: SamplingParams
    seed: int | None = None
    fresh: bool = False
    retry: bool = False
    max_failures: int | None = None

    @property
    def model(self) -> str:
        return ":".join(filter(None, (self.identity.get("model"), self.identity.get("variant"))))


def open_manifest(folder: BatchFolder, source: Source, survey: Survey, terms: Terms) -> BatchManifest:
    """Of the batch that is there, or of a new one. Raises `RefusedError` naming what differs."""
    marks = fingerprint(source.setup, terms.identity, terms.defaults)
    manifest = None if terms.fresh else folder.read_manifest()
    if manifest is None or not manifest.owns_output:
        _check_output(folder, fresh=terms.fresh)
    if manifest is None:
        seed = secrets.randbelow(1 << 31) if terms.seed is None else terms.seed
        name = source.name.encode(errors="replace").decode()
        note = InputNote(name, survey.sha256, len(survey.keys))
        manifest = BatchManifest(marks, seed, note, owns_output=terms.fresh)
        folder.begin(manifest)
        return manifest
    seed = manifest.seed if terms.seed is None else terms.seed
    before, now = {"seed": str(manifest.seed)}, {"seed": str(seed)}
    check_same(manifest.fingerprint | before, marks | now, folder.path)
    return manifest


def own_output(folder: BatchFolder, manifest: BatchManifest) -> BatchManifest:
    """From now on what lies at the output's place may be replaced."""
    if manifest.owns_output:
        return manifest
    manifest = msgspec.structs.replace(manifest, owns_output=True)
    folder.write_manifest(manifest)
    return manifest


def _check_output(folder: BatchFolder, *, fresh: bool) -> None:
    if folder.out.is_dir():
        raise RefusedError(f"{folder.out} is a folder", "name a file")
    if not fresh and (folder.out.is_symlink() or folder.out.exists()):
        raise RefusedError(
            f"{folder.out} is there already, and no batch is known that wrote it",
            "choose another output, or give --fresh to replace it",
        )
