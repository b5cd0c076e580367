"""Keys and values of the tokens seen so far, for one sequence.

    cache = KVCache(config, limit=4096)
    forward([5, 7, 2])         # length 0 -> 3
    forward([9])               # length 3 -> 4: token 9 attends to positions 0..3
    cache.keep([5, 7, 8, 9])   # length 4 -> 2: what another text begins with need not be computed again

Room for `limit` tokens is set aside at once and takes physical memory only where tokens have been written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from mixlocal.errors import MemoryBudgetError
from mixlocal.kernels import PANEL, KeyValues
from mixlocal.model.config import ModelConfig

KV_DTYPES = {"f16": torch.float16, "f32": torch.float32}
DEFAULT_KV_DTYPE = "f16"


class KVCache:
    """`layers[i]` is what layer i reads and writes; `ids` are the tokens at positions 0 to length - 1."""

    def __init__(
        self, config: ModelConfig, limit: int, dtype: torch.dtype = KV_DTYPES[DEFAULT_KV_DTYPE], device: str = "cpu"
    ) -> None:
        """Raises `MemoryBudgetError` if the memory cannot be had."""
        self.limit = limit
        self.ids: list[int] = []
        panels, shape = _panels(limit), (config.n_layers, config.n_kv_heads)
        try:
            keys = torch.empty((*shape, panels, config.head_dim, PANEL), dtype=dtype, device=device)
            values = torch.empty((*shape, panels * PANEL, _value_width(config)), dtype=dtype, device=device)
        except RuntimeError as error:  # PyTorch's allocator
            raise MemoryBudgetError(f"no memory for a KV cache of {limit} tokens", "give a smaller --ctx") from error
        self.layers = [KeyValues(keys[i], values[i]) for i in range(config.n_layers)]

    @property
    def length(self) -> int:
        return len(self.ids)

    def advance(self, ids: Sequence[int]) -> None:
        """The tokens `ids` behind the last one are complete in every layer."""
        self.ids += ids

    def truncate(self, length: int) -> None:
        del self.ids[length:]

    def rows(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The keys and then the values of each layer, head by head, contiguous along the tokens; and how many tokens a
        row holds."""
        for layer in self.layers:
            yield from ((keys, PANEL) for keys in layer.keys)
            yield from ((values, 1) for values in layer.values)

    def clear_unused(self) -> None:
        """Zero what was never written of the row that the last key lies in."""
        for layer in self.layers:
            layer.keys[:, self.length // PANEL : _panels(self.length), :, self.length % PANEL :] = 0

    def keep(self, ids: Sequence[int]) -> None:
        """Forget all behind what `ids` begins with."""
        same = (n for n, (ours, theirs) in enumerate(zip(self.ids, ids, strict=False)) if ours != theirs)
        self.truncate(next(same, min(self.length, len(ids))))


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype = KV_DTYPES[DEFAULT_KV_DTYPE]) -> int:
    return config.n_layers * config.n_kv_heads * (config.head_dim + _value_width(config)) * dtype.itemsize


def _panels(tokens: int) -> int:
    return -(-tokens // PANEL)


def _value_width(config: ModelConfig) -> int:
    return _panels(config.head_dim) * PANEL
