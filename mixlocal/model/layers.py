"""Norm, rotary embedding and attention.

T = new tokens, S = all tokens so far, H = heads, KH = key/value heads, d = head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from mixlocal.kernels import Kernels
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import KVCache
from mixlocal.quant.format import Weight


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    q: Weight  # [H * d, D]
    k: Weight  # [KH * d, D]
    v: Weight  # [KH * d, D]
    o: Weight  # [D, H * d]


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward pass shares: computed once, handed down."""

    cos: torch.Tensor  # [T, d]
    sin: torch.Tensor  # [T, d]
    mask: torch.Tensor | None  # bool [T, S]; None: every new token sees everything before it
    first_key: int  # keys before this one are outside every token's window


def make_step(config: ModelConfig, start: int, count: int) -> Step:
    """Positions `start` to `start + count - 1`."""
    positions = torch.arange(start, start + count)
    cos, sin = rotary_tables(config, positions)
    window = config.sliding_window
    first_key = max(0, start + 1 - window) if window is not None else 0
    if count == 1:
        return Step(cos, sin, None, first_key)
    keys = torch.arange(first_key, start + count)
    mask = keys <= positions[:, None]
    if window is not None:
        mask &= keys > positions[:, None] - window
    return Step(cos, sin, mask, first_key)


def rotary_tables(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [T, d] (RoFormer, arXiv 2104.09864; the two halves of a head form the pairs, as in Hugging Face)."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, step: Step) -> torch.Tensor:
    """Rotary embedding of [heads, T, d]."""
    left, right = x.chunk(2, dim=-1)
    return x * step.cos + torch.cat((-right, left), dim=-1) * step.sin


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last axis (arXiv 1910.07467)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def attend(
    x: torch.Tensor,
    weights: AttentionWeights,
    layer: int,
    config: ModelConfig,
    cache: KVCache,
    step: Step,
    kernels: Kernels,
) -> torch.Tensor:
    """Causal grouped-query attention of [T, D] over the cache, to which the new keys and values are appended."""

    def heads(weight: Weight, count: int) -> torch.Tensor:  # [count, T, d]
        return kernels.linear(x, weight).view(-1, count, config.head_dim).transpose(0, 1)

    query = rotate(heads(weights.q, config.n_heads), step)
    key = rotate(heads(weights.k, config.n_kv_heads), step)
    keys, values = cache.append(layer, key, heads(weights.v, config.n_kv_heads))
    mixed = scaled_dot_product_attention(
        query[None],
        keys[None, :, step.first_key :],
        values[None, :, step.first_key :],
        attn_mask=step.mask,
        enable_gqa=True,
    )
    return kernels.linear(mixed[0].transpose(0, 1).flatten(1), weights.o)
