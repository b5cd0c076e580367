"""Checkpoint -> model store, streaming: memory holds about one expert, whatever the model's size.

The store grows in `<variant>.building`. Each finished expert is one line in its journal, so a rerun after any kind of
death goes on behind the last one; nothing in the finished store depends on how often that happened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import msgspec
import torch

from mixlocal.app.hardware import existing_parent, probe
from mixlocal.app.progress import Progress
from mixlocal.errors import DiskFullError, RefusedError
from mixlocal.kernels.isa import set_threads
from mixlocal.kernels.quantizer import quantize_rows
from mixlocal.model.arch import Architecture, find_architecture
from mixlocal.model.config import ModelConfig
from mixlocal.model.load import SCALES_SUFFIX
from mixlocal.model.tensors import EXPERT_PARTS, TrunkTensor, expert_shape, trunk_tensors
from mixlocal.quant.format import ExpertLayout, QuantTensor
from mixlocal.quant.packing import read_record
from mixlocal.quant.quantize import check_finite
from mixlocal.store.building import Building, TrunkEntry
from mixlocal.store.checkpoint import Checkpoint, TensorRef
from mixlocal.store.manifest import FORMAT_VERSION, Manifest, Recipe, Source, SourceFile
from mixlocal.store.model_store import SMALL_FILES, TRUNK_FILE
from mixlocal.store.shard_writer import TensorSpec, write_shard

READABLE = (torch.bfloat16, torch.float16, torch.float32)
DISK_MARGIN = 64 << 20


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What to make of which checkpoint. shard_digests: sha256 by file name, where known."""

    checkpoint: Path
    out: Path
    name: str
    variant: str
    recipe: Recipe
    source_name: str
    revision: str | None = None
    shard_digests: tuple[tuple[str, str], ...] = ()
    licence: str | None = None
    template: str | None = None
    fresh: bool = False


def quantize_checkpoint(job: QuantizeJob) -> Generator[Progress, None, Manifest]:
    """Build the store `job.out`; yields progress in bytes of the source, returns its manifest.

    Everything that can be refused is refused before the first byte is written. The caller holds the lock of `job.out`.
    Raises `RefusedError` (config, tensors, NaN), `CorruptError` (damaged shard), `DiskFullError`.
    """
    set_threads(probe(job.out).cores)
    checkpoint = Checkpoint(job.checkpoint)
    where = str(job.checkpoint / "config.json")
    name, architecture = find_architecture(checkpoint.config, where)
    config = architecture.read_config(checkpoint.config, where)
    check_tensors(checkpoint, config, architecture)
    layout = ExpertLayout(config.dim, config.expert_hidden, job.recipe.expert_spec)
    for part, shape in layout.shapes.items():
        layout.spec.check_shape(architecture.expert_source(0, 0, part), shape)
    n_experts = config.router.n_experts
    building = Building(job.out, _fingerprint(job, checkpoint), job.name, layout, config.n_layers, n_experts)
    if job.fresh:
        building.discard()
    _check_disk(building, checkpoint)
    with building:
        task = _Quantization(job, checkpoint, config, architecture, building)
        yield from task.write_trunk()
        yield from task.write_experts()
        manifest = task.manifest(name)
        building.publish(manifest)
    return manifest


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, architecture: Architecture) -> None:
    """Raises one `RefusedError` that names every kind of difference between the shards and what the config implies."""
    expected = {architecture.trunk_source(t.name): t.shape for t in trunk_tensors(config)}
    for layer, expert in _records(config):
        for part in EXPERT_PARTS:
            expected[architecture.expert_source(layer, expert, part)] = expert_shape(config, part)
    found = checkpoint.tensors
    extra = found.keys() - expected.keys()
    if config.tied_embeddings:
        extra -= {architecture.trunk_source("head")}  # some writers store the tied head once more
    shapes = [
        f"{n} {list(found[n].shape)} instead of {list(s)}"
        for n, s in expected.items()
        if n in found and found[n].shape != s
    ]
    types = [f"{n} {ref.dtype}" for n, ref in found.items() if n in expected and ref.dtype not in READABLE]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (
            ("missing", sorted(expected.keys() - found.keys())), ("unexpected", sorted(extra)),
            ("of the wrong shape", shapes), ("of a type that is no weight", types),
        )
        if names
    ]  # fmt: skip
    if problems:
        raise RefusedError(f"{checkpoint.folder}: tensors do not match config.json: {'; '.join(problems)}")


