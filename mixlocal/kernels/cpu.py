"""Kernels for this machine's CPU: the face of native/."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mixlocal.errors import RefusedError
from mixlocal.kernels import (
    Attention,
    AttentionShape,
    AttentionWeights,
    Expert,
    Head,
    KeyValues,
    Router,
    RouterWeights,
    Step,
)
from mixlocal.kernels.checks import (
    check_activations,
    check_attention,
    check_expert,
    check_head,
    check_router,
    check_routing,
    missing_experts,
)
from mixlocal.kernels.isa import MISSING, native_kernels
from mixlocal.kernels.operands import address, matrix
from mixlocal.quant.format import ExpertWeights, Weight

if TYPE_CHECKING or not MISSING:
    from mixlocal.kernels.native import _native


class CpuKernels:
    """The compiled kernels of one instruction set.

    Weights must be contiguous; they are read where they lie. A token's outputs have the same bits whatever tokens are
    beside it and however many threads compute them; four-bit and int8 products have the bits of `integer_linear`.
    """

    def __init__(self, isa: str) -> None:
        """Raises `UsageError` if this machine does not have `isa`."""
        self._native = native_kernels(isa)
        self._isa = isa

    @property
    def name(self) -> str:
        return f"cpu-{self._isa}"

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See `Kernels.linear`."""
        check_activations(x, weight)
        operand = matrix(weight)
        x = x.detach().contiguous()
        out = torch.empty(len(x), weight.shape[0])
        self._native.linear(operand, x.data_ptr(), len(x), out.data_ptr())
        return out

    def bind_attention(self, weights: AttentionWeights, shape: AttentionShape) -> Attention:
        """See `Kernels.bind_attention`."""
        return CpuAttention(self._native, weights, shape)

    def bind_router(self, weights: RouterWeights) -> Router:
        """See `Kernels.bind_router`."""
        return CpuRouter(self._native, weights)

    def bind_head(self, norm: torch.Tensor, weight: Weight, norm_eps: float) -> Head:
        """See `Kernels.bind_head`."""
        return CpuHead(self._native, norm, weight, norm_eps)

    def bind_expert(self, weights: ExpertWeights) -> Expert:
        """See `Kernels.bind_expert`."""
        check_expert(weights)
        return _native.Expert(matrix(weights.w1), matrix(weights.w3), matrix(weights.w2), weights)

    def moe_ffn(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: dict[int, Expert]
    ) -> torch.Tensor:
        """See `Kernels.moe_ffn`."""
        check_routing(x, expert_ids, weights)
        x, expert_ids, weights = x.contiguous(), expert_ids.contiguous(), weights.contiguous()
        out = torch.zeros_like(x)
        tokens, top_k = expert_ids.shape
        wrong = self._native.moe_ffn(
            x.data_ptr(), x.shape[1], tokens, expert_ids.data_ptr(), weights.data_ptr(), top_k, experts, out.data_ptr()
        )
        if wrong is not None:
            if wrong not in experts:
                raise missing_experts([wrong])
            raise RefusedError(f"expert {wrong} has not the width of x and of the other experts")
        return out


class CpuAttention:
    """See `mixlocal.kernels.Attention`."""

    def __init__(self, native: _native.Kernels, weights: AttentionWeights, shape: AttentionShape) -> None:
        check_attention(weights, shape)
        self._native = native
        self._dim = weights.o.shape[0]
        self._layer = _native.Attention(
            address("norm", weights.norm), shape.norm_eps,
            matrix(weights.q), matrix(weights.k), matrix(weights.v), matrix(weights.o),
            shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.window or 0, weights,
        )  # fmt: skip

    def add_to(self, hidden: torch.Tensor, cache: KeyValues, step: Step) -> None:
        """See `mixlocal.kernels.Attention`."""
        assert hidden.is_contiguous()
        assert hidden.shape[1] == self._dim
        assert step.pages.is_contiguous()
        self._native.attention(
            self._layer, hidden.data_ptr(), len(step.starts), step.starts.data_ptr(), step.counts.data_ptr(),
            step.pages.data_ptr(), step.pages.shape[1], step.cos.data_ptr(), step.sin.data_ptr(), cache.keys.data_ptr(),
            cache.values.data_ptr(), cache.values.shape[-1], cache.values.dtype == torch.float16,
        )  # fmt: skip


class CpuRouter:
    """See `mixlocal.kernels.Router`."""

    def __init__(self, native: _native.Kernels, weights: RouterWeights) -> None:
        check_router(weights)
        experts, dim = weights.gate.shape
        self._native, self._top_k = native, weights.top_k
        self._router = _native.Router(
            address("norm", weights.norm), weights.norm_eps, address("router", weights.gate),
            dim, experts, weights.top_k, weights,
        )  # fmt: skip

    def choose(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `mixlocal.kernels.Router`."""
        assert hidden.is_contiguous()
        normed = torch.empty_like(hidden)
        ids = torch.empty((len(hidden), self._top_k), dtype=torch.int64)
        weights = torch.empty((len(hidden), self._top_k))
        self._native.route(
            self._router, hidden.data_ptr(), len(hidden), normed.data_ptr(), ids.data_ptr(), weights.data_ptr()
        )
        return normed, ids, weights


class CpuHead:
    """See `mixlocal.kernels.Head`."""

    def __init__(self, native: _native.Kernels, norm: torch.Tensor, weight: Weight, norm_eps: float) -> None:
        check_head(norm, weight)
        self._native, self._rows, self._eps = native, weight.shape[0], norm_eps
        self._norm, self._weight = norm, weight  # keeps alive what the addresses below are of
        self._norm_address, self._matrix = address("norm", norm), matrix(weight)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `mixlocal.kernels.Head`."""
        hidden = hidden.contiguous()
        out = torch.empty(len(hidden), self._rows)
        self._native.norm_linear(
            self._norm_address, self._eps, self._matrix, hidden.data_ptr(), len(hidden), out.data_ptr()
        )
        return out
