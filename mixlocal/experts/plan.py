"""Will it fit, and what lies where? Pure arithmetic on byte counts, asked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from mixlocal.errors import MemoryBudgetError

# Interpreter, libraries and the temporaries of one forward pass: 0.3 GB were seen with smolmix and 512 tokens at once.
BASE_BYTES = 400_000_000


@dataclass(frozen=True, slots=True)
class ModelBytes:
    """What a model takes: the trunk, the KV cache of `context` tokens, and n_records experts of record_bytes each.

    layer_records: experts of one layer, which must fit at once.
    """

    trunk: int
    kv: int
    context: int
    n_records: int
    record_bytes: int
    layer_records: int

    @property
    def fixed(self) -> int:
        return BASE_BYTES + self.trunk + self.kv

    @property
    def smallest(self) -> int:
        """The least memory that it runs in."""
        return self.fixed + self.layer_records * self.record_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """ram_slots: experts in memory; the others are read from disk when they are chosen."""

    ram_slots: int
    all_resident: bool


def plan_memory(model: ModelBytes, name: str, ram: int) -> MemoryPlan:
    """What lies where with `ram` bytes for the whole process.

    Raises `MemoryBudgetError` naming the smallest budget that works.
    """
    if ram < model.smallest:
        raise MemoryBudgetError(
            f"{name} needs {model.smallest / 1e9:.1f} GB of memory with a context of {model.context}, "
            f"and may use {ram / 1e9:.1f} GB",
            "give it more (--ram), choose a smaller variant (:q4) or a smaller --ctx, or close other programs",
        )
    slots = min(model.n_records, (ram - model.fixed) // model.record_bytes)
    return MemoryPlan(slots, slots == model.n_records)
