"""The forward pass.  T = new tokens, D = dim, V = vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixlocal.experts.runtime import ExpertRuntime
from mixlocal.kernels import Kernels
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import KVCache
from mixlocal.model.layers import AttentionWeights, attend, make_step, rms_norm
from mixlocal.model.moe import moe_layer
from mixlocal.quant.format import QuantTensor, Weight
from mixlocal.quant.quantize import dequantize


@dataclass(frozen=True, slots=True)
class LayerWeights:
    attention_norm: torch.Tensor  # [D]
    attention: AttentionWeights
    ffn_norm: torch.Tensor  # [D]
    router: torch.Tensor  # [E, D]


@dataclass(frozen=True, slots=True)
class TrunkWeights:
    """Everything but the experts."""

    embedding: Weight  # [V, D]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [D]
    head: Weight  # [V, D]


class Transformer:
    """Blueprint, trunk and experts; the state of a sequence is the KVCache that the caller owns."""

    def __init__(
        self,
        config: ModelConfig,
        trunk: TrunkWeights,
        experts: ExpertRuntime,
        kernels: Kernels,
        top_k: int | None = None,
    ) -> None:
        self.config = config
        self.top_k = top_k or config.router.top_k
        self._trunk, self._experts, self._kernels = trunk, experts, kernels

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, cache: KVCache, *, all_logits: bool = False) -> torch.Tensor:
        """Logits after the tokens `ids` [T], which are added to the cache: float32 [V], or [T, V] with `all_logits`."""
        count = len(ids)
        cache.reserve(count)
        step = make_step(self.config, cache.length, count)
        hidden = embed(self._trunk.embedding, ids)
        for i, layer in enumerate(self._trunk.layers):
            normed = rms_norm(hidden, layer.attention_norm, self.config.norm_eps)
            hidden = hidden + attend(normed, layer.attention, i, self.config, cache, step, self._kernels)
            normed = rms_norm(hidden, layer.ffn_norm, self.config.norm_eps)
            hidden = hidden + moe_layer(normed, layer.router, self.top_k, i, self._experts)
        cache.advance(count)
        hidden = rms_norm(hidden if all_logits else hidden[-1:], self._trunk.norm, self.config.norm_eps)
        logits = self._kernels.linear(hidden, self._trunk.head)
        return logits if all_logits else logits[0]


def embed(embedding: Weight, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` [T] of the embedding, float32 [T, D]."""
    if isinstance(embedding, torch.Tensor):
        return embedding[ids].float()
    rows = QuantTensor(embedding.spec, (len(ids), embedding.shape[1]), embedding.codes[ids], embedding.scales[ids])
    return dequantize(rows)
