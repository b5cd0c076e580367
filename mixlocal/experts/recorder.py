"""All that the routers say about a text: to look into a model, at the cost of two more products with every router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt
import torch

from mixlocal.experts.runtime import ExpertRuntime, Guess, Routing
from mixlocal.experts.trace import Choices

NOTHING = -1  # no expert's id


@dataclass(frozen=True, slots=True)
class RoutingRecord:
    """Of T tokens in the order in which they were computed.

    chosen: int16 [L, T, K], best first.  entropy: float32 [L, T], of a router's softmax over all its experts, in bits.
    guessed: int16 [L, T, K], what was thought of a layer before it was reached, see `Guess`; NOTHING in the first.
    """

    n_experts: int
    chosen: Choices
    entropy: npt.NDArray[np.float32]
    guessed: Choices

    def of(self, tokens: npt.NDArray[np.bool_]) -> RoutingRecord:
        """The record of some of the tokens: bool [T]."""
        return RoutingRecord(self.n_experts, self.chosen[:, tokens], self.entropy[:, tokens], self.guessed[:, tokens])


class RecordingExperts:
    """Any runtime, as an `ExpertRuntime` that writes down what it is asked for. What is computed stays the same."""

    def __init__(self, inner: ExpertRuntime, gates: Sequence[torch.Tensor]) -> None:
        """gates: float32 [E, D], each layer's router."""
        self.counts, self.trace = inner.counts, inner.trace
        self._inner, self._gates = inner, gates
        self._chosen: list[list[Choices]] = [[] for _ in gates]  # [T, K] of each pass, as is the next
        self._guessed: list[list[Choices]] = [[] for _ in gates]
        self._entropy: list[list[npt.NDArray[np.float32]]] = [[] for _ in gates]  # [T]

    def apply(self, layer: int, x: torch.Tensor, routing: Routing, guess: Guess | None = None) -> torch.Tensor:
        """See `ExpertRuntime.apply`."""
        chosen = _ids(routing.experts)
        self._chosen[layer].append(chosen)
        self._entropy[layer].append(entropy_bits(x @ self._gates[layer].T).cpu().numpy())
        if layer == 0:
            self._guessed[0].append(np.full_like(chosen, NOTHING))
        if guess is not None:
            self._guessed[layer + 1].append(_ids(guess()))
        return self._inner.apply(layer, x, routing, guess)

    def close(self) -> None:
        """See `ExpertRuntime.close`."""
        self._inner.close()

    def record(self) -> RoutingRecord:
        """Of all passes so far, of which there must be one."""

        def layers(passes: list[list[Choices]]) -> Choices:
            return np.stack([np.concatenate(layer) for layer in passes])

        entropy = np.stack([np.concatenate(layer) for layer in self._entropy])
        return RoutingRecord(len(self._gates[0]), layers(self._chosen), entropy, layers(self._guessed))


def entropy_bits(logits: torch.Tensor) -> torch.Tensor:
    """-sum p log2 p of softmax(logits): float32 [T, E] -> [T], 0 to log2 E."""
    logs = torch.log_softmax(logits, dim=-1)
    return -(logs.exp() * logs).sum(-1) / log(2)


def _ids(experts: torch.Tensor) -> Choices:
    return experts.cpu().numpy().astype(np.int16)
