"""The router and the head on every instruction set, against the reference."""

from __future__ import annotations

import pytest
import torch

from mixlocal.kernels import RouterWeights
from mixlocal.kernels.cpu import CpuKernels
from mixlocal.kernels.isa import set_threads
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.quant.format import QuantSpec, Weight
from mixlocal.quant.quantize import quantize

EPS = 1e-5
BOUNDS = {"float32": 2e-6, "bf16": 2e-6, "int8": 0.015, "nf4": 0.02}  # of the difference's norm to the logits'

# `quantize` warns once per process about a copy it makes where the columns are not whole blocks.
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


@pytest.mark.parametrize("dim", [1, 34, 257, 1024])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 1), (8, 2), (13, 5), (8, 8)])
def test_choose_equals_the_reference(isa: str, dim: int, experts: int, top_k: int) -> None:
    weights = RouterWeights(1 + random(dim) / 10, random(experts, dim) * dim**-0.5, EPS, top_k)
    ours, theirs = CpuKernels(isa).bind_router(weights), ReferenceKernels().bind_router(weights)
    for tokens in (1, 3, 40):
        hidden = random(tokens, dim) * 3
        (normed, ids, shares), (right_normed, right_ids, right_shares) = ours.choose(hidden), theirs.choose(hidden)
        assert torch.equal(ids, right_ids)
        torch.testing.assert_close(shares, right_shares, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(normed, right_normed, rtol=2e-6, atol=1e-7)


def test_of_equal_experts_the_first_is_chosen(isa: str) -> None:
    gate = torch.zeros(6, 16)
    gate[[1, 3, 4]] = 0.5
    router = CpuKernels(isa).bind_router(RouterWeights(torch.ones(16), gate, EPS, 5))
    _, ids, weights = router.choose(torch.ones(2, 16))
    assert ids.tolist() == [[1, 3, 4, 0, 2]] * 2
    assert weights[0, 0] == weights[0, 1] == weights[0, 2] > weights[0, 3] == weights[0, 4]


def test_logits_far_apart_give_finite_weights(isa: str) -> None:
    router = CpuKernels(isa).bind_router(RouterWeights(torch.ones(4), torch.tensor([[2e3] * 4, [-2e3] * 4]), EPS, 2))
    _, ids, weights = router.choose(torch.ones(1, 4))
    assert ids.tolist() == [[0, 1]]
    assert weights.tolist() == [[1.0, 0.0]]


def test_a_nan_does_not_choose_for_other_tokens(isa: str) -> None:
    router = CpuKernels(isa).bind_router(RouterWeights(torch.ones(34), random(8, 34), EPS, 2))
    hidden = random(5, 34)
    _, expected_ids, expected = router.choose(hidden)
    hidden[2, 3] = torch.nan
    _, ids, weights = router.choose(hidden)
    assert weights[2].isnan().all()
    assert sorted(set(ids[2].tolist())) == sorted(ids[2].tolist())
    assert ((ids >= 0) & (ids < 8)).all()
    others = [0, 1, 3, 4]
    assert torch.equal(ids[others], expected_ids[others])
    assert torch.equal(weights[others], expected[others])


def test_routing_does_not_depend_on_threads_or_tokens(isa: str, threads: None) -> None:
    router = CpuKernels(isa).bind_router(RouterWeights(1 + random(100) / 10, random(8, 100), EPS, 2))
    hidden = random(40, 100)
    set_threads(1)
    alone = [torch.cat(parts) for parts in zip(*(router.choose(row[None]) for row in hidden), strict=True)]
    for count in (1, 2, 5):
        set_threads(count)
        assert all(torch.equal(*pair) for pair in zip(router.choose(hidden), alone, strict=True))


def test_the_router_keeps_its_weights_alive(isa: str) -> None:
    """Even where the caller forgets them, as a test or an interactive session may."""
    weights = RouterWeights(torch.ones(512), random(8, 512), EPS, 2)
    expected = ReferenceKernels().bind_router(weights).choose(random(1, 512))[1]
    router = CpuKernels(isa).bind_router(weights)
    del weights
    torch.full((8, 512), torch.nan)  # takes the place of what was freed
    assert torch.equal(router.choose(random(1, 512))[1], expected)


def weight_as(name: str, exact: torch.Tensor) -> Weight:
    if name in ("int8", "nf4"):
        return quantize("w", exact, QuantSpec(name))
    return exact.to(torch.bfloat16) if name == "bf16" else exact


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("shape", [(50, 34), (130, 576), (33, 258)])
def test_logits_are_near_the_reference(isa: str, name: str, shape: tuple[int, int], threads: None) -> None:
    """And the same for each token alone, with any number of threads."""
    norm, weight = 1 + random(shape[1]) / 10, weight_as(name, random(*shape))
    head, right = (k.bind_head(norm, weight, EPS) for k in (CpuKernels(isa), ReferenceKernels()))
    hidden = random(17, shape[1]) * 5
    set_threads(1)
    alone = torch.cat([head.logits(row[None]) for row in hidden])
    for count in (1, 5):
        set_threads(count)
        for tokens in (1, 2, 7, 17):
            assert torch.equal(head.logits(hidden[:tokens]), alone[:tokens])
    expected = right.logits(hidden)
    assert (alone - expected).norm() < BOUNDS[name] * expected.norm()


def test_a_row_of_zeros_has_logits_of_zero(isa: str) -> None:
    for name in BOUNDS:
        head = CpuKernels(isa).bind_head(torch.ones(66), weight_as(name, random(8, 66)), EPS)
        assert torch.equal(head.logits(torch.zeros(2, 66)), torch.zeros(2, 8))
