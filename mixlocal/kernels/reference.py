"""The kernels in plain PyTorch, on any device: the specification of all others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch.nn.functional import pad, scaled_dot_product_attention, silu

from mixlocal.kernels import (
    PAGE,
    PANEL,
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
    check_attention,
    check_expert,
    check_head,
    check_linear,
    check_router,
    check_routing,
    missing_experts,
)
from mixlocal.quant.format import BLOCK_SIZE, CODEBOOKS, ExpertWeights, QuantTensor, Weight
from mixlocal.quant.quantize import dequantize_rows, row_chunks


class ReferenceKernels:
    """Every weight is dequantized, a few rows at a time, and multiplied as float32."""

    @property
    def name(self) -> str:
        return "reference"

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See `Kernels.linear`."""
        check_linear(x, weight)
        out = torch.empty(len(x), weight.shape[0], device=x.device)
        for part, exact in self.exact_rows(weight):
            out[:, part] = x @ exact.T
        return out

    def exact_rows(self, weight: Weight) -> Iterator[tuple[slice, torch.Tensor]]:
        """A weight as float32, some rows at a time."""
        if isinstance(weight, torch.Tensor) and weight.dtype == torch.float32:
            yield slice(0, len(weight)), weight
        elif isinstance(weight, QuantTensor) and weight.spec.kind in CODEBOOKS:
            pairs = _pair_table(weight)
            for part in row_chunks(*weight.shape):
                yield part, _four_bit_rows(weight, pairs, part)
        else:
            for part in row_chunks(*weight.shape):
                yield part, dequantize_rows(weight, part)

    def bind_attention(self, weights: AttentionWeights, shape: AttentionShape) -> Attention:
        """See `Kernels.bind_attention`."""
        check_attention(weights, shape)
        return ReferenceAttention(self, weights, shape)

    def bind_router(self, weights: RouterWeights) -> Router:
        """See `Kernels.bind_router`."""
        check_router(weights)
        return ReferenceRouter(weights)

    def bind_head(self, norm: torch.Tensor, weight: Weight, norm_eps: float) -> Head:
        """See `Kernels.bind_head`."""
        check_head(norm, weight)
        return ReferenceHead(self, norm, weight, norm_eps)

    def bind_expert(self, weights: ExpertWeights) -> Expert:
        """See `Kernels.bind_expert`."""
        check_expert(weights)
        return weights

    def moe_ffn(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: dict[int, Expert]
    ) -> torch.Tensor:
        """See `Kernels.moe_ffn`; experts add up in the order of their ids."""
        check_routing(x, expert_ids, weights)
        picks_by_expert = _picks_by_expert(expert_ids)
        missing = picks_by_expert.keys() - experts.keys()
        if missing:
            raise missing_experts(missing)
        out = torch.zeros_like(x)
        flat_weights = weights.reshape(-1, 1)
        for expert_id, picks in picks_by_expert.items():
            tokens = picks // expert_ids.shape[1]
            out.index_add_(0, tokens, self.expert(x[tokens], experts[expert_id]) * flat_weights[picks])
        return out

    def expert(self, x: torch.Tensor, expert: Expert) -> torch.Tensor:
        """w2(silu(w1 x) * (w3 x)) of one bound expert, float32 [N, D] -> [N, D]."""
        weights = cast(ExpertWeights, expert)
        hidden = silu(self.linear(x, weights.w1)) * self.linear(x, weights.w3)
        return self.linear(hidden, weights.w2)


