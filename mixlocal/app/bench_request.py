"""Which tests `bench` is to run."""

from __future__ import annotations

from dataclasses import dataclass

from mixlocal.errors import UsageError
from mixlocal.model.kv_cache import DEFAULT_KV_DTYPE


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
    kv_dtype: str = DEFAULT_KV_DTYPE
    ram: int | None = None

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
