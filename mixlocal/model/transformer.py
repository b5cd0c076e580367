"""The forward pass.  T = new tokens, D = dim, V = vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from mixlocal.experts.plan import PREFILL_CHUNK
from mixlocal.experts.runtime import ExpertRuntime, Routing
from mixlocal.kernels import AttentionShape, AttentionWeights, Kernels, RouterWeights
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import KVCache
from mixlocal.model.layers import make_step
from mixlocal.quant.format import QuantTensor, Weight
from mixlocal.quant.quantize import dequantize


@dataclass(frozen=True, slots=True)
class LayerWeights:
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
    """Blueprint, trunk and experts; the state of a sequence is the KVCache that the caller owns. Everything is computed
    where the trunk lies, and where `experts` says."""

    def __init__(
        self,
        config: ModelConfig,
        trunk: TrunkWeights,
        experts: ExpertRuntime,
        kernels: Kernels,
        top_k: int | None = None,
        chunk: int = PREFILL_CHUNK,
    ) -> None:
        """chunk: the most tokens that one pass should have, for its temporaries are counted on."""
        self.config = config
        self.top_k = top_k or config.router.top_k
        self.experts = experts
        self.chunk = chunk
        eps, shape = config.norm_eps, attention_shape(config)
        self._embedding = trunk.embedding
        self._device = trunk.norm.device
        self._attention = [kernels.bind_attention(layer.attention, shape) for layer in trunk.layers]
        self._routers = [
            kernels.bind_router(RouterWeights(layer.ffn_norm, layer.router, eps, self.top_k)) for layer in trunk.layers
        ]
        self._head = kernels.bind_head(trunk.norm, trunk.head, eps)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, cache: KVCache, *, all_logits: bool = False) -> torch.Tensor:
        """Logits after the tokens `ids` [T], which are added to the cache: float32 [V], or [T, V] with `all_logits`."""
        count = len(ids)
        assert cache.length + count <= cache.limit, (cache.length, count, cache.limit)
        step = make_step(self.config, cache.length, count, self._device)
        hidden = embed(self._embedding, ids.to(self._device))
        for i, (attention, router) in enumerate(zip(self._attention, self._routers, strict=True)):
            attention.add_to(hidden, cache.layers[i], step)
            normed, experts, weights = router.choose(hidden)
            guess = partial(self._guess, i + 1, hidden) if i + 1 < len(self._routers) else None
            hidden += self.experts.apply(i, normed, Routing(experts, weights), guess)
        cache.advance(ids.tolist())
        logits = self._head.logits(hidden if all_logits else hidden[-1:])
        return (logits if all_logits else logits[0]).cpu()

    def _guess(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What `layer` would choose if nothing lay between: most of what it will choose. int64 [T, K]."""
        return self._routers[layer].choose(hidden)[1]


def attention_shape(config: ModelConfig) -> AttentionShape:
    return AttentionShape(config.n_heads, config.n_kv_heads, config.head_dim, config.norm_eps, config.sliding_window)


def embed(embedding: Weight, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` [T] of the embedding, float32 [T, D]."""
    if isinstance(embedding, torch.Tensor):
        return embedding[ids].float()
    rows = QuantTensor(embedding.spec, (len(ids), embedding.shape[1]), embedding.codes[ids], embedding.scales[ids])
    return dequantize(rows)
