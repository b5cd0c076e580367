"""An answer on its way to a terminal or a program: what it was, what it took, how far it is."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mixlocal.cli.options import Globals
from mixlocal.cli.render import PLAIN_PROGRESS_SECONDS, size

if TYPE_CHECKING:
    from mixlocal.app.run_stats import RunStats
    from mixlocal.app.session import Chunk, Session
    from mixlocal.engine.generate import Prefilled
    from mixlocal.engine.params import SamplingParams
    from mixlocal.engine.sampling import Choice

LONG_PROMPT = 128  # tokens to read from which on it is told how far that is


class Answer:
    """Collects what is generated. text: so far, `prefill` included. notes: warnings beside the session's."""

    def __init__(
        self, session: Session, params: SamplingParams, *, prefill: str = "", notes: Sequence[str] = ()
    ) -> None:
        self.session, self.params, self.prefill = session, params, prefill
        self.text = prefill
        self.notes = list(notes)
        self.choices: list[Choice] = []
        self.prompt_tokens: int | None = None
        self.finish = "length"
        self.stats: RunStats | None = None

    def add(self, chunk: Chunk) -> None:
        if chunk.prefilled is not None:
            self.prompt_tokens = chunk.prefilled.total
        choice = self.text_choice(chunk)
        if choice is not None:
            self.choices.append(choice)
        self.text += chunk.text
        self.finish, self.stats = chunk.finish or self.finish, chunk.stats

    def text_choice(self, chunk: Chunk) -> Choice | None:
        """The token behind a chunk, unless it is the end of the answer, which is no part of it."""
        choice = chunk.choice
        return choice if choice is not None and choice.id not in self.session.tokenizer.eos_ids else None

    def summary(self) -> str:
        if self.stats is None:
            return f"interrupted after {len(self.choices)} tokens · seed {self.params.seed}"
        return summary(self.stats, self.params)

    def envelope(self) -> dict[str, Any]:
        """CLI `prompt --json`."""
        body: dict[str, Any] = {
            "id": f"prompt-{secrets.token_hex(8)}", "model": self.session.name, "variant": self.session.variant,
            "prompt_tokens": self.prompt_tokens, "completion_tokens": len(self.choices),
            "finish_reason": self.finish, "text": self.text, "token_ids": [choice.id for choice in self.choices],
            "seed": self.params.seed, "params": asdict(self.params),
        }  # fmt: skip
        if self.params.logprobs:
            body["logprobs"] = [self.logprob(choice) for choice in self.choices]
        stats = self.stats  # None of an interrupted answer
        body["timings"], body["offload"] = (_timings(stats), _offload(stats)) if stats else (None, None)
        return body | {"warnings": [*self.session.warnings, *self.notes]}

    def logprob(self, choice: Choice) -> dict[str, Any]:
        def token(token_id: int, logprob: float) -> dict[str, Any]:
            text = self.session.token_bytes(token_id)
            return {"id": token_id, "token": text.decode(errors="replace"), "bytes": list(text), "logprob": logprob}

        return token(choice.id, choice.logprob) | {"top": [token(*pair) for pair in choice.top]}


def summary(stats: RunStats, params: SamplingParams) -> str:
    """The line after an answer."""
    kept = f" (+{stats.kept_tokens} kept)" if stats.kept_tokens else ""
    load = f"load {stats.load_s:.1f} s · " if not stats.kept_tokens else ""
    return (
        f"prompt {stats.prompt_tokens - stats.kept_tokens} tok{kept} {stats.prompt_tps:.0f} t/s · "
        f"gen {stats.completion_tokens} tok {stats.gen_tps:.1f} t/s · first {stats.ttft_s:.1f} s · {load}"
        f"{_tiers(stats)}RAM {stats.ram_peak / 1e9:.2f} GB · seed {params.seed}"
    )


