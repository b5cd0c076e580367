"""What `bench --kernels` times: formats, shapes, token counts, for each instruction set of the machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Literal

import torch

from mixlocal.app.bench_weights import random_expert, weight_copies
from mixlocal.kernels import Kernels
from mixlocal.kernels.cpu import CpuKernels
from mixlocal.kernels.isa import ISA_VARIABLE, chosen_isa, native_isas
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.quant.format import KINDS, ExpertLayout, ExpertWeights, Kind, QuantSpec, Weight

Shape = tuple[int, int]
SMALL_SHAPE: Shape = (1536, 576)  # smolmix's; the only one that is worth waiting for the reference
SHAPES: tuple[Shape, ...] = ((14336, 4096), (4096, 14336), SMALL_SHAPE)  # [R, C]; the first two are Mixtral 8x7B's
MOE_HIDDEN, MOE_DIM = 14336, 4096
MOE_EXPERTS, MOE_TOP_K = 8, 2
TOKENS, QUICK_TOKENS = (1, 4, 16, 512), (1, 512)
BATCH = 16  # from so many tokens on the arithmetic decides, up to so many the memory
SAMPLE_BYTES = 1 << 26  # weights walked per sample: a small matrix is timed over many runs


@dataclass(frozen=True, slots=True)
class KernelCase:
    """run: one run, which reads n_bytes of weights and takes n_flop operations."""

    test: Literal["linear", "moe"]
    backend: str
    format: Kind
    shape: Shape
    n_tokens: int
    n_bytes: int
    n_flop: int
    run: Callable[[], object]

    @property
    def calls(self) -> int:
        """Runs in one sample."""
        return max(1, SAMPLE_BYTES // (self.n_bytes * self.n_tokens))

    @property
    def memory_bound(self) -> bool:
        return self.n_tokens <= BATCH

    @property
    def what(self) -> str:
        rows, columns = self.shape
        return f"{self.test} {self.format} {rows} x {columns}, {self.n_tokens} token{'s' * (self.n_tokens > 1)}"


# Makes its weights when it is called; yields cases that differ in their kernels only, to be timed in turns.
Stage = Callable[[], Iterator[list[KernelCase]]]


def stages(quick: bool) -> list[Stage]:
    """Every case, by what weights it needs."""
    found: list[Stage] = [partial(_matrix_cases, kind, shape, quick) for kind in KINDS for shape in SHAPES]
    return [*found, *([_moe_cases] if measured_isas() else []), partial(_reference_cases, quick)]


def measured_isas() -> tuple[str, ...]:
    """All of the machine, best first, unless MIXLOCAL_ISA asks for one."""
    chosen = chosen_isa()
    if chosen is None:
        return ()
    return (chosen,) if os.environ.get(ISA_VARIABLE) else native_isas()


def _matrix_cases(kind: Kind, shape: Shape, quick: bool) -> Iterator[list[KernelCase]]:
    if not measured_isas():
        return
    copies = weight_copies(QuantSpec(kind), shape)
    for n_tokens in QUICK_TOKENS if quick else TOKENS:
        slow = quick and n_tokens > BATCH and shape != SMALL_SHAPE
        isas = measured_isas()[:1] if slow else measured_isas()
        weights = cycle(copies)  # one for all, so that none finds in a cache what another has just read
        yield [_linear(CpuKernels(isa), kind, weights, copies[0], n_tokens) for isa in isas]


def _reference_cases(quick: bool) -> Iterator[list[KernelCase]]:
    for kind in KINDS[:1] if quick else KINDS:
        copies = weight_copies(QuantSpec(kind), SMALL_SHAPE)
        yield [_linear(ReferenceKernels(), kind, cycle(copies), copies[0], 1)]


def _linear(kernels: Kernels, kind: Kind, weights: Iterator[Weight], first: Weight, n_tokens: int) -> KernelCase:
    rows, columns = first.shape
    x = torch.randn(n_tokens, columns)
    return KernelCase(
        "linear", kernels.name, kind, (rows, columns), n_tokens,
        n_bytes=first.nbytes, n_flop=2 * rows * columns * n_tokens, run=lambda: kernels.linear(x, next(weights)),
    )  # fmt: skip


def _moe_cases() -> Iterator[list[KernelCase]]:
    """One token through one layer, each time through other experts."""
    layout = ExpertLayout(MOE_DIM, MOE_HIDDEN, QuantSpec("nf4"))
    experts = [random_expert(layout) for _ in range(MOE_EXPERTS)]
    choices = cycle(torch.arange(len(experts)).view(-1, 1, MOE_TOP_K))
    yield [_moe(CpuKernels(isa), layout, experts, choices) for isa in measured_isas()]


def _moe(
    kernels: Kernels, layout: ExpertLayout, experts: list[ExpertWeights], choices: Iterator[torch.Tensor]
) -> KernelCase:
    prepared = {index: kernels.bind_expert(expert) for index, expert in enumerate(experts)}
    x, weights = torch.randn(1, layout.dim), torch.full((1, MOE_TOP_K), 1 / MOE_TOP_K)
    return KernelCase(
        "moe", kernels.name, layout.spec.kind, (layout.hidden, layout.dim), 1,
        n_bytes=MOE_TOP_K * sum(part.nbytes for part in layout.parts),
        n_flop=MOE_TOP_K * 6 * layout.hidden * layout.dim,
        run=lambda: kernels.moe_ffn(x, next(choices), weights, prepared),
    )  # fmt: skip
