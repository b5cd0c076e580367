"""How tokens are to be chosen. Apart from what chooses them, so that a command line is judged without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from mixlocal.errors import UsageError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. These defaults are the only ones.

    temperature 0: always the likeliest token.  top_k 0, top_p 1, min_p 0, repeat_penalty 1: off.
    seed None: the caller draws one.  stop: strings that end the answer and are not part of it.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0

    def __post_init__(self) -> None:
        """Raises `UsageError` naming the value out of range."""
        _within("temperature", self.temperature, 0, 100)
        _within("top-p", self.top_p, 0, 1)
        _within("top-k", self.top_k, 0, 1 << 24)
        _within("min-p", self.min_p, 0, 1)
        _within("repeat-penalty", self.repeat_penalty, 0.01, 100)
        _within("max-tokens", self.max_tokens, 0, 1 << 31)
        _within("seed", self.seed or 0, 0, (1 << 63) - 1)
        _within("logprobs", self.logprobs, 0, 100)
        if "" in self.stop:
            raise UsageError("stop: an empty string would stop at once")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also catches NaN
        raise UsageError(f"{name} = {value} is outside {low} to {high}")