def details(stats: RunStats) -> str:
    """All figures of an answer, a line each."""
    experts = stats.experts
    rows = [
        ("prompt", f"{stats.prompt_tokens} tokens, {stats.kept_tokens} of them kept from before"),
        ("read", f"{stats.prefill_s:.2f} s, {stats.prompt_tps:.1f} tokens/s"),
        ("first token", f"{stats.ttft_s:.2f} s"),
        ("answer", f"{stats.completion_tokens} tokens, {stats.decode_s:.2f} s, {stats.gen_tps:.1f} tokens/s"),
        ("load", f"{stats.load_s:.2f} s"),
        ("experts", f"{experts.gpu_hits} on the GPU, {experts.ram_hits} in RAM, {experts.disk_hits} on disk"),
        ("disk", f"{size(experts.bytes_read)} read, {experts.stall_s:.2f} s waited"),
        ("RAM", f"{stats.ram_peak / 1e9:.2f} GB at most"),
        *([("VRAM", f"{stats.vram_peak / 1e9:.2f} GB at most")] if stats.vram_peak else []),
    ]
    return "\n".join(f"{name:12}{value}" for name, value in rows)


def _timings(stats: RunStats) -> dict[str, Any]:
    return {
        "load_s": stats.load_s, "ttft_s": stats.ttft_s, "prompt_tps": stats.prompt_tps, "gen_tps": stats.gen_tps
    }  # fmt: skip


def _offload(stats: RunStats) -> dict[str, Any]:
    experts = stats.experts
    return {
        "gpu_hits": experts.gpu_hits, "ram_hits": experts.ram_hits, "disk_hits": experts.disk_hits,
        "bytes_read": experts.bytes_read, "stall_s": experts.stall_s, "copies": experts.copies,
        "prefetch_recall": experts.prefetch_recall, "prefetches": experts.prefetches,
        "prefetches_used": experts.prefetches_used, "ram_peak": stats.ram_peak, "vram_peak": stats.vram_peak,
    }  # fmt: skip


def _tiers(stats: RunStats) -> str:
    """Where experts were found, if not all in memory; how much was read, how long it was waited for, how many of the
    experts that were chosen had been guessed."""
    counts = stats.experts
    if counts.ram_hits == counts.looked_up:
        return ""
    found = (("GPU", counts.gpu_hits), ("RAM", counts.ram_hits), ("disk", counts.disk_hits))
    shares = " ".join(f"{tier} {100 * hits / counts.looked_up:.0f}%" for tier, hits in found if hits)
    guessed = f", guessed {100 * counts.prefetch_recall:.0f}%" if counts.prefetch_recall is not None else ""
    return f"experts {shares}, read {size(counts.bytes_read)}, waited {counts.stall_s:.1f} s{guessed} · "


class PrefillMeter:
    """How far a long prompt is read, on stderr: a line of its own on a terminal, one every 10 s elsewhere."""

    def __init__(self, options: Globals) -> None:
        self._quiet = options.quiet
        self._redraws = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._start = self._said = time.monotonic()
        self._drawn = False

    def show(self, progress: Prefilled) -> None:
        now = time.monotonic()
        if progress.done == progress.kept:
            self._start = self._said = now
        if self._quiet or progress.total - progress.kept < LONG_PROMPT:
            return
        if self._redraws:
            print(f"\r{self._line(progress, now)}\x1b[K", end="", file=sys.stderr, flush=True)
            self._drawn = True
        elif now - self._said >= PLAIN_PROGRESS_SECONDS:
            print(self._line(progress, now), file=sys.stderr, flush=True)
            self._said = now

    def clear(self) -> None:
        """Take the line away: the answer begins."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._drawn = False

    def _line(self, progress: Prefilled, now: float) -> str:
        done, total = progress.done, progress.total
        read = done - progress.kept
        eta = f" · ETA {(now - self._start) / read * (total - done):.0f} s" if read else ""
        return f"reading {done}/{total} tok ({100 * done // total}%){eta}"
