"""Perplexity, and how far a model's predictions lie from a reference's, by the definitions of llama.cpp's
llama-perplexity (tools/perplexity).  T = scored tokens, V = vocabulary.

p is the model's distribution of the next token, q the reference's, both the softmax of float32 logits; t is the token
that the text has there. All sums are float64.

    nll = -ln p(t)                   perplexity = exp(mean nll), its error = perplexity * error of that mean
    kl  = sum q ln(q / p)            in nats, 0 only where the two are the same
    dp  = p(t) - q(t)                rms_dp = sqrt(mean dp^2)
    top_dp = p(r) - q(r)             r: the reference's likeliest token
    log_ratio = mean(nll - nll of the reference) = ln(perplexity / the reference's)

An error is the standard error of a mean, sqrt((mean x^2 - mean(x)^2) / (T - 1)); about 19 times of 20 the true mean
lies within two of them. That of log_ratio is taken of the differences, which equals what the covariance of the two nll
gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import exp, sqrt

import torch

BLOCK_BYTES = 8 << 20  # of one float64 temporary; there are at most `BLOCKS` of them at once
BLOCKS = 5


@dataclass(frozen=True, slots=True)
class TokenScores:
    """nll float64 [T], and where there is a reference the others, float64 [T] too; same_top holds 0 and 1."""

    nll: torch.Tensor
    reference_nll: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    same_top: torch.Tensor | None = None
    dp: torch.Tensor | None = None
    top_dp: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Perplexity:
    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Divergence:
    """kl in nats; same_top, rms_dp and rms_top_dp are shares, 0 to 1."""

    mean_kl: float
    mean_kl_error: float
    median_kl: float
    kl_90: float
    kl_95: float
    kl_99: float
    max_kl: float
    same_top: float
    same_top_error: float
    rms_dp: float
    rms_dp_error: float
    rms_top_dp: float
    log_ratio: float
    log_ratio_error: float


def score(logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None) -> TokenScores:
    """Of each token: logits float32 [T, V] and the reference's alike, targets int64 [T], the tokens of the text."""
    parts = [
        _score(logits[rows], targets[rows], None if reference is None else reference[rows])
        for rows in _blocks(*logits.shape)
    ]
    return join(parts)


def join(parts: Sequence[TokenScores]) -> TokenScores:
    """One behind the other; all have a reference, or none has."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(TokenScores)}
    return TokenScores(**{name: torch.cat(column) for name, column in columns.items() if column[0] is not None})


def perplexity(scores: TokenScores) -> Perplexity:
    mean, error = mean_and_error(scores.nll)
    value = exp(mean)
    return Perplexity(value, value * error)


def divergence(scores: TokenScores) -> Divergence:
    """Of scores with a reference."""
    kl, same_top, dp, top_dp = _present(scores.kl, scores.same_top, scores.dp, scores.top_dp)
    (reference_nll,) = _present(scores.reference_nll)
    mean_kl, mean_kl_error = mean_and_error(kl)
    share = float(same_top.mean())
    rms_dp, rms_dp_error = root_mean_square(dp)
    log_ratio, log_ratio_error = mean_and_error(scores.nll - reference_nll)
    return Divergence(
        mean_kl, mean_kl_error,
        median_kl=percentile(kl, 0.5), kl_90=percentile(kl, 0.9), kl_95=percentile(kl, 0.95),
        kl_99=percentile(kl, 0.99), max_kl=float(kl.max()),
        same_top=share, same_top_error=sqrt(share * (1 - share) / max(1, len(kl) - 1)),
        rms_dp=rms_dp, rms_dp_error=rms_dp_error, rms_top_dp=root_mean_square(top_dp)[0],
        log_ratio=log_ratio, log_ratio_error=log_ratio_error,
    )  # fmt: skip


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """Of one value the error is not known: 0."""
    variance = float(values.var(correction=0))
    return float(values.mean()), sqrt(variance / max(1, len(values) - 1))


def root_mean_square(values: torch.Tensor) -> tuple[float, float]:
    """And its error, of the mean of squares' to first order: d sqrt(x) = dx / (2 sqrt(x))."""
    mean, error = mean_and_error(values.square())
    root = sqrt(mean)
    return root, error / (2 * root) if root else 0.0


def percentile(values: torch.Tensor, fraction: float) -> float:
    """Between two values in a straight line; torch.quantile takes no more than 16 million."""
    ordered = values.sort().values
    place = fraction * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def temporary_bytes(vocab_size: int) -> int:
    """The most that `score` takes."""
    return BLOCKS * 8 * vocab_size * _block_rows(vocab_size)


def _present(*columns: torch.Tensor | None) -> list[torch.Tensor]:
    found = [column for column in columns if column is not None]
    assert len(found) == len(columns)
    return found


def _score(logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> TokenScores:
    log_p = _log_softmax(logits)
    at = targets[:, None]
    nll = -log_p.gather(1, at)[:, 0]
    if reference is None:
        return TokenScores(nll)
    log_q = _log_softmax(reference)
    q = log_q.exp()
    top = reference.argmax(-1, keepdim=True)
    return TokenScores(
        nll,
        reference_nll=-log_q.gather(1, at)[:, 0],
        kl=(log_q - log_p).mul_(q).sum(-1),
        same_top=(logits.argmax(-1, keepdim=True) == top)[:, 0].double(),
        dp=_change(log_p, log_q, at),
        top_dp=_change(log_p, log_q, top),
    )


def _change(log_p: torch.Tensor, log_q: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return (log_p.gather(1, at).exp() - log_q.gather(1, at).exp())[:, 0]


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.double().log_softmax(-1)


def _blocks(tokens: int, vocab_size: int) -> Iterator[slice]:
    step = _block_rows(vocab_size)
    for start in range(0, tokens, step):
        yield slice(start, start + step)


def _block_rows(vocab_size: int) -> int:
    return max(1, BLOCK_BYTES // (8 * vocab_size))
