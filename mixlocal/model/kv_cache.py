"""Keys and values of the tokens seen so far, for one sequence.

    cache = KVCache(config, limit=4096)
    forward([5, 7, 2])   # length 0 -> 3
    forward([9])         # length 3 -> 4: token 9 attends to positions 0..3
    cache.truncate(1)    # forget all but the first token

Room for `limit` tokens is set aside at once and takes physical memory only where tokens have been written.
"""

from __future__ import annotations

import torch

from mixlocal.errors import MemoryBudgetError
from mixlocal.kernels import PANEL, KeyValues
from mixlocal.model.config import ModelConfig

KV_DTYPES = {"f16": torch.float16, "f32": torch.float32}
DEFAULT_KV_DTYPE = "f16"


class KVCache:
    """`layers[i]` is what layer i reads and writes; positions 0 to length - 1 are in use."""

    def __init__(
        self, config: ModelConfig, limit: int, dtype: torch.dtype = KV_DTYPES[DEFAULT_KV_DTYPE], device: str = "cpu"
    ) -> None:
        """Raises `MemoryBudgetError` if the memory cannot be had."""
        self.limit = limit
        self.length = 0
        panels, shape = _panels(limit), (config.n_layers, config.n_kv_heads)
        try:
            keys = torch.empty((*shape, panels, config.head_dim, PANEL), dtype=dtype, device=device)
            values = torch.empty((*shape, panels * PANEL, _value_width(config)), dtype=dtype, device=device)
        except RuntimeError as error:  # PyTorch's allocator
            raise MemoryBudgetError(f"no memory for a KV cache of {limit} tokens", "give a smaller --ctx") from error
        self.layers = [KeyValues(keys[i], values[i]) for i in range(config.n_layers)]

    def advance(self, count: int) -> None:
        """`count` tokens behind `length` are complete in every layer."""
        self.length += count

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype = KV_DTYPES[DEFAULT_KV_DTYPE]) -> int:
    return config.n_layers * config.n_kv_heads * (config.head_dim + _value_width(config)) * dtype.itemsize


def _panels(tokens: int) -> int:
    return -(-tokens // PANEL)


def _value_width(config: ModelConfig) -> int:
    return _panels(config.head_dim) * PANEL
