"""Arithmetic on packed weights: the one seam between the model and a processor.

T = tokens, R = rows (output features), C = columns (input features), D = model dimension, K = experts per token,
E = experts, H = heads, KH = key/value heads, d = head_dim, N = sequences, P = pages of the longest of them.

Weights are bound once: shapes and types are checked there, and the calls that follow are cheap.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch

from mixlocal.errors import UsageError
from mixlocal.quant.format import ExpertWeights, Weight

PANEL = 16  # keys that lie side by side in a KV cache
PAGE = 64  # positions whose keys and values lie together in it


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """window: keys that a token sees, itself included; None: all."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm_eps: float
    window: int | None


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    norm: torch.Tensor  # [D]
    q: Weight  # [H * d, D]
    k: Weight  # [KH * d, D]
    v: Weight  # [KH * d, D]
    o: Weight  # [D, H * d]


@dataclass(frozen=True, slots=True)
class RouterWeights:
    norm: torch.Tensor  # [D]
    gate: torch.Tensor  # [E, D]
    norm_eps: float
    top_k: int


@dataclass(frozen=True, slots=True)
class KeyValues:
    """One layer's cache, float16 or float32, in pages that belong to any number of sequences.

    keys: [pages, KH, PAGE / PANEL, d, PANEL], so that PANEL keys are compared with a query at once.
    values: [pages, KH, PAGE, d rounded up to a multiple of PANEL].
    """

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward pass shares. Its tokens are those of one sequence after the other.

    starts = [5, 0], counts = [1, 3], pages = [[2, 9], [4, 0]]: one token at position 5 of a sequence whose first page
    is 2, then three at positions 0, 1, 2 of one whose first page is 4. Tables are filled up with any number.
    """

    starts: torch.Tensor  # int64 [N], in this computer's memory, as the next
    counts: torch.Tensor  # int64 [N]
    pages: torch.Tensor  # int64 [N, P], where the cache lies
    cos: torch.Tensor  # [T, d]
    sin: torch.Tensor  # [T, d]

    @property
    def last_rows(self) -> torch.Tensor:
        """Which of the T tokens is each sequence's last, int64 [N]."""
        return self.counts.cumsum(0) - 1


class Attention(Protocol):
    def add_to(self, hidden: torch.Tensor, cache: KeyValues, step: Step) -> None:
        """hidden [T, D] += attention over the cache of the normed rows, whose keys and values join the cache."""


class Router(Protocol):
    def choose(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden [T, D] -> normed rows [T, D], expert ids int64 [T, K] best first, weights float32 [T, K].

        Softmax over all experts, the K largest, renormalised to sum to one (Mixtral, arXiv 2401.04088, section 2.1).
        """


class Head(Protocol):
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, D] -> normed rows times the head, float32 [T, V]."""


Expert = object  # what `Kernels.bind_expert` makes of an expert's weights


class Kernels(Protocol):
    """Activations are float32, sums float32.

    `ReferenceKernels` multiplies by exactly the numbers that a weight's format stands for. `CpuKernels` first rounds
    the activations that meet four-bit and int8 weights to int8; `integer.py` says how, to the bit, and what error it
    brings. Results depend neither on the number of threads nor on where a weight lies. A NaN or infinity in a row of x
    makes every output of that row NaN or infinite, and no other row's.
    """

    @property
    def name(self) -> str:
        """What computes, for people: "reference", "cpu-avx2", ..."""

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """float32 x [T, C], weight [R, C] plain (bfloat16, float32) or quantized -> float32 [T, R].

        Raises `RefusedError` for operands that do not fit each other, as the three below do.
        """

    def bind_attention(self, weights: AttentionWeights, shape: AttentionShape) -> Attention: ...

    def bind_router(self, weights: RouterWeights) -> Router: ...

    def bind_head(self, norm: torch.Tensor, weight: Weight, norm_eps: float) -> Head:
        """norm float32 [D], weight [V, D]."""

    def bind_expert(self, weights: ExpertWeights) -> Expert:
        """The arrays of `weights` are read where they lie, at every use."""

    def moe_ffn(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: dict[int, Expert]
    ) -> torch.Tensor:
        """Sum over K of weights[t, k] * w2(silu(w1 x[t]) * (w3 x[t])) of expert expert_ids[t, k].

        x float32 [T, D], expert_ids int64 [T, K], weights float32 [T, K] -> float32 [T, D]. `experts` holds at least
        the distinct ids. Tokens are grouped by expert and each distinct expert's weights are walked once: no padding,
        no token dropped (MegaBlocks, arXiv 2211.15841). Raises `RefusedError` for a missing expert.
        """


def select(device: str = "cpu") -> Kernels:
    """The fastest kernels for `device`, "cpu", "cuda" or "cuda:N": compiled ones on a CPU if they were built, else the
    reference; bitsandbytes on a GPU.

    MIXLOCAL_ISA forces one on a CPU: "reference" or a name of `cpu.native_isas()`. Raises `UsageError` for what this
    machine does not have.
    """
    from mixlocal.kernels.cpu import CpuKernels
    from mixlocal.kernels.cuda import CudaKernels, check_device
    from mixlocal.kernels.isa import chosen_isa
    from mixlocal.kernels.reference import ReferenceKernels

    if re.fullmatch(r"cuda(:(0|[1-9][0-9]*))?", device):
        check_device(device)
        return CudaKernels(device)
    if device != "cpu":
        raise UsageError(f"no kernels for device {device!r}", "use cpu, cuda or cuda:N")
    isa = chosen_isa()
    return CpuKernels(isa) if isa else ReferenceKernels()
