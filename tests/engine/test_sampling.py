"""Which tokens are chosen, and that the same seed chooses them again."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from mixlocal.engine.params import SamplingParams
from mixlocal.engine.sampling import Sampler, keep_likely, penalise
from mixlocal.errors import CorruptError, UsageError

LOGITS = torch.tensor([0.40, 0.30, 0.15, 0.10, 0.05]).log()


def kept(**changes: float) -> list[int]:
    _, ids = keep_likely(LOGITS, SamplingParams(**{"temperature": 1.0, "top_p": 1.0} | changes))
    return ids.tolist()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.69}, [0, 1]),
        ({"top_p": 0.75}, [0, 1, 2]),
        ({"top_p": 0.0}, [0]),
        ({"min_p": 0.3}, [0, 1, 2]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.5}, [0, 1]),
    ],
)
def test_which_tokens_are_kept(changes: dict[str, float], expected: list[int]) -> None:
    assert kept(**changes) == expected


@pytest.mark.parametrize("seed", range(20))
def test_a_large_vocabulary_keeps_what_a_full_sort_keeps(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(5000, generator=generator) * 3).round(decimals=1)  # many ties
    settings = [(0.7, 0.95, 0, 0.0), (1.5, 0.5, 0, 0.0), (1.0, 1.0, 0, 0.05), (0.2, 0.9, 0, 0.0), (1.0, 0.9, 40, 0.02)]
    for temperature, top_p, top_k, min_p in settings:
        probabilities, ids = torch.softmax(logits.double() / temperature, -1).sort(descending=True, stable=True)
        if top_k:
            probabilities, ids = probabilities[:top_k] / probabilities[:top_k].sum(), ids[:top_k]
        keep = (probabilities.cumsum(0) - probabilities < top_p) & (probabilities >= min_p * probabilities[0])
        params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
        found, found_ids = keep_likely(logits, params)
        assert found_ids.tolist() == ids[keep].tolist()
        torch.testing.assert_close(found, probabilities[keep], rtol=1e-9, atol=0)


def test_temperature_sharpens_and_flattens() -> None:
    for temperature in (0.5, 1.0, 2.0):
        probabilities, _ = keep_likely(LOGITS, SamplingParams(temperature=temperature, top_p=1.0))
        expected = LOGITS.double().exp() ** (1 / temperature)
        torch.testing.assert_close(probabilities, expected / expected.sum(), rtol=1e-6, atol=0)


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=1.0, seed=7))
    counts = Counter(sampler.choose(LOGITS, []).id for _ in range(4000))
    for token, probability in enumerate(LOGITS.exp().tolist()):
        spread = math.sqrt(probability * (1 - probability) / 4000)
        assert abs(counts[token] / 4000 - probability) < 4 * spread


def test_same_seed_same_tokens_and_other_seed_others() -> None:
    def tokens(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS, []).id for _ in range(50)]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)


def test_temperature_zero_takes_the_likeliest() -> None:
    assert Sampler(SamplingParams(temperature=0)).choose(LOGITS, []).id == 0


def test_repeat_penalty_pushes_both_signs_down() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalise(logits, [0, 1, 1], 2.0).tolist() == [1.0, -4.0, 1.0]
    assert penalise(logits, [], 2.0) is logits


def test_logprobs_are_the_models_own() -> None:
    choice = Sampler(SamplingParams(temperature=0, repeat_penalty=50.0, logprobs=3)).choose(LOGITS + 5, [0])
    assert choice.id != 0 or choice.logprob == pytest.approx(math.log(0.4), abs=1e-5)
    assert [token for token, _ in choice.top] == [0, 1, 2]
    assert choice.top[0][1] == pytest.approx(math.log(0.4), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_never_samples_from_nan(bad: float) -> None:
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(CorruptError, match="after 2 tokens"):
        Sampler(SamplingParams()).choose(logits, [1, 2])
    with pytest.raises(CorruptError):
        Sampler(SamplingParams()).choose(torch.full((5,), -math.inf), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("top_p", 1.1), ("top_k", -1), ("min_p", 2), ("seed", -1),
        ("repeat_penalty", 0), ("max_tokens", -1), ("logprobs", -1), ("stop", ("",)),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name.replace("_", ".")):
        SamplingParams(**{name: value})
