"""Attention on every instruction set: near the reference, and the same bits in one pass and token by token."""

from __future__ import annotations

import pytest
import torch

from mixlocal.kernels import PAGE, PANEL, AttentionShape, AttentionWeights, Kernels, KeyValues, Step
from mixlocal.kernels.cpu import CpuKernels
from mixlocal.kernels.isa import set_threads
from mixlocal.kernels.reference import ReferenceKernels, store, stored
from mixlocal.quant.format import QuantSpec, Weight
from mixlocal.quant.quantize import quantize

DIM = 40
SHAPES = {
    "one kv head": AttentionShape(4, 1, 6, 1e-5, None),
    "grouped": AttentionShape(6, 2, 24, 1e-5, None),
    "as many kv heads": AttentionShape(2, 2, 64, 1e-5, None),
    "wide heads": AttentionShape(3, 1, 128, 1e-5, None),
    "more heads than queries of a pass": AttentionShape(13, 1, 2, 1e-5, None),
    "window 1": AttentionShape(4, 2, 6, 1e-5, 1),
    "window 40": AttentionShape(6, 2, 24, 1e-5, 40),
    "window across chunks": AttentionShape(4, 2, 64, 1e-5, 270),
}
STARTS = (0, 5, 255, 256, 300)  # chunks are of 256 keys
COUNTS = (1, 2, 3, 7, 40)
BOUNDS = {"bf16": 2e-6, "float32": 2e-6, "int8": 0.02, "nf4": 0.03}  # of the difference's norm to what is added