class ReferenceAttention:
    """See `mixlocal.kernels.Attention`."""

    def __init__(self, kernels: ReferenceKernels, weights: AttentionWeights, shape: AttentionShape) -> None:
        self._kernels, self._weights, self._shape = kernels, weights, shape

    def add_to(self, hidden: torch.Tensor, cache: KeyValues, step: Step) -> None:
        """See `mixlocal.kernels.Attention`."""
        weights, shape = self._weights, self._shape
        normed = rms_norm(hidden, weights.norm, shape.norm_eps)

        def heads(weight: Weight, count: int) -> torch.Tensor:  # [count, T, d]
            return self._kernels.linear(normed, weight).view(-1, count, shape.head_dim).transpose(0, 1)

        query = rotate(heads(weights.q, shape.n_heads), step)
        key, value = rotate(heads(weights.k, shape.n_kv_heads), step), heads(weights.v, shape.n_kv_heads)
        mixed, begin = torch.empty_like(query), 0
        for start, count, pages in zip(step.starts.tolist(), step.counts.tolist(), step.pages, strict=True):
            rows = slice(begin, begin + count)
            pages = pages[: -(-(start + count) // PAGE)]
            store(cache, pages, start, key[:, rows], value[:, rows])
            seen = stored(cache, pages, start + count, shape.head_dim)
            mixed[:, rows] = self._attend(query[:, rows], *seen, start)
            begin += count
        hidden += self._kernels.linear(mixed.transpose(0, 1).flatten(1), weights.o)

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
        """[H, T, d] of a sequence's tokens from `start` on, over keys and values [KH, start + T, d]."""
        mask = visible(start, query.shape[1], self._shape.window, query.device)
        return scaled_dot_product_attention(query[None], keys[None], values[None], attn_mask=mask, enable_gqa=True)[0]


class ReferenceRouter:
    """See `mixlocal.kernels.Router`."""

    def __init__(self, weights: RouterWeights) -> None:
        self._weights = weights

    def choose(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `mixlocal.kernels.Router`. Softmax over the K largest logits alone would give the same weights."""
        normed = rms_norm(hidden, self._weights.norm, self._weights.norm_eps)
        scores = torch.softmax(normed @ self._weights.gate.T, dim=-1)
        weights, ids = scores.topk(self._weights.top_k, dim=-1)
        return normed, ids, weights / weights.sum(-1, keepdim=True)


class ReferenceHead:
    """See `mixlocal.kernels.Head`."""

    def __init__(self, kernels: ReferenceKernels, norm: torch.Tensor, weight: Weight, norm_eps: float) -> None:
        self._kernels, self._norm, self._weight, self._eps = kernels, norm, weight, norm_eps

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `mixlocal.kernels.Head`."""
        return self._kernels.linear(rms_norm(hidden, self._norm, self._eps), self._weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis (arXiv 1910.07467)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, step: Step) -> torch.Tensor:
    """Rotary embedding of [heads, T, d]."""
    left, right = x.chunk(2, dim=-1)
    return x * step.cos + torch.cat((-right, left), dim=-1) * step.sin


def visible(start: int, count: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [T, start + T]: which positions each of the tokens at start, start + 1, ... attends to."""
    keys = torch.arange(start + count, device=device)
    positions = keys[start:, None]
    mask = keys <= positions
    return mask if window is None else mask & (keys > positions - window)


def store(cache: KeyValues, pages: torch.Tensor, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Put keys and values [KH, T, d] at positions start, start + 1, ... of the sequence that has `pages`."""
    positions = torch.arange(start, start + keys.shape[1], device=keys.device)
    own, at = pages[positions // PAGE], positions % PAGE
    cache.keys[own, :, at // PANEL, :, at % PANEL] = keys.transpose(0, 1).to(cache.keys.dtype)
    cache.values[own, :, at, : values.shape[2]] = values.transpose(0, 1).to(cache.values.dtype)


def stored(cache: KeyValues, pages: torch.Tensor, count: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` keys and values of the sequence that has `pages`, float32 [KH, count, d]."""
    keys = cache.keys[pages].transpose(0, 1).transpose(3, 4).flatten(1, 3)[:, :count]
    values = cache.values[pages].transpose(0, 1).flatten(1, 2)[:, :count, :head_dim]
    return keys.float(), values.float()


def _pair_table(weight: QuantTensor) -> torch.Tensor:
    """float32 [256, 2]: the two levels that each packed byte stands for."""
    levels = torch.tensor(CODEBOOKS[weight.spec.kind], device=weight.codes.device)
    return torch.cartesian_prod(levels, levels)


def _four_bit_rows(weight: QuantTensor, pairs: torch.Tensor, part: slice) -> torch.Tensor:
    """`dequantize_rows` for 4 bits, the same bits at half the look-ups."""
    columns = weight.shape[1]
    levels = pairs[weight.codes[part].int()].flatten(1)
    scales = weight.scales[part].float()
    if columns % BLOCK_SIZE == 0:
        return (levels.view(len(scales), -1, BLOCK_SIZE) * scales.unsqueeze(-1)).view(len(scales), columns)
    padded = pad(levels, (0, -columns % BLOCK_SIZE)).view(len(scales), -1, BLOCK_SIZE)
    return (padded * scales.unsqueeze(-1)).flatten(1)[:, :columns]


def _picks_by_expert(expert_ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """Each distinct id in ascending order, with the places t * K + k that chose it."""
    flat = expert_ids.flatten()
    return {expert_id: (flat == expert_id).nonzero().flatten() for expert_id in sorted(set(flat.tolist()))}
