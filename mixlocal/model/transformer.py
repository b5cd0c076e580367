"""The forward pass.  T = new tokens, D = dim, V = vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mixlocal.experts.plan import PREFILL_CHUNK
from mixlocal.experts.runtime import ExpertRuntime, Routing
from mixlocal.kernels import AttentionShape, AttentionWeights, Kernels, KeyValues, RouterWeights, Step
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


@dataclass(frozen=True, slots=True)
class Piece:
    """The next tokens of one sequence."""

    cache: KVCache
    ids: list[int]


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

    def forward(self, ids: torch.Tensor, cache: KVCache, *, all_logits: bool = False) -> torch.Tensor:
        """Logits after the tokens `ids` [T], which are added to the cache: float32 [V], or [T, V] with `all_logits`."""
        piece = Piece(cache, ids.tolist())
        return self.forward_many([piece], all_logits=True) if all_logits else self.forward_many([piece])[0]

    @torch.inference_mode()
    def forward_many(self, pieces: Sequence[Piece], *, all_logits: bool = False) -> torch.Tensor:
        """Logits after each piece's last token, float32 [N, V], or after every token, [T, V]; all are added to their
        caches, which must be of one pool and different ones. A piece's logits have the same bits whatever is beside
        it."""
        counts = [len(piece.ids) for piece in pieces]
        for piece, count in zip(pieces, counts, strict=True):
            assert 0 < count <= piece.cache.limit - piece.cache.length, (piece.cache.length, count, piece.cache.limit)
            piece.cache.make_room(count)
        step = make_step(self.config, [piece.cache for piece in pieces], counts, self._device)
        ids = torch.tensor([token for piece in pieces for token in piece.ids])
        hidden = self._run_layers(embed(self._embedding, ids.to(self._device)), pieces[0].cache.layers, step)
        for piece in pieces:
            piece.cache.advance(piece.ids)
        wanted = hidden if all_logits else hidden[step.last_rows.to(self._device)]
        return self._head.logits(wanted).cpu()

    def _run_layers(self, hidden: torch.Tensor, layers: Sequence[KeyValues], step: Step) -> torch.Tensor:
        for i, (attention, router) in enumerate(zip(self._attention, self._routers, strict=True)):
            attention.add_to(hidden, layers[i], step)
            normed, experts, weights = router.choose(hidden)
            guess = partial(self._guess, i + 1, hidden) if i + 1 < len(self._routers) else None
            hidden += self.experts.apply(i, normed, Routing(experts, weights), guess)
        return hidden

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
