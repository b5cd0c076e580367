"""What the model asks of the experts, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Routing:
    """The router's choice for T tokens."""

    experts: torch.Tensor  # int64 [T, K], best first
    weights: torch.Tensor  # float32 [T, K], rows sum to one


@dataclass(slots=True)
class ExpertCounts:
    """What has happened so far. A hit or a read is one distinct expert of one layer in one pass.

    bytes_read: from disk.  stall_s: seconds in which nothing could be computed until a read had ended.
    """

    ram_hits: int = 0
    disk_reads: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0

    def since(self, before: ExpertCounts) -> ExpertCounts:
        return ExpertCounts(
            self.ram_hits - before.ram_hits,
            self.disk_reads - before.disk_reads,
            self.bytes_read - before.bytes_read,
            self.stall_s - before.stall_s,
        )


class ExpertRuntime(Protocol):
    counts: ExpertCounts

    def apply(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Sum over the chosen experts of weight * expert(x): float32 [T, D] -> [T, D].

        The same bits wherever the experts lay. Raises `CorruptError` for a store that changed, and what
        `store.durable.named_errors` makes of a disk's errors.
        """

    def close(self) -> None:
        """Let go of files and threads."""
