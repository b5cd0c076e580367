"""The names we give a model's tensors in a store, whatever its checkpoint calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mixlocal.model.config import ModelConfig

EMBEDDING, FINAL_NORM, HEAD = "embedding", "norm", "head"
ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.o")
EXPERT_PARTS = ("w1", "w3", "w2")


@dataclass(frozen=True, slots=True)
class TrunkTensor:
    """One tensor outside the experts. kind: how it may be stored."""

    name: str
    shape: tuple[int, ...]
    kind: str  # "matrix": as the attention recipe says; "exact": float32

    @property
    def is_matrix(self) -> bool:
        return self.kind == "matrix"

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a matrix."""
        rows, columns = self.shape
        return rows, columns


def trunk_tensors(config: ModelConfig) -> Iterator[TrunkTensor]:
    """Every tensor but the experts', in the order the model uses them."""
    yield TrunkTensor(EMBEDDING, (config.vocab_size, config.dim), "matrix")
    for i in range(config.n_layers):
        yield from _layer_tensors(config, f"layers.{i}.")
    yield TrunkTensor(FINAL_NORM, (config.dim,), "exact")
    if not config.tied_embeddings:
        yield TrunkTensor(HEAD, (config.vocab_size, config.dim), "matrix")


def expert_shape(config: ModelConfig, part: str) -> tuple[int, int]:
    """[H, D] for w1 and w3, [D, H] for w2."""
    return (config.dim, config.expert_hidden) if part == "w2" else (config.expert_hidden, config.dim)


def _layer_tensors(config: ModelConfig, prefix: str) -> Iterator[TrunkTensor]:
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield TrunkTensor(prefix + "attention_norm", (config.dim,), "exact")
    for name, shape in zip(
        ATTENTION, ((queries, config.dim), (keys, config.dim), (keys, config.dim), (config.dim, queries)), strict=True
    ):
        yield TrunkTensor(prefix + name, shape, "matrix")
    yield TrunkTensor(prefix + "ffn_norm", (config.dim,), "exact")
    yield TrunkTensor(prefix + "router", (config.router.n_experts, config.dim), "exact")
