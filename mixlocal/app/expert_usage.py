"""How a text uses the experts, by layer: what the Mixtral paper (arXiv 2401.04088, section 5 and Table 5) looks at.

L = layers, T = tokens in the order of the text, E = experts of a layer, K = experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt

from mixlocal.experts.recorder import RoutingRecord
from mixlocal.experts.trace import Choices

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Row = tuple[float, ...]  # [L]

FIRST_OR_SECOND = 2  # Table 5 looks at so many of a token's choices


@dataclass(frozen=True, slots=True)
class Usage:
    """What choices alone tell.

    pairs: consecutive tokens that were compared.  load: [L][E], an expert's share of a layer's choices: 1 in all, K
    times that is the share of the tokens that chose it.  load_entropy: of that, in bits; log2 E is an even load.
    first_same: share of pairs whose first choice is the same.  shared: share of pairs where one of the first two
    choices of the one is among the first two of the other.
    """

    n_experts: int
    top_k: int
    tokens: int
    pairs: int
    load: tuple[Row, ...]
    load_entropy: Row
    first_same: Row
    shared: Row

    @property
    def random_first_same(self) -> float:
        """If every choice were a die's."""
        return 1 / self.n_experts

    @property
    def random_shared(self) -> float:
        """As `random_first_same`: 1 - C(E - 2, 2) / C(E, 2), 46 % of 2 in 8."""
        looked_at = min(self.top_k, FIRST_OR_SECOND)
        return 1 - comb(self.n_experts - looked_at, looked_at) / comb(self.n_experts, looked_at)

    def most(self, layer: int) -> int:
        """The expert that is used most, the first of equals."""
        return int(np.argmax(self.load[layer]))

    def least(self, layer: int) -> int:
        return int(np.argmin(self.load[layer]))


@dataclass(frozen=True, slots=True)
class RouterFigures:
    """What a record tells besides its choices.

    entropy: of the router's softmax over all experts, in bits, the mean over the tokens.  recall: share of the chosen
    experts that the guess of the layer before named; None in the first layer, of which there is no guess.
    """

    entropy: Row
    recall: tuple[float | None, ...]


def usage(chosen: Choices, n_experts: int, begins: Sequence[int] = (0,)) -> Usage:
    """begins: tokens that do not follow the one before, for a new piece of text begins with them.

    chosen must hold two consecutive tokens.
    """
    _, tokens, top_k = chosen.shape
    together = follows(tokens, begins)
    assert together.any()
    load = np.stack([np.bincount(layer.ravel(), minlength=n_experts) for layer in chosen]) / (tokens * top_k)
    return Usage(
        n_experts, top_k, tokens, int(together.sum()), tuple(map(_row, load)), _row(entropy_bits(load)),
        _row(_first_same(chosen)[:, together].mean(1)), _row(_shared(chosen)[:, together].mean(1)),
    )  # fmt: skip


def follows(tokens: int, begins: Sequence[int]) -> Bools:
    """bool [T - 1]: whether token t + 1 follows token t."""
    together = np.ones(tokens, dtype=bool)
    together[list(begins)] = False
    return together[1:]


def router_figures(record: RoutingRecord) -> RouterFigures:
    named = (record.chosen[..., None] == record.guessed[..., None, :]).any(-1)  # [L, T, K]
    recall = named.mean((1, 2)).tolist()
    return RouterFigures(_row(record.entropy.astype(np.float64).mean(1)), (None, *recall[1:]))


def entropy_bits(shares: Floats) -> Floats:
    """-sum p log2 p over the last axis."""
    entropy: Floats = -(shares * np.log2(np.where(shares > 0, shares, 1.0))).sum(-1) + 0.0
    return entropy


def _first_same(chosen: Choices) -> Bools:
    """bool [L, T - 1], of all consecutive tokens."""
    same: Bools = chosen[:, 1:, 0] == chosen[:, :-1, 0]
    return same


def _shared(chosen: Choices) -> Bools:
    """As `_first_same`."""
    looked_at = chosen[..., :FIRST_OR_SECOND]
    shared: Bools = (looked_at[:, 1:, :, None] == looked_at[:, :-1, None, :]).any((-1, -2))
    return shared


def _row(values: Floats) -> Row:
    row: list[float] = values.tolist()
    return tuple(row)
