"""Will it fit, and what lies where? Pure arithmetic on byte counts, asked before anything is loaded.

`plan`, the loader and everything that reports on them use the same `MemoryPlan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mixlocal.errors import MemoryBudgetError

PREFILL_CHUNK = 512  # tokens of a prompt that go through the model at once, where memory has room for that
BASE_BYTES = 280_000_000  # interpreter, libraries, threads: seen 230 to 275 MB
CUDA_BYTES = 1_500_000_000  # of CUDA's libraries and context in this computer's memory: an estimate, not yet measured
FEWEST_TOKENS = 4096  # of context that are kept room for before experts are, when none was asked for
CONTEXT_SHARE = 16  # without a wish, the KV cache may take one part in so many of the budget
GPU_STAGING = 2  # slots through which an expert passes that is copied to be used once


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What a model takes. kv_token: of the KV cache, per token. record: one expert's. scratch: temporaries of
    the largest forward pass, of `chunk` tokens."""

    name: str
    trunk: int
    kv_token: int
    max_context: int
    n_layers: int
    n_experts: int
    record: int
    scratch: int
    chunk: int = PREFILL_CHUNK

    @property
    def n_records(self) -> int:
        return self.n_layers * self.n_experts


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that this process may use. ram: of its whole resident memory. vram: on the GPU, None without one.
    free: of memory that nobody uses, `ram` included. context: tokens, None for what fits. sequences: at once."""

    ram: int
    free: int
    vram: int | None = None
    context: int | None = None
    sequences: int = 1


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What lies where, in bytes and slots of one expert each.

    gpu_slots, ram_slots: experts that stay there; the others are read from disk when they are chosen.
    staging_slots: on the GPU, for experts that are copied to be used once.  chunk: tokens of a prompt at once.
    direct_io: reads pass by the page cache, which has no room for what the slots leave out.
    """

    name: str
    on_gpu: bool
    budget: int
    context: int
    sequences: int
    base_bytes: int
    trunk_bytes: int
    kv_bytes: int
    scratch_bytes: int
    chunk: int
    record_bytes: int
    n_records: int
    gpu_slots: int
    ram_slots: int
    staging_slots: int
    direct_io: bool

    @property
    def disk_records(self) -> int:
        """Experts that have no slot."""
        return max(0, self.n_records - self.gpu_slots - self.ram_slots)

    @property
    def share(self) -> float:
        """Of the experts that have a slot."""
        return 1 - self.disk_records / self.n_records

    @property
    def ram_bytes(self) -> int:
        """Of the process, at its peak."""
        on_host = self.base_bytes + self.ram_slots * self.record_bytes
        return on_host if self.on_gpu else on_host + self.trunk_bytes + self.kv_bytes + self.scratch_bytes

    @property
    def vram_bytes(self) -> int:
        slots = self.gpu_slots + self.staging_slots
        return self.trunk_bytes + self.kv_bytes + self.scratch_bytes + slots * self.record_bytes if self.on_gpu else 0

    @property
    def all_in_ram(self) -> bool:
        return self.ram_slots == self.n_records


def plan_memory(model: ModelBytes, budgets: Budgets) -> MemoryPlan:
    """What lies where. Raises `MemoryBudgetError` naming the smallest budget that works."""
    context = budgets.context or _context(model, budgets)
    kv = context * budgets.sequences * model.kv_token
    fixed = model.trunk + kv + model.scratch
    gpu_slots = staging = 0
    base = BASE_BYTES
    host = base + fixed
    if budgets.vram is not None:
        base += CUDA_BYTES
        host = base
        staging = min(GPU_STAGING, model.n_records)
        gpu_slots = min(_slots(model, budgets.vram - fixed) - staging, model.n_records)
        if gpu_slots < 0:
            _refuse(model, "--vram", fixed + staging * model.record, budgets.vram, context)
    smallest = host + model.n_experts * model.record
    if budgets.ram < smallest:
        _refuse(model, "--ram", smallest, budgets.ram, context)
    ram_slots = max(model.n_experts, min(model.n_records - gpu_slots, _slots(model, budgets.ram - host)))
    on_disk = max(0, model.n_records - gpu_slots - ram_slots) * model.record
    used = host + ram_slots * model.record
    cached = on_disk or ram_slots * model.record  # what a page cache would be asked to keep
    return MemoryPlan(
        name=model.name, on_gpu=budgets.vram is not None, budget=budgets.ram, context=context,
        sequences=budgets.sequences, base_bytes=base, trunk_bytes=model.trunk, kv_bytes=kv,
        scratch_bytes=model.scratch, chunk=model.chunk, record_bytes=model.record, n_records=model.n_records,
        gpu_slots=gpu_slots, ram_slots=ram_slots, staging_slots=staging, direct_io=budgets.free - used < cached,
    )  # fmt: skip


def _context(model: ModelBytes, budgets: Budgets) -> int:
    """The model's own, or what a part of the budget holds of it, as far as what must be there too leaves room."""
    whole, others = budgets.ram, BASE_BYTES + model.n_experts * model.record
    if budgets.vram is not None:
        whole, others = budgets.vram, min(GPU_STAGING, model.n_records) * model.record
    most = min(whole // CONTEXT_SHARE, whole - others - model.trunk - model.scratch)
    return min(model.max_context, max(most // (model.kv_token * budgets.sequences), FEWEST_TOKENS))


def _slots(model: ModelBytes, nbytes: int) -> int:
    return max(0, nbytes) // model.record


def _refuse(model: ModelBytes, option: str, needed: int, given: int, context: int) -> None:
    raise MemoryBudgetError(
        f"{model.name} needs at least {option} {ceil(needed / 1e6)}M with a context of {context}, "
        f"and may use {given // 1_000_000}M",
        f"give it more ({option}), choose a smaller variant (:q4) or a smaller --ctx, or close other programs",
    )
