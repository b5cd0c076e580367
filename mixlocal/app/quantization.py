"""Tensors in, model store out: they may come in any order, from whole files or from ones still on their way.

The store grows in `<variant>.building`. Each tensor that is in its place is one line in its journal, so a rerun after
any kind of death goes on behind the last one; nothing in the finished store depends on how often that happened.
"""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch

from mixlocal.app.blueprint import Blueprint
from mixlocal.app.calibration import Calibration
from mixlocal.app.hardware import existing_parent, probe
from mixlocal.app.quality.text import Text
from mixlocal.errors import DiskFullError
from mixlocal.kernels.isa import set_threads
from mixlocal.kernels.quantizer import quantize_rows
from mixlocal.quant.format import QuantTensor
from mixlocal.quant.packing import bytes_of, matrix_bytes, matrix_in
from mixlocal.quant.quantize import check_finite
from mixlocal.quant.search import Search
from mixlocal.store.building import Building, Origin
from mixlocal.store.checkpoint import TensorRef
from mixlocal.store.manifest import FORMAT_VERSION, Manifest, Recipe, Source
from mixlocal.store.pieces import expert_of

DISK_MARGIN = 64 << 20
SLOT_BYTES = 32 << 20  # a buffer takes any tensor of the experts and, of the others, those that are no larger than this
IN_FLIGHT = 2


@dataclass(frozen=True, slots=True)
class StoreJob:
    """The store to make. fresh: forget what an earlier run has done of it. text: what to calibrate on, where the recipe
    says so. calibration: what came of that."""

    out: Path
    name: str
    variant: str
    recipe: Recipe
    licence: str | None = None
    template: str | None = None
    fresh: bool = False
    text: Text | None = None
    calibration: Calibration | None = None

    @property
    def calibrates(self) -> bool:
        return self.recipe.calibrated_on is not None


