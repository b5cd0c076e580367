"""What one layer of a model takes on this machine, measured with random weights of its widths: no download is needed.

A model of few layers and the same shapes runs through the same code as the real one. It is larger than any cache, so
its weights come from memory, as the real ones do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch

from mixlocal.app.bench_weights import random_expert, randomize
from mixlocal.app.footprint import model_bytes
from mixlocal.experts.runtime import ExpertCounts, Guess, Routing
from mixlocal.experts.trace import RoutingTrace
from mixlocal.kernels import Expert, Kernels, select
from mixlocal.model.config import ModelConfig, RouterConfig
from mixlocal.model.kv_cache import KVCache, KVPool
from mixlocal.model.load import trunk_weights
from mixlocal.model.tensors import trunk_tensors
from mixlocal.model.transformer import Piece, Transformer
from mixlocal.quant.format import ExpertLayout, QuantSpec
from mixlocal.quant.quantize import empty
from mixlocal.store.manifest import Recipe
from mixlocal.store.model_store import SCALES_SUFFIX

CACHED_BYTES = 1 << 28  # far above a last-level cache
FEWEST_STEPS, MOST_STEPS, SECONDS = 4, 60, 0.7


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step: of a layer, and of all that is outside the layers."""

    layer: float
    rest: float


def rehearse(config: ModelConfig, recipe: Recipe, sequences: int) -> StepTime:
    """Time steps of `sequences` tokens. Needs about `rehearsal_bytes` of memory."""
    small = _smaller(config, recipe)
    kernels = select("cpu")
    spec = recipe.attention_spec
    weights = trunk_weights(dict(_random_trunk(small, spec)), small, spec, "rehearsal")
    model = Transformer(small, weights, _RandomExperts(small, recipe, kernels), kernels)
    head = kernels.bind_head(weights.norm, weights.head, small.norm_eps)
    hidden = torch.randn(sequences, small.dim)
    steps = _times(lambda step: _decode(model, small, sequences, step))
    rest = _times(lambda _: head.logits(hidden))
    return StepTime(max(0.0, steps - rest) / small.n_layers, rest)


def rehearsal_bytes(config: ModelConfig, recipe: Recipe) -> int:
    needed = model_bytes("", _smaller(config, recipe), recipe, torch.float16)
    return needed.trunk + needed.n_records * needed.record + needed.scratch


class _RandomExperts:
    """All in memory."""

    def __init__(self, config: ModelConfig, recipe: Recipe, kernels: Kernels) -> None:
        layout = ExpertLayout(config.dim, config.expert_hidden, recipe.expert_spec)
        self.counts = ExpertCounts()
        self.trace = RoutingTrace(config.n_layers, config.router.n_experts)
        self._kernels = kernels
        self._layers: list[dict[int, Expert]] = [
            {expert: kernels.bind_expert(random_expert(layout)) for expert in range(config.router.n_experts)}
            for _ in range(config.n_layers)
        ]

    def apply(self, layer: int, x: torch.Tensor, routing: Routing, guess: Guess | None = None) -> torch.Tensor:
        return self._kernels.moe_ffn(x, routing.experts, routing.weights, self._layers[layer])

    def close(self) -> None:
        pass


def _smaller(config: ModelConfig, recipe: Recipe) -> ModelConfig:
    """As many layers and experts as together are larger than a cache."""
    layout = ExpertLayout(config.dim, config.expert_hidden, recipe.expert_spec)
    n_experts = min(config.router.n_experts, max(2 * config.router.top_k, 4))
    layers = min(config.n_layers, max(1, -(-CACHED_BYTES // (n_experts * layout.stride))))
    router = RouterConfig(n_experts, config.router.top_k)
    return replace(config, n_layers=layers, router=router, tied_embeddings=True)


def _random_trunk(config: ModelConfig, spec: QuantSpec) -> Iterator[tuple[str, torch.Tensor]]:
    for tensor in trunk_tensors(config):
        if tensor.is_matrix and spec.kind == "int8":
            weight = empty(spec, tensor.matrix)
            randomize(weight)
            yield tensor.name, weight.codes
            yield tensor.name + SCALES_SUFFIX, weight.scales
        elif tensor.is_matrix:
            plain = torch.empty(tensor.shape, dtype=torch.bfloat16)
            randomize(plain)
            yield tensor.name, plain
        else:
            yield tensor.name, torch.randn(tensor.shape)


def _decode(model: Transformer, config: ModelConfig, sequences: int, step: int) -> None:
    """The first token of so many sequences."""
    pool = KVPool(config, sequences)
    ids = ((step * sequences + i) % config.vocab_size for i in range(sequences))
    model.forward_many([Piece(KVCache(pool, 1), [token]) for token in ids])


def _times(work: Callable[[int], object]) -> float:
    """Median seconds; the first run warms up."""
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < FEWEST_STEPS or (time.perf_counter() - begin < SECONDS and len(samples) < MOST_STEPS):
        start = time.perf_counter()
        work(len(samples))
        samples.append(time.perf_counter() - start)
    return median(samples[1:])
