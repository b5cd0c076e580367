"""Experts on every instruction set: against a naive loop, token by token, and whatever the routing."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.nn.functional import silu

from mixlocal.errors import RefusedError
from mixlocal.kernels import Expert, Kernels
from mixlocal.kernels.cpu import CpuKernels
from mixlocal.kernels.integer import integer_linear
from mixlocal.kernels.isa import native_isas, set_threads
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.quant.format import ExpertWeights, QuantSpec, QuantTensor, Weight
from mixlocal.quant.quantize import dequantize, quantize

SPECS = {
    "nf4": QuantSpec("nf4"),
    "nf4-32": QuantSpec("nf4", 32),
    "fp4": QuantSpec("fp4"),
    "int4": QuantSpec("int4"),
    "int4-32": QuantSpec("int4-32"),
    "int8": QuantSpec("int8"),
    "bf16": QuantSpec("bf16"),
}
FORMATS = (*SPECS, "float32")
SHAPES = {"whole blocks": (64, 256), "two items of hidden rows": (66, 130), "less than a block": (34, 46)}  # D, H
ROUTINGS = {
    "2 of 6": [[0, 1], [5, 2], [1, 3], [3, 0], [2, 5], [5, 0], [0, 2]],
    "twice the same": [[1, 1], [0, 1], [3, 3]],
    "one token, twice the same": [[1, 1]],
    "all the same": [[3]] * 9,
    "3 of 6": [[2, 1, 0], [5, 3, 2], [0, 5, 1], [2, 3, 5], [0, 1, 2]],
    "none but one token": [[5, 0]],
}

# `quantize` warns once per process about a copy it makes where the columns are not whole blocks.
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")


def expert(generator: torch.Generator, name: str, dim: int, hidden: int) -> ExpertWeights:
    def weight(rows: int, columns: int) -> Weight:
        exact = torch.randn(rows, columns, generator=generator) * 0.1
        return exact if name == "float32" else quantize("w", exact, SPECS[name])

    return ExpertWeights(w1=weight(hidden, dim), w3=weight(hidden, dim), w2=weight(dim, hidden))


@cache
def six_experts(name: str, dim: int, hidden: int) -> dict[int, ExpertWeights]:
    """Of which 4 is missing."""
    generator = torch.Generator().manual_seed(hidden)
    return {e: expert(generator, name, dim, hidden) for e in (0, 1, 2, 3, 5)}


def bound(kernels: Kernels, experts: dict[int, ExpertWeights]) -> dict[int, Expert]:
    return {e: kernels.bind_expert(weights) for e, weights in experts.items()}


def routed(routing: str, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(dim)
    ids = torch.tensor(ROUTINGS[routing])
    return torch.randn(len(ids), dim, generator=generator), ids, torch.rand(ids.shape, generator=generator)


def naive(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: dict[int, ExpertWeights]) -> torch.Tensor:
    out = torch.zeros_like(x)
    for t, chosen in enumerate(ids.tolist()):
        for k, e in enumerate(chosen):
            hidden = silu(product(x[t], experts[e].w1)) * product(x[t], experts[e].w3)
            out[t] += weights[t, k] * product(hidden, experts[e].w2)
    return out


def product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return integer_linear(x[None], weight)[0] if isinstance(weight, QuantTensor) else weight.float() @ x


@cache
def expected(name: str, shape: str, routing: str) -> torch.Tensor:
    dim, hidden = SHAPES[shape]
    return naive(*routed(routing, dim), six_experts(name, dim, hidden))


def off(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_moe_ffn_equals_a_naive_loop(isa: str, name: str, shape: str, routing: str) -> None:
    """In the same arithmetic, where a difference in the last bit of a hidden number may round to the next int8."""
    experts, (x, ids, weights) = six_experts(name, *SHAPES[shape]), routed(routing, SHAPES[shape][0])
    kernels = CpuKernels(isa)
    result = kernels.moe_ffn(x, ids, weights, bound(kernels, experts))
    assert off(result, expected(name, shape, routing)) < (1e-6 if name in ("bf16", "float32") else 2e-3)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_moe_ffn_is_near_the_reference(isa: str, name: str, routing: str) -> None:
    """Rounding activations to int8, twice, is all that it may be off."""
    experts, (x, ids, weights) = six_experts(name, 66, 130), routed(routing, 66)
    results = [k.moe_ffn(x, ids, weights, bound(k, experts)) for k in (CpuKernels(isa), ReferenceKernels())]
    assert off(*results) < (1e-6 if name in ("bf16", "float32") else 0.03)


@pytest.mark.parametrize("name", FORMATS)
def test_the_reference_equals_a_loop_over_exact_weights(name: str) -> None:
    experts, (x, ids, weights) = six_experts(name, 66, 130), routed("2 of 6", 66)
    exact = {e: ExpertWeights(*(dequantize(w) for w in (v.w1, v.w3, v.w2))) for e, v in experts.items()}
    kernels = ReferenceKernels()
    assert off(kernels.moe_ffn(x, ids, weights, bound(kernels, experts)), naive(x, ids, weights, exact)) < 1e-6


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_and_threads_do_not_change_a_bit(isa: str, name: str, threads: None) -> None:
    kernels, generator = CpuKernels(isa), torch.Generator().manual_seed(4)
    experts = bound(kernels, six_experts(name, 66, 300))
    x, weights = torch.randn(60, 66, generator=generator), torch.rand(60, 2, generator=generator)
    ids = torch.tensor([0, 1, 2, 3, 5])[torch.rand(60, 5, generator=generator).argsort(-1)[:, :2]]
    set_threads(1)
    stepwise = torch.cat(
        [kernels.moe_ffn(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], experts) for t in range(60)]
    )
    for count in (1, 2, 5):
        set_threads(count)
        for tokens in (2, 3, 7, 60):
            result = kernels.moe_ffn(x[:tokens], ids[:tokens], weights[:tokens], experts)
            assert torch.equal(result, stepwise[:tokens]), (count, tokens)


@pytest.mark.parametrize("name", FORMATS)
def test_instruction_sets_agree(name: str) -> None:
    experts, (x, ids, weights) = six_experts(name, 66, 300), routed("2 of 6", 66)
    every = [CpuKernels(isa) for isa in native_isas()]
    results = [kernels.moe_ffn(x, ids, weights, bound(kernels, experts)) for kernels in every]
    assert all(off(result, results[0]) < (1e-6 if name in ("bf16", "float32") else 2e-3) for result in results)


@pytest.mark.parametrize("name", FORMATS)
def test_a_nan_spoils_its_own_token_and_no_other(isa: str, name: str) -> None:
    kernels, (x, ids, weights) = CpuKernels(isa), routed("2 of 6", 66)
    experts = bound(kernels, six_experts(name, 66, 130))
    expected = kernels.moe_ffn(x, ids, weights, experts)
    x[3, 65] = torch.nan
    result = kernels.moe_ffn(x, ids, weights, experts)
    assert not result[3].isfinite().any()
    others = [t for t in range(len(x)) if t != 3]
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("missing", [4, 9, -1])
def test_a_missing_expert_is_named(isa: str, missing: int) -> None:
    experts, (x, ids, weights) = six_experts("nf4", 64, 96), routed("2 of 6", 64)
    ids[4, 1] = missing
    every: tuple[Kernels, ...] = (ReferenceKernels(), CpuKernels(isa))
    for kernels in every:
        with pytest.raises(RefusedError, match=rf"experts \[{missing}\]"):
            kernels.moe_ffn(x, ids, weights, bound(kernels, experts))


def test_an_expert_of_another_width_is_refused(isa: str) -> None:
    experts, (x, ids, weights) = six_experts("nf4", 64, 96), routed("2 of 6", 64)
    experts = {**experts, 2: expert(torch.Generator(), "nf4", 128, 96)}
    every: tuple[Kernels, ...] = (ReferenceKernels(), CpuKernels(isa))
    for kernels in every:
        with pytest.raises(RefusedError):
            kernels.moe_ffn(x, ids, weights, bound(kernels, experts))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("base", ["nf4", "int4", "int4-32"])
def test_every_matrix_may_have_a_format_of_its_own(isa: str, base: str, routing: str) -> None:
    """As in a store that was made to fit a size; one expert has a third format."""
    generator, (x, ids, weights) = torch.Generator().manual_seed(1), routed(routing, 66)
    names = {0: (base, base, base), 1: ("int8", base, base), 2: ("nf4", "fp4", "int4"), 3: (base, base, "int8")}
    names[5] = ("int8", "int8", "int8")
    experts = {e: mixed_expert(generator, own) for e, own in names.items()}
    expected = naive(x, ids, weights, experts)
    for kernels, near in ((CpuKernels(isa), 2e-3), (ReferenceKernels(), 0.03)):
        assert off(kernels.moe_ffn(x, ids, weights, bound(kernels, experts)), expected) < near


def mixed_expert(generator: torch.Generator, names: tuple[str, str, str]) -> ExpertWeights:
    shapes = ((130, 66), (130, 66), (66, 130))
    exact = (torch.randn(shape, generator=generator) * 0.1 for shape in shapes)
    w1, w3, w2 = (quantize("w", weight, SPECS[name]) for weight, name in zip(exact, names, strict=True))
    return ExpertWeights(w1, w3, w2)


def test_no_tokens(isa: str) -> None:
    kernels, (x, ids, weights) = CpuKernels(isa), routed("2 of 6", 64)
    assert kernels.moe_ffn(x[:0], ids[:0], weights[:0], {}).shape == (0, 64)
    assert not kernels.moe_ffn(x, ids[:, :0], weights[:, :0], {}).any()
