"""Keys and values of the tokens seen so far, in pages.

    pool = KVPool(config, pages=512)
    cache = KVCache(pool, limit=4096)
    forward([5, 7, 2])         # length 0 -> 3, and the pool has a page less
    forward([9])               # length 3 -> 4: token 9 attends to positions 0..3
    cache.keep([5, 7, 8, 9])   # length 4 -> 2: what another text begins with need not be computed again
    cache.truncate(0)          # all pages are the pool's again

Room for all pages is set aside at once and takes physical memory only where tokens have been written; pages are given
out lowest first, so that memory follows use.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import torch

from mixlocal.errors import MemoryBudgetError
from mixlocal.kernels import PAGE, PANEL, KeyValues
from mixlocal.model.config import ModelConfig

KV_DTYPES = {"f16": torch.float16, "f32": torch.float32}
DEFAULT_KV_DTYPE = "f16"


class KVPool:
    """`layers[i]` is what layer i reads and writes, for all sequences."""

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype = KV_DTYPES[DEFAULT_KV_DTYPE], device: str = "cpu"
    ) -> None:
        """Raises `MemoryBudgetError` if the memory cannot be had."""
        self.pages = pages
        self._free = list(range(pages))  # a heap
        shape = (config.n_layers, pages, config.n_kv_heads)
        try:
            keys = torch.empty((*shape, PAGE // PANEL, config.head_dim, PANEL), dtype=dtype, device=device)
            values = torch.empty((*shape, PAGE, _value_width(config)), dtype=dtype, device=device)
        except RuntimeError as error:  # PyTorch's allocator
            tokens = pages * PAGE
            raise MemoryBudgetError(f"no memory for a KV cache of {tokens} tokens", "give a smaller --ctx") from error
        self.layers = [KeyValues(keys[i], values[i]) for i in range(config.n_layers)]

    @property
    def free(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def take(self) -> int:
        """A page. Whoever lets sequences in has seen to it that there is one."""
        assert self._free, "a sequence grows beyond what the pool was shared out for"
        return heapq.heappop(self._free)

    def give_back(self, page: int) -> None:
        heapq.heappush(self._free, page)


class KVCache:
    """One sequence. `ids` are the tokens at positions 0 to length - 1, `table` the pages that these lie in, at most
    `limit` positions."""

    def __init__(self, pool: KVPool, limit: int) -> None:
        self.pool, self.limit = pool, limit
        self.ids: list[int] = []
        self._pages: list[int] = []
        self.table = torch.empty(0, dtype=torch.int64)

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def layers(self) -> list[KeyValues]:
        return self.pool.layers

    def make_room(self, count: int) -> None:
        """Pages for `count` more tokens."""
        wanted = page_count(self.length + count)
        if len(self._pages) < wanted:
            while len(self._pages) < wanted:
                self._pages.append(self.pool.take())
            self.table = torch.tensor(self._pages)

    def advance(self, ids: Sequence[int]) -> None:
        """The tokens `ids` behind the last one are complete in every layer."""
        self.ids += ids

    def truncate(self, length: int) -> None:
        del self.ids[length:]
        wanted = page_count(self.length)
        if len(self._pages) > wanted:
            while len(self._pages) > wanted:
                self.pool.give_back(self._pages.pop())
            self.table = torch.tensor(self._pages, dtype=torch.int64)

    def keep(self, ids: Sequence[int]) -> None:
        """Forget all behind what `ids` begins with."""
        same = (n for n, (ours, theirs) in enumerate(zip(self.ids, ids, strict=False)) if ours != theirs)
        self.truncate(next(same, min(self.length, len(ids))))

    def rows(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The keys and then the values of each layer, head by head: [pages of the pool, rows of a page, ...], of which
        `table` tells this sequence's; and how many positions a row holds."""
        for layer in self.layers:
            for head in range(layer.keys.shape[1]):
                yield layer.keys[:, head], PANEL
            for head in range(layer.values.shape[1]):
                yield layer.values[:, head], 1

    def clear_unused(self) -> None:
        """Zero what was never written of the row that the last key lies in."""
        panel, used = divmod(self.length % PAGE, PANEL)
        if used:
            for layer in self.layers:
                layer.keys[self._pages[self.length // PAGE], :, panel, :, used:] = 0


def own_cache(
    config: ModelConfig, limit: int, dtype: torch.dtype = KV_DTYPES[DEFAULT_KV_DTYPE], device: str = "cpu"
) -> KVCache:
    """For one sequence that shares its pool with no other. Raises as `KVPool`."""
    return KVCache(KVPool(config, page_count(limit), dtype, device), limit)


def page_count(tokens: int) -> int:
    return -(-tokens // PAGE)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype = KV_DTYPES[DEFAULT_KV_DTYPE]) -> int:
    return config.n_layers * config.n_kv_heads * (config.head_dim + _value_width(config)) * dtype.itemsize


def _value_width(config: ModelConfig) -> int:
    return -(-config.head_dim // PANEL) * PANEL
