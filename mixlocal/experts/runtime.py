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


class ExpertRuntime(Protocol):
    def apply(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Sum over the chosen experts of weight * expert(x): float32 [T, D] -> [T, D]."""
