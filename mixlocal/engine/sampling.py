"""From logits to the next token. V = vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from mixlocal.engine.params import SamplingParams
from mixlocal.errors import CorruptError


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen token; logprob and the `logprobs` likeliest are of the model's own distribution, before sampling."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What an answer may be: asked before each token, told of it afterwards."""

    def allowed(self) -> torch.Tensor:
        """bool [V], at least one of them true."""

    def accept(self, token: int) -> None:
        """`token`, an allowed one, is the next."""


class Sampler:
    """Draws tokens by one seeded generator: the same logits, seed, history and constraint give the same token."""

    def __init__(self, params: SamplingParams, constraint: Constraint | None = None) -> None:
        self.params = params
        self._constraint = constraint
        self._generator = torch.Generator().manual_seed(params.seed or 0)

    def choose(self, logits: torch.Tensor, history: list[int]) -> Choice:
        """Next token from float32 logits [V] after the ids in `history`. `CorruptError` for NaN or no finite logit."""
        peak = logits.max().item()
        if not math.isfinite(peak):
            raise CorruptError(f"the model computed {peak} after {len(history)} tokens", "check it: mixlocal verify")
        normaliser = torch.logsumexp(logits, dim=-1)
        penalised = self._constrained(penalise(logits, history, self.params.repeat_penalty))
        token = int(penalised.argmax()) if self.params.temperature == 0 else self._draw(penalised)
        if self._constraint is not None:
            self._constraint.accept(token)
        return Choice(token, (logits[token] - normaliser).item(), self._likeliest(logits, normaliser))

    def _likeliest(self, logits: torch.Tensor, normaliser: torch.Tensor) -> tuple[tuple[int, float], ...]:
        if not self.params.logprobs:
            return ()
        top = logits.topk(min(self.params.logprobs, len(logits)))
        return tuple(zip(top.indices.tolist(), (top.values - normaliser).tolist(), strict=True))

    def _constrained(self, logits: torch.Tensor) -> torch.Tensor:
        if self._constraint is None:
            return logits
        allowed = logits.masked_fill(~self._constraint.allowed(), -math.inf)
        if allowed.max() == -math.inf:
            raise CorruptError("the model excludes every token that the answer's form allows", "try another seed")
        return allowed

    def _draw(self, logits: torch.Tensor) -> int:
        """Inverse transform on the kept tokens in order of probability, in double precision."""
        probabilities, ids = keep_likely(logits, self.params)
        point = torch.rand(1, generator=self._generator, dtype=torch.float64) * probabilities.sum()
        index = int(torch.searchsorted(probabilities.cumsum(0), point, right=True))
        return int(ids[min(index, len(ids) - 1)])


def penalise(logits: torch.Tensor, history: list[int], penalty: float) -> torch.Tensor:
    """Divide positive and multiply negative logits of tokens already seen (CTRL, arXiv 1909.05858, section 4.1)."""
    if penalty == 1.0 or not history:
        return logits
    seen = torch.tensor(sorted(set(history)))
    scores = logits[seen]
    return logits.index_copy(0, seen, torch.where(scores > 0, scores / penalty, scores * penalty))


def keep_likely(logits: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 probabilities and ids that survive top-k, top-p and min-p, likeliest first; at least one does.

    top-p: the smallest set whose probability reaches it (arXiv 1904.09751).
    min-p: at least that share of the likeliest token's probability (arXiv 2407.01082).
    """
    ids = _largest(logits, params.top_k) if params.top_k else None
    scores = (logits if ids is None else logits[ids]).double()
    weights = scores.sub_(logits.max()).div_(params.temperature).exp_()  # of the likeliest: 1
    total = weights.sum()
    if ids is None:  # sorting a few is several times faster than the vocabulary
        ids = (weights >= _floor(params, float(total), len(weights))).nonzero().flatten()
        weights = weights[ids]
    weights, order = torch.sort(weights, descending=True, stable=True)
    ids = ids[order]
    if params.top_k and len(ids) > params.top_k:  # of equals, those that come first
        weights, ids = weights[: params.top_k], ids[: params.top_k]
        total = weights.sum()
    probabilities = weights / total
    before = probabilities.cumsum(0) - probabilities
    keep = (before < params.top_p) & (probabilities >= params.min_p * probabilities[0])
    keep[0] = True
    return probabilities[keep], ids[keep]


def _largest(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids, ascending, of the `count` largest and of all that equal the last of them."""
    return (logits >= logits.topk(min(count, len(logits))).values[-1]).nonzero().flatten()


def _floor(params: SamplingParams, total: float, size: int) -> float:
    """A weight that all survivors reach: tokens below (1 - top_p) / size of the total add up to less than 1 - top_p of
    it, so those above reach top_p without them."""
    return max(params.min_p, total * (1 - params.top_p) / size)
