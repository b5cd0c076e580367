"""Keys and values of the tokens seen so far, for one sequence.

    cache = KVCache(config, limit=4096)
    forward([5, 7, 2])   # length 0 -> 3
    forward([9])         # length 3 -> 4: token 9 attends to positions 0..3
    cache.truncate(1)    # forget all but the first token

The memory grows by doubling up to `limit`; it never holds more than twice what is in use.
"""

from __future__ import annotations

import torch

from mixlocal.model.config import ModelConfig

FIRST_CAPACITY = 256


class KVCache:
    """float32 [layers, 2, KH, capacity, head_dim]; positions 0 to length - 1 are in use."""

    def __init__(self, config: ModelConfig, limit: int) -> None:
        self.limit = limit
        self.length = 0
        shape = (config.n_layers, 2, config.n_kv_heads, min(FIRST_CAPACITY, limit), config.head_dim)
        self._data = torch.empty(shape)

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens. The caller has checked them against `limit`."""
        needed, capacity = self.length + count, self._data.shape[3]
        assert needed <= self.limit, (needed, self.limit)
        if needed > capacity:
            shape = list(self._data.shape)
            shape[3] = min(max(needed, 2 * capacity), self.limit)
            grown = torch.empty(shape)
            grown[:, :, :, : self.length] = self._data[:, :, :, : self.length]
            self._data = grown

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [KH, T, head_dim] keys and values behind `length`; returns all of them, [KH, length + T, head_dim]."""
        end = self.length + keys.shape[1]
        cached = self._data[layer]
        cached[0, :, self.length : end] = keys
        cached[1, :, self.length : end] = values
        return cached[0, :, :end], cached[1, :, :end]

    def advance(self, count: int) -> None:
        """The last `count` appended tokens are complete in every layer."""
        self.length += count

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


def kv_bytes_per_token(config: ModelConfig) -> int:
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * 4
