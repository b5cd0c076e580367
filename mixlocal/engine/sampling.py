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
        logprobs = torch.log_softmax(logits, dim=-1)
        penalised = self._constrained(penalise(logits, history, self.params.repeat_penalty))
        token = int(penalised.argmax()) if self.params.temperature == 0 else self._draw(penalised)
        if self._constraint is not None:
            self._constraint.accept(token)
        top = logprobs.topk(min(self.params.logprobs, len(logprobs)))
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Choice(token, logprobs[token].item(), pairs)

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
    scores = logits.double() / params.temperature
    ids = _candidates(scores, params)
    kept, order = torch.sort(scores[ids], descending=True, stable=True)
    ids = ids[order]
    if params.top_k:
        kept, ids = kept[: params.top_k], ids[: params.top_k]
    probabilities = torch.exp(kept - torch.logsumexp(kept if params.top_k else scores, dim=0))
    before = probabilities.cumsum(0) - probabilities
    keep = (before < params.top_p) & (probabilities >= params.min_p * probabilities[0])
    keep[0] = True
    return probabilities[keep], ids[keep]


def _candidates(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Ids, ascending, among which all survivors are: sorting them alone is several times faster than the vocabulary.

    Tokens below (1 - top_p) / V add up to less than 1 - top_p, so those above reach top_p without them.
    """
    if params.top_k:
        return (scores >= scores.topk(min(params.top_k, len(scores))).values[-1]).nonzero().flatten()
    probabilities = torch.softmax(scores, dim=-1)
    floor = max(params.min_p * probabilities.max().item(), (1 - params.top_p) / len(scores))
    return (probabilities >= floor).nonzero().flatten()