class Quantization:
    """One store being made. Use as a context manager; the caller holds the lock of `job.out`.

    fingerprint: tells this source from any other, so that the work on another is not continued.
    """

    def __init__(self, job: StoreJob, blueprint: Blueprint, fingerprint: str) -> None:
        self.job, self.blueprint = job, blueprint
        config = blueprint.config
        self._building = Building(
            job.out, _identity(job, blueprint, fingerprint), job.name, blueprint.layouts,
            config.router.n_experts, blueprint.trunk_specs,
        )  # fmt: skip
        self._slot_bytes = _slot_bytes(blueprint)
        self._slots = deque(torch.empty(self._slot_bytes, dtype=torch.uint8) for _ in range(IN_FLIGHT))
        self._writer = ThreadPoolExecutor(1)
        self._writes: deque[Future[None]] = deque()
        self._handed: set[str] = set()  # to the writer, and not yet known to be written

    def __enter__(self) -> Quantization:
        """Raises `DiskFullError` if the store cannot fit."""
        set_threads(probe(self.job.out).cores)
        if self.job.fresh:
            self._building.discard()
        _check_disk(self._building)
        self._building.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self._writer.shutdown()
            self._building.__exit__()

    def lacks(self, source_name: str) -> bool:
        """Whether the store still needs a tensor, by the source's name."""
        name = self.blueprint.sources.get(source_name)
        return name is not None and name not in self._handed and not self._building.has(name)

    def add(self, ref: TensorRef, tensor: torch.Tensor, origin: Origin | None = None) -> None:
        """Quantize a tensor that is lacking and have it written; on return the caller may overwrite `tensor`.

        Raises `RefusedError` for NaN and infinity, and what went wrong with an earlier write.
        """
        name = self.blueprint.sources[ref.name]
        assert self.lacks(ref.name), f"{ref.name} came twice"
        assert tuple(tensor.shape) == self.blueprint.shape(name), (ref.name, tensor.shape)
        self._wait(IN_FLIGHT - 1)
        arrays, error, borrowed = self._quantized(ref.name, name, tensor)
        buffers = [bytes_of(array) for array in arrays]
        self._writes.append(self._writer.submit(self._building.commit, name, buffers, error, origin))
        self._slots.rotate()
        self._handed.add(name)
        if borrowed:
            self.settle()

    def settle(self) -> None:
        """Wait until everything is written; raises what went wrong with it."""
        self._wait(0)
        self._handed.clear()

    def accept(self, shard: str, sha256: str) -> None:
        """A source file has proved whole."""
        self.settle()
        self._building.accept(shard, sha256)

    def accepted(self, shard: str) -> str | None:
        """The sha256 of a source file that has proved whole, of whose tensors nothing was lost since."""
        return self._building.accepted(shard)

    def revoke(self, shard: str, beyond: int = 0) -> None:
        """Bytes of a source file were lost or wrong: tensors that took more than its first `beyond` are lacking."""
        self.settle()
        self._building.revoke(shard, beyond)

    def sync(self) -> None:
        """Whatever was accepted so far is on disk: those source files may be deleted. Another thread may call it."""
        self._building.sync()

    def finish(self, source: Source, small_files: Mapping[str, bytes]) -> Manifest:
        """Publish the store; nothing may be lacking."""
        self.settle()
        self._building.check_complete()
        job, blueprint = self.job, self.blueprint
        config, layout = blueprint.config, blueprint.layouts.largest
        manifest = Manifest(
            format_version=FORMAT_VERSION, name=job.name, variant=job.variant, architecture=blueprint.architecture,
            source=source, recipe=job.recipe, dim=layout.dim, hidden=layout.hidden,
            n_layers=config.n_layers, n_experts=config.router.n_experts, stride=layout.stride,
            files=self._building.write_files(small_files), attention_errors=self._building.trunk_errors,
            records=self._building.records, licence=job.licence, template=job.template,
        )  # fmt: skip
        self._building.publish(manifest)
        return manifest

    def _wait(self, in_flight: int) -> None:
        """Until no more writes are under way than that; what went wrong with one is raised now and ever after."""
        while len(self._writes) > in_flight or (self._writes and self._writes[0].done()):
            self._writes[0].result()
            self._writes.popleft()

    def _search(self, name: str) -> Search | None:
        """How the scales of a tensor, by our name, are chosen."""
        if not self.job.recipe.search or name in self.blueprint.trunk:
            return None
        calibration = self.job.calibration
        return Search(calibration.importance(*expert_of(name)) if calibration else None)

    def _quantized(
        self, source_name: str, name: str, tensor: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], float | None, bool]:
        """The arrays of a piece, its error, and whether they are no buffer of ours but may be `tensor` itself."""
        spec = self.blueprint.spec(name)
        if spec is None:
            check_finite(source_name, tensor)
            return (tensor.to(torch.float32, copy=True),), None, False
        rows, columns = tensor.shape
        fits = matrix_bytes(spec, (rows, columns)) <= self._slot_bytes
        room = matrix_in(self._slots[0], spec, (rows, columns)) if fits else None
        weight, error = quantize_rows(source_name, tensor, spec, out=room, search=self._search(name))
        arrays = (weight.codes, weight.scales) if isinstance(weight, QuantTensor) else (weight,)
        return arrays, error, not fits


def _slot_bytes(blueprint: Blueprint) -> int:
    attention = blueprint.recipe.attention_spec
    experts = max(
        matrix_bytes(layout.spec_of(part), shape)
        for layout in blueprint.layouts.formats
        for part, shape in layout.shapes.items()
    )
    trunk = max(matrix_bytes(attention, tensor.matrix) for tensor in blueprint.trunk.values() if tensor.is_matrix)
    return max(experts, min(trunk, SLOT_BYTES))


def _identity(job: StoreJob, blueprint: Blueprint, fingerprint: str) -> str:
    """Changes whenever the bytes could."""
    recipe, config = msgspec.to_builtins(job.recipe), asdict(blueprint.config)
    return json.dumps([FORMAT_VERSION, job.name, job.variant, recipe, config, fingerprint], sort_keys=True)


def _check_disk(building: Building) -> None:
    """Raises `DiskFullError` if the store cannot fit; what a killed run allocated already counts as there."""
    needed = building.nbytes + DISK_MARGIN - building.bytes_on_disk()
    free = shutil.disk_usage(existing_parent(building.folder)).free
    if needed > free:
        raise DiskFullError(
            f"{building.final}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free", "free some space"
        )
