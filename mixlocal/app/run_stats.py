"""What one answer took."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixlocal.engine.generate import Prefilled
from mixlocal.experts.runtime import ExpertCounts


@dataclass(frozen=True, slots=True)
class RunStats:
    """Counts and seconds of one answer. ttft_s: from the call to the first token; ram_peak and vram_peak in bytes.

    kept_tokens: of the prompt's, those that an earlier answer left in the KV cache. experts: what the expert runtime
    did meanwhile.
    """

    prompt_tokens: int
    kept_tokens: int
    completion_tokens: int
    load_s: float
    ttft_s: float
    prefill_s: float
    decode_s: float
    ram_peak: int
    vram_peak: int
    experts: ExpertCounts

    @property
    def prompt_tps(self) -> float:
        return (self.prompt_tokens - self.kept_tokens) / self.prefill_s if self.prefill_s else 0.0

    @property
    def gen_tps(self) -> float:
        """Tokens after the first, which the prefill gave."""
        return (self.completion_tokens - 1) / self.decode_s if self.decode_s and self.completion_tokens > 1 else 0.0


class Clock:
    """Collects the figures of one answer."""

    def __init__(self, load_s: float, prompt_tokens: int, counts: ExpertCounts) -> None:
        self._counts, self._before = counts, replace(counts)
        self._load_s, self._prompt_tokens = load_s, prompt_tokens
        self._start = self._prefilled = time.perf_counter()
        self._first: float | None = None
        self._tokens = self._kept = 0

    def prefilled(self, progress: Prefilled) -> None:
        self._kept = progress.kept
        self._prefilled = time.perf_counter()

    def token(self) -> None:
        self._tokens += 1
        self._first = self._first or time.perf_counter()

    def stats(self) -> RunStats:
        now = time.perf_counter()
        first = self._first or now
        return RunStats(
            self._prompt_tokens, self._kept, self._tokens, self._load_s, first - self._start,
            self._prefilled - self._start, now - first, ram_peak(), vram_peak(), self._counts.since(self._before),
        )  # fmt: skip


def vram_peak() -> int:
    """Most GPU memory that this process had at once, in bytes; of the GPU it computes on."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def ram_peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # what getrusage says on Linux may be the parent's, from before this program was started
    return int(status.split("VmHWM:", 1)[1].split(maxsplit=1)[0]) * 1024
