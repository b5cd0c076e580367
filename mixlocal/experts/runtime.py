"""What the model asks of the experts, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch

from mixlocal.experts.trace import RoutingTrace


@dataclass(frozen=True, slots=True)
class Routing:
    """The router's choice for T tokens."""

    experts: torch.Tensor  # int64 [T, K], best first
    weights: torch.Tensor  # float32 [T, K], rows sum to one


# The next layer's likely choice, int64 [T, K], computed when it is called.
Guess = Callable[[], torch.Tensor]


@dataclass(slots=True)
class ExpertCounts:
    """What has happened so far. An expert looked up is one distinct expert of one layer in one pass.

    gpu_hits, ram_hits, disk_hits: where it was found, on the disk also if it was on its way from there.
    reads, bytes_read: from disk, read ahead or not.  stall_s: seconds in which nothing could be computed until a read
    had ended.  copies: to the GPU.
    chosen, guessed: experts of layers that were guessed beforehand, and those among them that the guess named.
    prefetches, prefetches_used: reads begun on a guess, and those whose expert was then chosen.
    """

    gpu_hits: int = 0
    ram_hits: int = 0
    disk_hits: int = 0
    reads: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    copies: int = 0
    chosen: int = 0
    guessed: int = 0
    prefetches: int = 0
    prefetches_used: int = 0

    @property
    def looked_up(self) -> int:
        return self.gpu_hits + self.ram_hits + self.disk_hits

    @property
    def prefetch_recall(self) -> float | None:
        """Share of chosen experts that the guesses named; None if nothing was guessed."""
        return self.guessed / self.chosen if self.chosen else None

    def since(self, before: ExpertCounts) -> ExpertCounts:
        return ExpertCounts(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


class ExpertRuntime(Protocol):
    counts: ExpertCounts
    trace: RoutingTrace

    def apply(self, layer: int, x: torch.Tensor, routing: Routing, guess: Guess | None = None) -> torch.Tensor:
        """Sum over the chosen experts of weight * expert(x): float32 [T, D] -> [T, D].

        The same bits wherever the experts lay. Layers come in order, 0 to the last, once a pass; `guess` is of the
        layer behind this one. Raises `CorruptError` for a store that changed, and what
        `store.durable.named_errors` makes of a disk's errors.
        """

    def close(self) -> None:
        """Let go of files and threads."""
