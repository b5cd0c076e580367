"""Arithmetic on packed weights: the one seam between the model and a processor.

T = tokens, R = rows (output features), C = columns (input features), D = model dimension, K = experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from mixlocal.errors import UsageError
from mixlocal.quant.format import ExpertWeights, Weight


class Kernels(Protocol):
    """Activations are float32, weights exactly the numbers their format stands for, sums float32.

    Results depend neither on the number of threads nor on where a weight lies. Raises `RefusedError` for operands that
    do not fit each other. A NaN or infinity in `x` passes into every output it touches.
    """

    @property
    def name(self) -> str:
        """What computes, for people: "reference", "cpu-avx2", ..."""

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """float32 x [T, C], weight [R, C] plain (bfloat16, float32) or quantized -> float32 [T, R]."""

    def moe_ffn(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        experts: Mapping[int, ExpertWeights],
    ) -> torch.Tensor:
        """Sum over K of weights[t, k] * w2(silu(w1 x[t]) * (w3 x[t])) of expert expert_ids[t, k].

        x float32 [T, D], expert_ids int64 [T, K], weights float32 [T, K] -> float32 [T, D]. `experts` holds at least
        the distinct ids. Tokens are grouped by expert and each distinct expert's weights are walked once: no padding,
        no token dropped (MegaBlocks, arXiv 2211.15841).
        """


def select(device: str = "cpu") -> Kernels:
    """The fastest kernels for `device`: compiled ones on a CPU if they were built, else the reference.

    MIXLOCAL_ISA forces one on a CPU: "reference" or a name of `cpu.native_isas()`. Raises `UsageError` if this machine
    does not have it.
    """
    from mixlocal.kernels.cpu import CpuKernels, chosen_isa
    from mixlocal.kernels.reference import ReferenceKernels

    if device != "cpu":
        raise UsageError(f"no kernels for device {device!r}", "use cpu")
    isa = chosen_isa()
    return CpuKernels(isa) if isa else ReferenceKernels()
