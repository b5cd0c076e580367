"""Logits of the scored half of a chunk, in pieces that memory has room for."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mixlocal.app.quality.divergence import temporary_bytes
from mixlocal.app.quality.text import n_scored, scored
from mixlocal.engine.generate import prefill
from mixlocal.model.kv_cache import KVCache
from mixlocal.model.transformer import Transformer

LOGIT_BYTES = 64 << 20  # of one piece; a vocabulary of 128,000 has 0.5 MB a token


def piece_rows(vocab_size: int, context: int) -> int:
    """Tokens whose logits are there at once."""
    return max(1, min(n_scored(context), LOGIT_BYTES // (4 * vocab_size)))


def scoring_bytes(vocab_size: int, context: int) -> int:
    """What scoring takes beside the model: a piece of its logits, one of the reference's, and what comes of them."""
    return 2 * 4 * vocab_size * piece_rows(vocab_size, context) + temporary_bytes(vocab_size)


def rows_at_once(model: Transformer, context: int) -> int:
    """Rows of a piece of `run_chunk`, but for the last."""
    return min(model.chunk, piece_rows(model.config.vocab_size, context))


def run_chunk(model: Transformer, cache: KVCache, chunk: list[int]) -> Iterator[torch.Tensor | None]:
    """From an empty cache: float32 [some, V] of the scored positions as they come, None behind a piece of the others.

    The last token is not computed: nothing of the chunk comes behind it.
    """
    cache.truncate(0)
    positions = scored(len(chunk))
    for _ in prefill(model, chunk[: positions.start], cache):
        yield None
    rows = rows_at_once(model, len(chunk))
    for start in range(positions.start, positions.stop, rows):
        ids = chunk[start : min(start + rows, positions.stop)]
        yield model.forward(torch.tensor(ids), cache, all_logits=True)
