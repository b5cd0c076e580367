"""What every layer of one forward pass shares, computed once and handed down.  T = tokens, N = sequences, P = pages of
the longest of them, d = head_dim."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixlocal.kernels import Step
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import KVCache


def make_step(
    config: ModelConfig, caches: Sequence[KVCache], counts: Sequence[int], device: torch.device | str = "cpu"
) -> Step:
    """The next `counts[i]` tokens of each cache's sequence, for which it has pages. The tables of angles are computed
    on the CPU: the same bits on every device."""
    positions = [torch.arange(cache.length, cache.length + n) for cache, n in zip(caches, counts, strict=True)]
    cos, sin = rotary_tables(config, positions[0] if len(positions) == 1 else torch.cat(positions))
    starts = torch.tensor([cache.length for cache in caches])
    return Step(starts, torch.tensor(counts), page_tables(caches).to(device), cos.to(device), sin.to(device))


def page_tables(caches: Sequence[KVCache]) -> torch.Tensor:
    """int64 [N, P]."""
    if len(caches) == 1:
        return caches[0].table[None]
    tables = torch.zeros((len(caches), max(len(cache.table) for cache in caches)), dtype=torch.int64)
    for row, cache in zip(tables, caches, strict=True):
        row[: len(cache.table)] = cache.table
    return tables


def rotary_tables(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [T, d] (RoFormer, arXiv 2104.09864; the two halves of a head form the pairs, as in Hugging Face)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
