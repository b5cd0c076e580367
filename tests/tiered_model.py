"""A tiny model whose experts do not all fit, for tests of the runtimes that read them from disk."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from stores import quantized

from mixlocal.experts.profile import FORMAT, RoutingProfile
from mixlocal.model.kv_cache import own_cache
from mixlocal.model.transformer import Transformer
from mixlocal.store.model_store import ModelStore

EXPERTS, LAYERS = 8, 4
IDS = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(5))
PROFILE = RoutingProfile(FORMAT, 100, tuple((0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7) for _ in range(LAYERS)))


def make_store(root: Path, variant: str = "q4") -> ModelStore:
    checkpoint = tiny.write_checkpoint(
        root / "checkpoint", num_local_experts=EXPERTS, num_hidden_layers=LAYERS, num_experts_per_tok=2
    )
    return quantized(checkpoint, root / "store", variant)


def logits(model: Transformer) -> torch.Tensor:
    """A prompt in one pass, then token by token."""
    cache = own_cache(model.config, len(IDS))
    prompt = model.forward(IDS[:40], cache, all_logits=True)
    return torch.cat([prompt, *(model.forward(token[None], cache)[None] for token in IDS[40:])])