class _Quantization:
    """One run: reads the checkpoint, writes into the building folder."""

    def __init__(
        self,
        job: QuantizeJob,
        checkpoint: Checkpoint,
        config: ModelConfig,
        architecture: Architecture,
        building: Building,
    ) -> None:
        self.job, self.checkpoint, self.config = job, checkpoint, config
        self.architecture, self.building = architecture, building
        self.done = 0
        self.total = sum(ref.nbytes for ref in checkpoint.tensors.values())

    def write_trunk(self) -> Iterator[Progress]:
        sources = [
            (t, self.checkpoint.tensors[self.architecture.trunk_source(t.name)]) for t in trunk_tensors(self.config)
        ]
        nbytes = sum(ref.nbytes for _, ref in sources)
        if self.building.trunk is None:
            yield Progress("quantize", 0, self.total, "attention, router, embeddings")
            specs = [spec for tensor, _ in sources for spec in self._trunk_specs(tensor)]
            errors: dict[str, float] = {}
            arrays = (array for tensor, ref in sources for array in self._trunk_arrays(tensor, ref, errors))
            written = write_shard(self.building.folder / TRUNK_FILE, specs, arrays)
            self.building.commit_trunk(TrunkEntry(written.nbytes, written.xxh3, errors))
        self.done += nbytes
        yield Progress("quantize", self.done, self.total, "attention, router, embeddings")

    def write_experts(self) -> Iterator[Progress]:
        records = list(_records(self.config))
        todo = [key for index, key in enumerate(records) if self.building.records[index] is None]
        per_expert = sum(self._ref(*records[0], part).nbytes for part in EXPERT_PARTS)
        self.done += per_expert * (len(records) - len(todo))
        quantized: set[str] = set()
        slots = cycle(torch.zeros(self.building.layout.stride, dtype=torch.uint8) for _ in range(2))
        with ThreadPoolExecutor(1) as writer:
            written: Future[None] | None = None
            for (layer, expert), matrices in zip(todo, self._matrices(todo), strict=True):
                slot = next(slots)
                errors = self._quantize_expert(layer, expert, matrices, slot, quantized)
                if written is not None:
                    written.result()
                index = layer * self.config.router.n_experts + expert
                written = writer.submit(self.building.commit_record, index, slot, errors)
                self.done += per_expert
                yield Progress("quantize", self.done, self.total, f"layer {layer} expert {expert}")
            if written is not None:
                written.result()
        assert len(quantized) == 3 * len(todo), "an expert tensor was quantized twice or not at all"
        assert all(record is not None for record in self.building.records)

    def manifest(self, architecture: str) -> Manifest:
        job, config, trunk = self.job, self.config, self.building.trunk
        assert trunk is not None
        digests = dict(job.shard_digests)
        files = (SourceFile(p.name, p.stat().st_size, digests.get(p.name)) for p in self.checkpoint.shards)
        layout = self.building.layout
        return Manifest(
            format_version=FORMAT_VERSION, name=job.name, variant=job.variant, architecture=architecture,
            source=Source(job.source_name, job.revision, tuple(files)), recipe=job.recipe,
            dim=config.dim, hidden=config.expert_hidden, n_layers=config.n_layers, n_experts=config.router.n_experts,
            stride=layout.stride, files=self.building.copy_files(job.checkpoint, SMALL_FILES),
            attention_errors=trunk.errors, records=tuple(r for r in self.building.records if r is not None),
            licence=job.licence, template=job.template,
        )  # fmt: skip

    def _quantize_expert(
        self, layer: int, expert: int, matrices: Iterator[torch.Tensor], slot: torch.Tensor, quantized: set[str]
    ) -> tuple[float, float, float]:
        """Fill `slot` with an expert's record; the relative errors of w1, w3, w2."""
        expert_views, errors = read_record(self.building.layout, slot), []
        for part, matrix in zip(EXPERT_PARTS, matrices, strict=True):
            name = self.architecture.expert_source(layer, expert, part)
            _, error = quantize_rows(name, matrix, self.building.layout.spec, out=getattr(expert_views, part))
            errors.append(error)
            quantized.add(name)
        return errors[0], errors[1], errors[2]

    def _matrices(self, keys: list[tuple[int, int]]) -> Iterator[Iterator[torch.Tensor]]:
        """For each expert its w1, w3, w2; one matrix is read ahead while another is quantized."""
        refs = [self._ref(layer, expert, part) for layer, expert in keys for part in EXPERT_PARTS]
        stream = _read_ahead(self.checkpoint, refs)
        for _ in keys:
            yield (next(stream) for _ in EXPERT_PARTS)

    def _ref(self, layer: int, expert: int, part: str) -> TensorRef:
        return self.checkpoint.tensors[self.architecture.expert_source(layer, expert, part)]

    def _trunk_specs(self, tensor: TrunkTensor) -> Iterator[TensorSpec]:
        if not tensor.is_matrix:
            yield TensorSpec(tensor.name, torch.float32, tensor.shape)
        elif self.job.recipe.attention == "int8":
            yield TensorSpec(tensor.name + SCALES_SUFFIX, torch.float32, (tensor.shape[0], 1))
            yield TensorSpec(tensor.name, torch.int8, tensor.shape)
        else:
            yield TensorSpec(tensor.name, torch.bfloat16, tensor.shape)

    def _trunk_arrays(
        self, tensor: TrunkTensor, ref: TensorRef, errors: dict[str, float]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        source = self.checkpoint.read(ref)
        if not tensor.is_matrix:
            check_finite(ref.name, source)
            yield tensor.name, source.float()
            return
        weight, errors[tensor.name] = quantize_rows(ref.name, source, self.job.recipe.attention_spec)
        if isinstance(weight, QuantTensor):
            yield tensor.name + SCALES_SUFFIX, weight.scales
            yield tensor.name, weight.codes
        else:
            yield tensor.name, weight


def _read_ahead(checkpoint: Checkpoint, refs: list[TensorRef]) -> Iterator[torch.Tensor]:
    """The tensors of `refs`; each may be used until the next is asked for. Two buffers serve for all."""
    if not refs:
        return
    size = max(ref.nbytes for ref in refs)
    buffers = cycle([torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)])
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(checkpoint.read, refs[0], next(buffers))
        for ref in refs[1:]:
            tensor = pending.result()
            pending = reader.submit(checkpoint.read, ref, next(buffers))
            yield tensor
        yield pending.result()


