"""Checkpoint -> model store, streaming: memory holds about one tensor and its output, whatever the model's size."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from mixlocal.app.blueprint import Blueprint
from mixlocal.app.calibration import Calibration, calibrate, calibration_text
from mixlocal.app.fit import widen
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
        calibration = yield from _calibrate(job, weights, blueprint)
        job = _calibrated(job, calibration, blueprint)
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


def _calibrate(job: StoreJob, weights: Weights, blueprint: Blueprint) -> Generator[Progress, None, Calibration]:
    text = calibration_text(job.text)
    calibration = yield from calibrate(weights, blueprint, text, damage=job.recipe.fit is not None)
    return calibration


def _calibrated(job: StoreJob, calibration: Calibration, blueprint: Blueprint) -> StoreJob:
    """What is to be made, now that it is known what counts."""
    if job.recipe.fit is None:
        return replace(job, calibration=calibration)
    assert calibration.damage is not None
    wide = widen(blueprint, calibration.damage, job.recipe.fit)
    return replace(job, calibration=calibration, recipe=msgspec.structs.replace(job.recipe, wide=wide))


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
