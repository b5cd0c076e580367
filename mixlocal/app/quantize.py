"""Checkpoint -> model store, streaming: memory holds about one tensor and its output, whatever the model's size."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from mixlocal.app.blueprint import Blueprint
from mixlocal.app.calibration import calibrate
from mixlocal.app.fit import room_to_widen, widen
from mixlocal.app.progress import Progress
from mixlocal.app.quantization import Quantization, StoreJob
from mixlocal.app.reading_ahead import Weights, read_ahead
from mixlocal.model.tensors import EXPERT_PARTS
from mixlocal.store.checkpoint import Checkpoint, TensorRef
from mixlocal.store.durable import named_errors
from mixlocal.store.manifest import Manifest, Source, SourceFile
from mixlocal.store.model_store import SMALL_FILES
from mixlocal.store.pieces import expert_piece


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What to make of which checkpoint. shard_digests: sha256 by file name, where known."""

    checkpoint: Path
    store: StoreJob
    source_name: str
    revision: str | None = None
    shard_digests: tuple[tuple[str, str], ...] = ()


def quantize_checkpoint(job: QuantizeJob) -> Generator[Progress, None, Manifest]:
    """Build a store of a checkpoint folder; see `quantize_weights`. Also raises `NotFoundError`."""
    checkpoint = Checkpoint(job.checkpoint)
    digests = dict(job.shard_digests)
    files = (SourceFile(path.name, path.stat().st_size, digests.get(path.name)) for path in checkpoint.shards)
    source = Source(job.source_name, job.revision, tuple(files))
    return (yield from quantize_weights(job.store, checkpoint, source))


def quantize_weights(job: StoreJob, weights: Weights, source: Source) -> Generator[Progress, None, Manifest]:
    """Build the store `job.out`; yields progress in bytes of the source, returns its manifest.

    Everything that can be refused is refused before the first byte is written. The caller holds the lock of `job.out`.
    Raises `RefusedError` (config, tensors, NaN), `CorruptError` (damaged shard), `DiskFullError`.
    """
    blueprint = Blueprint.of(weights.config, str(weights.folder / "config.json"), job.recipe)
    blueprint.check_tensors(str(weights.folder), weights.tensors)
    if job.calibrates:
        job = yield from _calibrated(job, weights, blueprint, source)
        blueprint = Blueprint.of(weights.config, str(weights.folder / "config.json"), job.recipe)
    total = sum(ref.nbytes for ref in weights.tensors.values())
    with Quantization(job, blueprint, _fingerprint(weights)) as quantization:
        refs = [weights.tensors[name] for name in blueprint.sources]
        todo = [ref for ref in refs if quantization.lacks(ref.name)]
        done = sum(ref.nbytes for ref in refs) - sum(ref.nbytes for ref in todo)
        yield Progress("quantize", done, total)
        for ref, tensor in zip(todo, read_ahead(todo, _usual_bytes(blueprint, todo)), strict=True):
            quantization.add(ref, tensor)
            done += ref.nbytes
            yield Progress("quantize", done, total, _describe(blueprint.sources[ref.name]))
        return quantization.finish(source, read_small_files(weights.folder))


def _calibrated(
    job: StoreJob, weights: Weights, blueprint: Blueprint, source: Source
) -> Generator[Progress, None, StoreJob]:
    """What is to be made, once it is known what counts."""
    text, fit = job.text, job.recipe.fit
    assert text is not None, "nothing to calibrate on"
    assert text.sha256 == job.recipe.calibrated_on, "another text"
    room = None if fit is None else room_to_widen(blueprint, _small_bytes(weights, blueprint, source), fit)
    calibration = yield from calibrate(weights, blueprint, text, damage=room is not None)
    job = replace(job, calibration=calibration)
    if room is None:
        return job
    assert calibration.damage is not None
    wide = widen(blueprint, calibration.damage, room)
    return replace(job, recipe=msgspec.structs.replace(job.recipe, wide=wide))


def _small_bytes(weights: Weights, blueprint: Blueprint, source: Source) -> int:
    """Of what a store holds beside its two large files; of its manifest, what it can be at most."""
    copied = sum(len(data) for data in read_small_files(weights.folder).values())
    lines = 160 * len(blueprint.layouts) + 80 * len(blueprint.trunk)  # checksums and errors
    return copied + 4096 + lines + len(msgspec.json.encode(source))


def read_small_files(folder: Path) -> dict[str, bytes]:
    """What a store takes over as it came, where it is there."""
    found = {}
    for path in (folder / name for name in SMALL_FILES):
        with named_errors(path):
            if path.is_file():
                found[path.name] = path.read_bytes()
    return found


def describe_errors(manifest: Manifest) -> dict[str, float]:
    """Relative error of every quantized tensor, by our names."""
    report = dict(manifest.attention_errors) if manifest.recipe.attention != "bf16" else {}
    for index, record in enumerate(manifest.records):
        for part, error in zip(EXPERT_PARTS, record.errors, strict=True):
            report[expert_piece(*divmod(index, manifest.n_experts), part)] = error
    return report


def _usual_bytes(blueprint: Blueprint, refs: Sequence[TensorRef]) -> int:
    """Of the largest tensor of an expert; those of the trunk are smaller, but for the embedding and the head."""
    return max((ref.nbytes for ref in refs if blueprint.sources[ref.name] not in blueprint.trunk), default=0)


def _describe(name: str) -> str:
    """What a tensor, by our name, belongs to, for people."""
    match name.split("."):
        case ["layers", layer, "experts", expert, _]:
            return f"layer {layer} expert {expert}"
        case _:
            return "attention, router, embeddings"


def _fingerprint(weights: Weights) -> str:
    """Changes whenever the files did."""
    files = {path: path.stat() for path in sorted({ref.path for ref in weights.tensors.values()})}
    shards = [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in files.items()]
    return json.dumps([weights.config, shards], sort_keys=True)