def _records(config: ModelConfig) -> Iterator[tuple[int, int]]:
    return ((layer, expert) for layer in range(config.n_layers) for expert in range(config.router.n_experts))


def _fingerprint(job: QuantizeJob, checkpoint: Checkpoint) -> str:
    """Changes whenever the result could: the journal of another job must not be continued."""
    shards = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in checkpoint.shards]
    recipe = msgspec.to_builtins(job.recipe)
    return json.dumps([FORMAT_VERSION, job.name, job.variant, recipe, checkpoint.config, shards], sort_keys=True)


def _check_disk(building: Building, checkpoint: Checkpoint) -> None:
    """Raises `DiskFullError` if the store cannot fit; what a killed run allocated already counts as there."""
    trunk = sum(ref.nbytes for ref in checkpoint.tensors.values() if ".experts." not in ref.name)
    needed = building.layout.stride * len(building.records) + trunk + DISK_MARGIN - building.bytes_on_disk()
    free = shutil.disk_usage(existing_parent(building.folder)).free
    if needed > free:
        raise DiskFullError(
            f"{building.final}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free", "free some space"
        )


def describe_errors(manifest: Manifest) -> dict[str, float]:
    """Relative error of every quantized tensor, by our names."""
    per_layer = manifest.n_experts
    report = dict(manifest.attention_errors) if manifest.recipe.attention != "bf16" else {}
    for index, record in enumerate(manifest.records):
        for part, error in zip(EXPERT_PARTS, record.errors, strict=True):
            report[f"layers.{index // per_layer}.experts.{index % per_layer}.{part}"] = error
    return report
