"""How many parameters a model has, how many a token uses, and where they sit."""

from __future__ import annotations

from dataclasses import dataclass

from mixlocal.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Part:
    """total: stored.  active: used for one token; the embedding counts whole, as in published figures."""

    name: str
    total: int
    active: int


def count_parameters(config: ModelConfig) -> tuple[Part, ...]:
    """By part, in the order of size classes a reader asks for."""
    dim, layers, router = config.dim, config.n_layers, config.router
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    expert = 3 * dim * config.expert_hidden
    parts = [
        Part("experts", layers * router.n_experts * expert, layers * router.top_k * expert),
        _shared("attention", layers * 2 * dim * (queries + keys)),
        _shared("embedding", config.vocab_size * dim),
        _shared("output head", 0 if config.tied_embeddings else config.vocab_size * dim),
        _shared("router", layers * router.n_experts * dim),
        _shared("norms", (2 * layers + 1) * dim),
    ]
    return tuple(part for part in parts if part.total)


def total_and_active(config: ModelConfig) -> tuple[int, int]:
    parts = count_parameters(config)
    return sum(part.total for part in parts), sum(part.active for part in parts)


def one_expert_model(config: ModelConfig) -> int:
    """Parameters of the same model with one expert a layer: the "7B" of "8 x 7B"."""
    total, _ = total_and_active(config)
    parts = {part.name: part.total for part in count_parameters(config)}
    others = config.router.n_experts - 1
    return total - parts["experts"] // config.router.n_experts * others - parts["router"]


def _shared(name: str, count: int) -> Part:
    return Part(name, count, count)
