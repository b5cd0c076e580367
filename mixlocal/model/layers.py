"""What every layer of one forward pass shares, computed once and handed down.  T = new tokens, d = head_dim."""

from __future__ import annotations

import torch

from mixlocal.kernels import Step
from mixlocal.model.config import ModelConfig


def make_step(config: ModelConfig, start: int, count: int, device: torch.device | str = "cpu") -> Step:
    """Positions `start` to `start + count - 1`. The tables are computed on the CPU: the same bits on every device."""
    cos, sin = rotary_tables(config, torch.arange(start, start + count))
    return Step(start, cos.to(device), sin.to(device))


def rotary_tables(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, [T, d] (RoFormer, arXiv 2104.09864; the two halves of a head form the pairs, as in Hugging Face)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
