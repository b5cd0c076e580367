"""Will it fit? Pure arithmetic on byte counts, asked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from mixlocal.errors import MemoryBudgetError

# Interpreter, torch and the temporaries of one forward pass: 0.45 GB were seen with smolmix.
BASE_BYTES = 600_000_000


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of RAM that a run with every expert resident needs."""

    trunk_bytes: int
    expert_bytes: int
    kv_bytes: int
    context: int

    @property
    def total_bytes(self) -> int:
        return BASE_BYTES + self.trunk_bytes + self.expert_bytes + self.kv_bytes


def check_memory(plan: MemoryPlan, name: str, free_bytes: int) -> None:
    """Raises `MemoryBudgetError` with both numbers if the plan does not fit."""
    if plan.total_bytes > free_bytes:
        raise MemoryBudgetError(
            f"{name} needs {plan.total_bytes / 1e9:.1f} GB of memory with a context of {plan.context}, "
            f"and {free_bytes / 1e9:.1f} GB are free",
            "choose a smaller variant (:q4), a smaller --ctx, or close other programs",
        )
