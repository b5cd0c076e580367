"""Will it fit, and what lies where? Pure arithmetic on byte counts, asked before anything is loaded.

`plan`, the loader and everything that reports on them use the same `MemoryPlan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mixlocal.errors import MemoryBudgetError

PREFILL_CHUNK = 512  # tokens of a prompt that go through the model at once, where memory has room for that
BASE_BYTES = 280_000_000  # interpreter, libraries, threads: seen 230 to 275 MB
CUDA_BYTES = 1_350_000_000  # of CUDA's libraries and context here: 1.27 to 1.3 GB with CUDA 13 on an H200, bitsandbytes
FEWEST_TOKENS = 4096  # of context that are kept room for before experts are, when none was asked for
CONTEXT_SHARE = 16  # without a wish, or for more than one sequence, the KV cache may take one part in so many
GPU_STAGING = 2  # slots through which an expert passes that is copied to be used once


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What a model takes. kv_token: of the KV cache, per token. record: the largest
    expert's, for which slots are made. records: of all together, where they are not all as large. scratch: temporaries
    of the largest forward pass, of `chunk` tokens of one sequence. logits: of each further sequence."""

    name: str
    trunk: int
    kv_token: int
    max_context: int
    n_layers: int
    n_experts: int
    record: int
    scratch: int
    chunk: int = PREFILL_CHUNK
    logits: int = 0
    records: int = 0

    @property
    def n_records(self) -> int:
        return self.n_layers * self.n_experts

    @property
    def all_records(self) -> int:
        return self.records or self.n_records * self.record

    def scratch_of(self, sequences: int) -> int:
        return self.scratch + (sequences - 1) * self.logits


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes that this process may use. ram: of its whole resident memory. vram: on the GPU, None without one.
    free: of memory that nobody uses, `ram` included. context: tokens, None for what fits. sequences: at once, which
    share the KV cache. beside: of `ram`, for what the caller has to do with the model."""

    ram: int
    free: int
    vram: int | None = None
    context: int | None = None
    sequences: int = 1
    beside: int = 0


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What lies where, in bytes and slots of one expert each.

    context: tokens that one sequence may have. kv_tokens: that all of them may have together.
    gpu_slots, ram_slots: experts that stay there; the others are read from disk when they are chosen.
    staging_slots: on the GPU, for experts that are copied to be used once.  chunk: tokens of a prompt at once.
    direct_io: reads pass by the page cache, which has no room for what the slots leave out.
    record_bytes: of a slot; records_bytes: of all experts, which may be less than as many slots.
    """

    name: str
    on_gpu: bool
    budget: int
    context: int
    sequences: int
    kv_tokens: int
    base_bytes: int
    trunk_bytes: int
    kv_bytes: int
    scratch_bytes: int
    chunk: int
    record_bytes: int
    records_bytes: int
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
    def ram_expert_bytes(self) -> int:
        """Of the experts in memory: side by side where all of them are, else in slots for the largest."""
        return self.records_bytes if self.all_in_ram and not self.on_gpu else self.ram_slots * self.record_bytes

    @property
    def ram_bytes(self) -> int:
        """Of the process, at its peak."""
        on_host = self.base_bytes + self.ram_expert_bytes
        return on_host if self.on_gpu else on_host + self.trunk_bytes + self.kv_bytes + self.scratch_bytes

    @property
    def ram_for_all(self) -> int:
        """With how much the same plan would have a slot for every expert."""
        missing = self.disk_records * self.record_bytes if self.on_gpu else self.records_bytes - self.ram_expert_bytes
        if self.on_gpu or self.sequences == 1:
            return self.ram_bytes + missing
        rest, token = self.ram_bytes - self.kv_bytes + missing, self.kv_bytes // self.kv_tokens
        shared = min(rest + self.context * self.sequences * token, ceil(rest * CONTEXT_SHARE / (CONTEXT_SHARE - 1)))
        return max(rest + self.context * token, shared)

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
    kv_tokens = max(context, min(context * budgets.sequences, _kv_room(model, budgets)))
    kv, scratch = kv_tokens * model.kv_token, model.scratch_of(budgets.sequences)
    fixed = model.trunk + kv + scratch
    gpu_slots = staging = 0
    base = BASE_BYTES + budgets.beside
    host = base + fixed
    if budgets.vram is not None:
        base += CUDA_BYTES
        host = base
        staging = min(GPU_STAGING, model.n_records)
        gpu_slots = min(_slots(model, budgets.vram - fixed) - staging, model.n_records)
        if gpu_slots < 0:
            _refuse(model, "--vram", fixed + staging * model.record, budgets.vram, context)
    smallest = host + min(model.n_experts * model.record, model.all_records)
    if budgets.ram < smallest:
        _refuse(model, "--ram", smallest, budgets.ram, context)
    ram_slots = max(model.n_experts, min(model.n_records - gpu_slots, _slots(model, budgets.ram - host)))
    if budgets.vram is None and host + model.all_records <= budgets.ram:
        ram_slots = model.n_records
    on_disk = max(0, model.n_records - gpu_slots - ram_slots) * model.record
    used = host + (ram_slots * model.record if on_disk else min(ram_slots * model.record, model.all_records))
    cached = on_disk or ram_slots * model.record  # what a page cache would be asked to keep
    return MemoryPlan(
        name=model.name, on_gpu=budgets.vram is not None, budget=budgets.ram, context=context,
        sequences=budgets.sequences, kv_tokens=kv_tokens, base_bytes=base, trunk_bytes=model.trunk, kv_bytes=kv,
        scratch_bytes=scratch, chunk=model.chunk, record_bytes=model.record,
        records_bytes=model.all_records, n_records=model.n_records,
        gpu_slots=gpu_slots, ram_slots=ram_slots, staging_slots=staging, direct_io=budgets.free - used < cached,
    )  # fmt: skip


def _context(model: ModelBytes, budgets: Budgets) -> int:
    """The model's own, or as much of it as there is room for."""
    return min(model.max_context, max(_kv_room(model, budgets), FEWEST_TOKENS))


def _kv_room(model: ModelBytes, budgets: Budgets) -> int:
    """Tokens of KV cache that a part of the budget holds, as far as what must be there too leaves room."""
    whole, others = budgets.ram, BASE_BYTES + budgets.beside + model.n_experts * model.record
    if budgets.vram is not None:
        whole, others = budgets.vram, min(GPU_STAGING, model.n_records) * model.record
    others += model.trunk + model.scratch_of(budgets.sequences)
    return max(0, min(whole // CONTEXT_SHARE, whole - others)) // model.kv_token


def _slots(model: ModelBytes, nbytes: int) -> int:
    return max(0, nbytes) // model.record


def _refuse(model: ModelBytes, option: str, needed: int, given: int, context: int) -> None:
    raise MemoryBudgetError(
        f"{model.name} needs at least {option} {ceil(needed / 1e6)}M with a context of {context}, "
        f"and may use {given // 1_000_000}M",
        f"give it more ({option}), choose a smaller variant (:q4) or a smaller --ctx, or close other programs",
    )
