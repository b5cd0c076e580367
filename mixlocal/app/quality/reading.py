"""A model that reads its text."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mixlocal.app.measure import Running
from mixlocal.app.quality.scoring import run_chunk
from mixlocal.app.quality.subject import Subject
from mixlocal.app.quality.text import scored
from mixlocal.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Piece:
    """Of the scored rows of a chunk those from `first` on: logits float32 [T, V], the tokens behind them int64 [T].
    last: none is behind them."""

    chunk: int
    first: int
    logits: torch.Tensor
    targets: torch.Tensor
    last: bool


class Reading:
    """warnings: of loading; seconds: that the text took, both when `pieces` has come to its end."""

    def __init__(self, subject: Subject, label: str) -> None:
        self._subject, self._label = subject, label
        self.warnings: tuple[str, ...] = ()
        self.seconds = 0.0

    def pieces(self, numbers: range) -> Iterator[Running | Piece]:
        """Load it, read the chunks, free it. Raises `RefusedError` for logits that are no numbers."""
        yield Running(f"loading {self._label}", 0, 1)
        run = self._subject.run()
        model = run.load()
        self.warnings = run.warnings
        context = self._subject.chunks.context
        cache = run.new_cache(context)
        total = len(numbers) * (context - 1)
        start = time.perf_counter()
        try:
            for done, number in enumerate(numbers):
                chunk, first = self._subject.chunks.chunk(number), scored(context).start
                for logits in run_chunk(model, cache, chunk):
                    yield Running(f"{self._label}: tokens", done * (context - 1) + cache.length, total)
                    if logits is not None:
                        yield self._piece(number, chunk, first, logits)
                        first += len(logits)
        finally:
            self.seconds = time.perf_counter() - start
            model.experts.close()  # what a text that was not asked for chooses is not learnt
            del model, run, cache
            gc.collect()  # its memory is the next one's

    def _piece(self, number: int, chunk: list[int], position: int, logits: torch.Tensor) -> Piece:
        if not bool(logits.isfinite().all()):
            raise RefusedError(f"{self._label} computes logits that are no numbers", "mixlocal verify checks its files")
        behind = position + len(logits)
        positions = scored(len(chunk))
        targets = torch.tensor(chunk[position + 1 : behind + 1])
        return Piece(number, position - positions.start, logits, targets, behind == positions.stop)
