"""Several models beside each other: how fast each is, measured in turns, and what its bits cost."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from statistics import median

from mixlocal.app.bench_request import BenchRequest, BenchTest
from mixlocal.app.bench_turns import Turns
from mixlocal.app.budgets import RunOptions
from mixlocal.app.measure import Running
from mixlocal.app.quality.run import QualityJob, QualityRequest, QualityRow, prepare_quality
from mixlocal.errors import UsageError
from mixlocal.store.paths import Home

EXAMPLE = "for example smolmix:q8,smolmix:q4"


@dataclass(frozen=True, slots=True)
class CompareRequest:
    """models: names; the first is the baseline, and one may come twice, which shows the noise. tests: with one number
    of threads. quality: what is measured beside speed, of the models without repetition."""

    models: tuple[str, ...]
    tests: BenchRequest
    quality: QualityRequest | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` for what cannot be compared."""
        if not all(self.models):
            raise UsageError(f"--compare {','.join(self.models)!r} has an empty name", EXAMPLE)
        if len(self.models) < 2:
            raise UsageError("--compare takes two models or more", EXAMPLE)
        if len(self.tests.threads) != 1:
            raise UsageError("--compare takes one number of --threads", "run it once for each")
        if self.quality is not None:
            assert self.quality.models == tuple(dict.fromkeys(self.models))
            assert self.quality.experts_per_token == (None,)


@dataclass(frozen=True, slots=True)
class CompareRow:
    """One test of one model, unrounded; all tests of a model come together.

    label: what tells the model from the others. *_ts: tokens per second, of samples_ts, a sample a round. ratio: median
    of `ratios`, the model's speed over the baseline's in the same round. together: all models were in memory at once;
    else each was loaded for every round. ram_budget: bytes; ram_slots of n_records experts stay in memory.
    bytes_per_token: of weights that generation reads. From bits_per_weight on: see `QualityRow`, all None where quality
    is not measured.
    """

    label: str
    baseline: str
    model: str
    variant: str
    model_size: int
    model_n_params: int
    backend: str
    n_threads: int
    test: str
    n_prompt: int
    n_gen: int
    n_depth: int
    median_ts: float
    min_ts: float
    max_ts: float
    ratio: float
    min_ratio: float
    max_ratio: float
    samples_ts: tuple[float, ...]
    ratios: tuple[float, ...]
    together: bool
    ram_budget: int
    ram_slots: int
    n_records: int
    bytes_per_token: int
    bits_per_weight: float | None
    expert_bits_per_weight: float | None
    text: str | None
    tokens: int | None
    perplexity: float | None
    perplexity_error: float | None
    against: str | None
    mean_kl: float | None
    mean_kl_error: float | None
    median_kl: float | None
    kl_99: float | None
    same_top: float | None
    same_top_error: float | None


OF_QUALITY = (
    "bits_per_weight", "expert_bits_per_weight", "text", "tokens", "perplexity", "perplexity_error", "against",
    "mean_kl", "mean_kl_error", "median_kl", "kl_99", "same_top", "same_top_error",
)  # fmt: skip


def run_compare(request: CompareRequest, options: RunOptions, folders: Home) -> Iterator[Running | CompareRow]:
    """A row for each model and test. All that can be refused is refused before the first model is loaded."""
    return prepare_compare(request, options, folders).run()


def prepare_compare(request: CompareRequest, options: RunOptions, folders: Home) -> CompareJob:
    """Raises `NotFoundError` for a model that is not here, `UsageError` for a test that does not fit a context,
    `MemoryBudgetError` for a model that does not fit even alone, and as `prepare_quality`."""
    turns = Turns(request.models, request.tests, options, folders)
    quality = prepare_quality(request.quality, turns.options, folders) if request.quality else None
    return CompareJob(request, turns, quality)


def _nothing() -> None:
    pass


class CompareJob:
    """Ready to `run`."""

    def __init__(self, request: CompareRequest, turns: Turns, quality: QualityJob | None) -> None:
        self._request, self._turns, self._quality = request, turns, quality

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the models, the baseline's first."""
        return self._turns.labels

    @property
    def warnings(self) -> list[str]:
        """For the user; more may come until the run's end."""
        return [*self._turns.warnings, *(self._quality.warnings if self._quality else ())]

    @property
    def description(self) -> str:
        """What is measured, for people."""
        rounds = self._request.tests.repetitions
        turns = f"{rounds} round{'s' if rounds > 1 else ''} of {', '.join(self.labels)} in turns"
        return f"{turns}; {self._quality.description}" if self._quality else turns

    def run(self, loaded: Callable[[], None] = _nothing) -> Iterator[Running | CompareRow]:
        """Speed first, then quality, a model at a time. loaded: called when models are in memory, before they are
        timed."""
        yield from self._turns.measure(loaded)
        qualities = self._quality.run() if self._quality else iter(())
        found: dict[str, QualityRow | None] = {} if self._quality else dict.fromkeys(self._request.models)
        for place, model in enumerate(self._request.models):
            if model not in found:
                found[model] = yield from _next_row(qualities)
            for test in self._request.tests.tests():
                yield self._row(place, test, found[model])

    def _row(self, place: int, test: BenchTest, quality: QualityRow | None) -> CompareRow:
        turns = self._turns
        model, speeds = turns.models[place], turns.samples[place, test]
        ratios = [speed / base for speed, base in zip(speeds, turns.samples[0, test], strict=True)]
        return CompareRow(
            turns.labels[place], turns.labels[0], model.model, model.variant, model.model_size, model.model_n_params,
            model.backend, test.n_threads, test.name, test.n_prompt, test.n_gen, test.n_depth,
            median_ts=median(speeds), min_ts=min(speeds), max_ts=max(speeds),
            ratio=median(ratios), min_ratio=min(ratios), max_ratio=max(ratios),
            samples_ts=tuple(speeds), ratios=tuple(ratios), together=turns.together,
            ram_budget=model.ram_budget, ram_slots=model.ram_slots, n_records=model.n_records,
            bytes_per_token=model.bytes_per_token,
            **{name: getattr(quality, name) if quality else None for name in OF_QUALITY},
        )  # fmt: skip


def _next_row(events: Iterator[Running | QualityRow]) -> Generator[Running, None, QualityRow]:
    for event in events:
        if isinstance(event, QualityRow):
            return event
        yield event
    raise AssertionError("a row for every model")
