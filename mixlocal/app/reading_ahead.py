"""Tensors of a source one after the other, the next one read while one is used."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import torch

from mixlocal.store.checkpoint import TensorRef, read_tensor


class Weights(Protocol):
    """A complete model on this disk: a config.json, small files beside it, and where its tensors lie."""

    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorRef]: ...


def read_ahead(refs: Sequence[TensorRef], usual: int) -> Iterator[torch.Tensor]:
    """The tensors of `refs`; each may be used until the next is asked for.

    Two buffers serve for all of at most `usual` bytes; the few larger ones get memory of their own.
    """
    buffers = cycle([torch.empty(usual, dtype=torch.uint8) for _ in range(2)])
    with ThreadPoolExecutor(1) as reader:
        reads: deque[Future[torch.Tensor]] = deque()
        for ref in refs:
            reads.append(reader.submit(read_tensor, ref, next(buffers) if ref.nbytes <= usual else None))
            if len(reads) > 1:
                yield reads.popleft().result()
        while reads:
            yield reads.popleft().result()
