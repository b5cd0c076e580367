"""Keys and values of the tokens seen so far, for one sequence.

    cache = KVCache(config, limit=4096)
    forward([5, 7, 2])   # length 0 -> 3
    forward([9])         # length 3 -> 4: token 9 attends to positions 0..3
    cache.truncate(1)    # forget all but the first token

The memory grows by doubling up to `limit`; it never holds more than twice what is in use.
"""

from __future__ import annotations

import torch

from mixlocal.kernels import PANEL, KeyValues
from mixlocal.model.config import ModelConfig

FIRST_CAPACITY = 256
KV_DTYPES = {"f16": torch.float16, "f32": torch.float32}
DEFAULT_KV_DTYPE = "f16"


class KVCache:
    """`layers[i]` is what layer i reads and writes; positions 0 to length - 1 are in use."""

    def __init__(self, config: ModelConfig, limit: int, dtype: torch.dtype = KV_DTYPES[DEFAULT_KV_DTYPE]) -> None:
        self.limit = limit
        self.length = 0
        self.layers: list[KeyValues] = []
        self._config, self._dtype = config, dtype
        self._capacity = 0
        self._grow(min(FIRST_CAPACITY, limit))

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens. The caller has checked them against `limit`."""
        needed = self.length + count
        assert needed <= self.limit, (needed, self.limit)
        if needed > self._capacity:
            self._grow(min(max(needed, 2 * self._capacity), self.limit))

    def advance(self, count: int) -> None:
        """`count` tokens behind `length` are complete in every layer."""
        self.length += count

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def _grow(self, capacity: int) -> None:
        config, panels = self._config, _panels(capacity)
        shape = (config.n_layers, config.n_kv_heads)
        keys = torch.empty((*shape, panels, config.head_dim, PANEL), dtype=self._dtype)
        values = torch.empty((*shape, panels * PANEL, _value_width(config)), dtype=self._dtype)
        used = _panels(self.length)
        for i, old in enumerate(self.layers):
            keys[i, :, :used] = old.keys[:, :used]
            values[i, :, : self.length] = old.values[:, : self.length]
        self.layers = [KeyValues(keys[i], values[i]) for i in range(config.n_layers)]
        self._capacity = panels * PANEL


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype = KV_DTYPES[DEFAULT_KV_DTYPE]) -> int:
    return config.n_layers * config.n_kv_heads * (config.head_dim + _value_width(config)) * dtype.itemsize


def _panels(tokens: int) -> int:
    return -(-tokens // PANEL)


def _value_width(config: ModelConfig) -> int:
    return _panels(config.head_dim) * PANEL
