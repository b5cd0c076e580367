"""Which tests `bench` is to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from mixlocal.app.budgets import RunOptions
from mixlocal.errors import UsageError


@dataclass(frozen=True, slots=True)
class BenchTest:
    """n_prompt tokens at once or n_gen one by one (the other is 0), behind n_depth tokens."""

    n_prompt: int
    n_gen: int
    n_depth: int
    n_threads: int

    @property
    def n_tokens(self) -> int:
        return self.n_prompt or self.n_gen

    @property
    def name(self) -> str:
        kind = "pp" if self.n_prompt else "tg"
        return f"{kind}{self.n_tokens}" + (f" @ d{self.n_depth}" if self.n_depth else "")


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """Every combination of the tuples is one test; a 0 in n_prompts or n_gens is none.

    n_prompts, n_gens, n_depths: tokens, 0 or more.  threads, repetitions: 1 or more.
    """

    n_prompts: tuple[int, ...]
    n_gens: tuple[int, ...]
    n_depths: tuple[int, ...]
    threads: tuple[int, ...]
    repetitions: int
    warmup: bool = True

    def __post_init__(self) -> None:
        """Raises `UsageError` for a count out of range, and where no test is left."""
        if min(*self.n_prompts, *self.n_gens, *self.n_depths, 0) < 0 or min(*self.threads, self.repetitions, 1) < 1:
            raise UsageError("a benchmark takes no negative counts, and at least 1 thread and 1 repetition")
        if not self.tests():
            raise UsageError("no test is left: -p and -n are both 0", "for example: mixlocal bench -p 512 -n 128")

    def tests(self) -> tuple[BenchTest, ...]:
        """By depth, then by threads, prompts before generation."""
        kinds = [(count, 0) for count in self.n_prompts] + [(0, count) for count in self.n_gens]
        return tuple(
            BenchTest(prompt, gen, depth, threads)
            for depth in self.n_depths
            for threads in self.threads
            for prompt, gen in kinds
            if prompt or gen
        )

    @property
    def context(self) -> int:
        """Tokens that the longest test puts into the cache."""
        return max(test.n_depth + test.n_tokens for test in self.tests())

    def check_context(self, max_context: int) -> None:
        """Raises `UsageError` naming a test that does not fit a model's context."""
        for test in self.tests():
            needed = test.n_depth + test.n_tokens
            if needed > max_context:
                raise UsageError(
                    f"{test.name} needs a context of {needed} tokens and the model has {max_context}",
                    "give a smaller -p, -n or -d",
                )


SWITCH = {"on": True, "off": False}


def varied(options: RunOptions, vary: str | None) -> tuple[tuple[str, RunOptions], ...]:
    """`options` with each of the values of "ram=6G,8G,12G", each behind what tells it from the others, "ram=6G".

    Raises `UsageError` for what cannot be varied.
    """
    if vary is None:
        return (("", options),)
    name, _, values = vary.partition("=")
    change = VARIABLES.get(name)
    if change is None or not values:
        raise UsageError(
            f"--vary {vary!r} is not of the form NAME=VALUE,...", f"NAME is one of {', '.join(VARIABLES)}"
        )
    try:
        return tuple((f"{name}={value.strip()}", change(options, value.strip())) for value in values.split(","))
    except (ValueError, KeyError) as error:
        raise UsageError(f"--vary {vary!r}: {error} is no value of {name}") from error


VARIABLES: dict[str, Callable[[RunOptions, str], RunOptions]] = {
    "ram": lambda options, value: replace(options, ram=value),
    "kv-dtype": lambda options, value: replace(options, kv_dtype=value),
    "experts-per-token": lambda options, value: replace(options, experts_per_token=int(value)),
    "lookahead": lambda options, value: replace(options, lookahead=SWITCH[value]),
}