class Case:
    """A layer, and the keys and values of the positions before `start`."""

    def __init__(self, name: str, shape: AttentionShape, start: int, count: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(start + count)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator)

        def weight(rows: int, columns: int) -> Weight:
            exact = random(rows, columns) * columns**-0.5
            if name in ("int8", "nf4"):
                return quantize("w", exact, QuantSpec(name))
            return exact.to(torch.bfloat16) if name == "bf16" else exact

        queries, keys = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
        self.weights = AttentionWeights(
            1 + random(DIM) / 10, weight(queries, DIM), weight(keys, DIM), weight(keys, DIM), weight(DIM, queries)
        )
        self.shape, self.start, self.dtype = shape, start, dtype
        self.hidden = random(count, DIM)
        angles = random(count, shape.head_dim // 2).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.past = [random(shape.n_kv_heads, start, shape.head_dim) for _ in range(2)]
        self.pages = torch.randperm(-(-(start + count) // PAGE), generator=generator)

    def cache(self) -> KeyValues:
        """NaN where nothing was stored, so that a kernel that uses it is found out."""
        heads, width, pages = self.shape.n_kv_heads, self.shape.head_dim, len(self.pages)
        keys = torch.full((pages, heads, PAGE // PANEL, width, PANEL), torch.nan, dtype=self.dtype)
        values = torch.full((pages, heads, PAGE, -(-width // PANEL) * PANEL), torch.nan, dtype=self.dtype)
        cache = KeyValues(keys, values)
        store(cache, self.pages, 0, *self.past)
        return cache

    def run(self, kernels: Kernels, cache: KeyValues, sizes: list[int]) -> torch.Tensor:
        """What is added to the hidden rows, in passes of so many tokens."""
        layer = kernels.bind_attention(self.weights, self.shape)
        hidden = self.hidden.clone()
        begin = 0
        for size in sizes:
            part = slice(begin, begin + size)
            counted = torch.tensor([self.start + begin]), torch.tensor([size])
            layer.add_to(hidden[part], cache, Step(*counted, self.pages[None], self.cos[part], self.sin[part]))
            begin += size
        assert begin == len(hidden)
        return hidden - self.hidden


def off(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def compare(case: Case, isa: str, bound: float) -> None:
    """The rows, and the caches: where there are keys and values, and which."""
    count = len(case.hidden)
    ours, theirs = case.cache(), case.cache()
    result, expected = case.run(CpuKernels(isa), ours, [count]), case.run(ReferenceKernels(), theirs, [count])
    assert off(result, expected) < bound, (case.start, count)
    width = case.shape.head_dim
    pairs = ((ours.keys, theirs.keys), (ours.values[..., :width], theirs.values[..., :width]))
    for mine, right in pairs:
        assert torch.equal(mine.isnan(), right.isnan())
        assert off(mine.float().nan_to_num(), right.float().nan_to_num()) < bound
    past = case.cache()
    for mine, before in zip(*(stored(cache, case.pages, case.start, width) for cache in (ours, past)), strict=True):
        assert torch.equal(mine, before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BOUNDS)
def test_attention_is_near_the_reference(isa: str, name: str, shape: str) -> None:
    for start in STARTS:
        for count in COUNTS:
            compare(Case(name, SHAPES[shape], start, count, torch.float32), isa, BOUNDS[name])


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_over_a_float16_cache(isa: str, shape: str) -> None:
    """A key may round to the neighbour of what the reference rounds it to."""
    for start in STARTS:
        for count in (1, 7, 40):
            compare(Case("bf16", SHAPES[shape], start, count, torch.float16), isa, 2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["bf16", "int8"])
def test_one_pass_and_token_by_token_are_the_same(
    isa: str, name: str, shape: str, dtype: torch.dtype, threads: None
) -> None:
    for start in STARTS:
        case = Case(name, SHAPES[shape], start, 40, dtype)
        caches, results = [], []
        for count, sizes in ((1, [40]), (5, [40]), (2, [1] * 40), (5, [2, 3, 7, 28])):
            set_threads(count)
            caches.append(case.cache())
            results.append(case.run(CpuKernels(isa), caches[-1], sizes))
        for cache, result in zip(caches[1:], results[1:], strict=True):
            assert torch.equal(result, results[0]), start
            assert torch.equal(cache.keys.nan_to_num(), caches[0].keys.nan_to_num())
            assert torch.equal(cache.values.nan_to_num(), caches[0].values.nan_to_num())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_many_sequences_at_once_are_as_each_alone(isa: str, shape: str, dtype: torch.dtype, threads: None) -> None:
    """One layer, its pages shared out among prompts and answers of many lengths, in two orders."""
    places = [(0, 1), (300, 1), (0, 40), (63, 1), (64, 2), (255, 3), (256, 1), (20, 13), (511, 1), (700, 30)]
    cases = [Case("bf16", SHAPES[shape], start, count, dtype) for start, count in places]
    for case in cases:
        case.weights = cases[0].weights
    alone = [case.run(CpuKernels(isa), case.cache(), [len(case.hidden)]) for case in cases]
    for count, order in ((1, cases), (3, cases[::-1])):
        set_threads(count)
        together = run_together(cases[0], order, CpuKernels(isa))
        for case, result in zip(cases, alone, strict=True):
            assert torch.equal(together[order.index(case)], result), case.start
    reference = run_together(cases[0], cases, ReferenceKernels())
    assert off(torch.cat(reference), torch.cat(alone)) < (2e-3 if dtype == torch.float16 else 2e-6)


def run_together(first: Case, cases: list[Case], kernels: Kernels) -> list[torch.Tensor]:
    """What is added to each case's rows, in one pass over all of them."""
    counts = [len(case.pages) for case in cases]
    owners = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(7)).split(counts)
    alone = [case.cache() for case in cases]
    cache = KeyValues(
        *(
            torch.full((sum(counts), *part.shape[1:]), torch.nan, dtype=part.dtype)
            for part in (alone[0].keys, alone[0].values)
        )
    )
    table = torch.zeros((len(cases), max(counts)), dtype=torch.int64)
    for case, pages, row in zip(cases, owners, table, strict=True):
        row[: len(pages)] = pages
        store(cache, pages, 0, *case.past)
    sizes = [len(case.hidden) for case in cases]
    before = torch.cat([case.hidden for case in cases])
    hidden = before.clone()
    step = Step(
        torch.tensor([case.start for case in cases]), torch.tensor(sizes), table,
        torch.cat([case.cos for case in cases]), torch.cat([case.sin for case in cases]),
    )  # fmt: skip
    kernels.bind_attention(first.weights, first.shape).add_to(hidden, cache, step)
    return list((hidden - before).split(sizes))


def test_long_past_and_many_threads(isa: str, threads: None) -> None:
    """Ten chunks, divided among threads or not."""
    case = Case("bf16", SHAPES["grouped"], 2500, 3, torch.float16)
    results = []
    for count in (1, 2, 7):
        set_threads(count)
        results.append(case.run(CpuKernels(isa), case.cache(), [3]))
    assert all(torch.equal(result, results[0]) for result in results)
    assert off(results[0], case.run(ReferenceKernels(), case.cache(), [3])) < 2e-3


def test_scores_far_apart(isa: str) -> None:
    """Softmax of scores in the thousands: one key takes all, and nothing overflows."""
    case = Case("float32", SHAPES["grouped"], 300, 5, torch.float32)
    for weight in (case.weights.q, case.weights.k):
        assert isinstance(weight, torch.Tensor)
        weight *= 60
    compare(case, isa, 1e-4)


def test_no_tokens(isa: str) -> None:
    case = Case("bf16", SHAPES["grouped"], 5, 0, torch.float16)
    assert case.run(CpuKernels(isa), case.cache(), [0]).shape == (0, DIM)


@pytest.mark.parametrize("shape", ["one kv head", "grouped"])
def test_a_nan_does_not_reach_earlier_tokens(isa: str, shape: str) -> None:
    case = Case("float32", SHAPES[shape], 5, 7, torch.float32)
    expected = case.run(CpuKernels(isa), case.cache(), [7])
    for bad in range(1, 7):
        spoiled = Case("float32", SHAPES[shape], 5, 7, torch.float32)
        spoiled.hidden[bad, 3] = torch.nan
        result = spoiled.run(CpuKernels(isa), spoiled.cache(), [7])
        assert torch.equal(result[:bad], expected[:bad]), bad
        assert not result[bad].isfinite().any()
