"""What `bench --compare` shows of its rows: in a Markdown table a line for each model, in CSV and JSON all there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixlocal.cli.render import size
from mixlocal.cli.report import Column, Report, report

if TYPE_CHECKING:
    from mixlocal.app.bench_compare import CompareRequest, CompareRow

NOTHING = "-"
BASELINE = "baseline"


@dataclass(frozen=True, slots=True)
class ComparedModel:
    """All tests of one model."""

    tests: tuple[CompareRow, ...]

    @property
    def any(self) -> CompareRow:
        """For what is the same in all."""
        return self.tests[0]


def compare_report(output: str, labels: Sequence[str], request: CompareRequest) -> Report[CompareRow]:
    """labels: of the models, the baseline's first."""
    return _Lines(labels, request) if output == "md" else report(output, [])


class _Lines:
    def __init__(self, labels: Sequence[str], request: CompareRequest) -> None:
        self._lines = report("md", _columns(labels, request))
        self._count = len(request.tests.tests())
        self._tests: list[CompareRow] = []

    def add(self, row: CompareRow) -> None:
        self._tests.append(row)
        if len(self._tests) == self._count:
            self._lines.add(ComparedModel(tuple(self._tests)))
            self._tests.clear()

    def end(self) -> None:
        self._lines.end()


def _columns(labels: Sequence[str], request: CompareRequest) -> list[Column[ComparedModel]]:
    speeds = [_speed(place, test.name) for place, test in enumerate(request.tests.tests())]
    return [
        Column("model", lambda model: model.any.label, max(map(len, labels)), right=False),
        Column("size", lambda model: size(model.any.model_size), 7),
        *(_bits() if request.quality else ()),
        *(column for pair in speeds for column in pair),
        *(_quality() if request.quality else ()),
        *(_divergence() if request.quality and request.quality.against else ()),
    ]


def _speed(place: int, test: str) -> tuple[Column[ComparedModel], Column[ComparedModel]]:
    def speed(model: ComparedModel) -> str:
        row = model.tests[place]
        return f"{_pace(row.median_ts)} ({_pace(row.min_ts)} to {_pace(row.max_ts)})"

    def ratio(model: ComparedModel) -> str:
        row = model.tests[place]
        if row.label == row.baseline:
            return BASELINE
        return f"{row.ratio:.3f} ({row.min_ratio:.3f} to {row.max_ratio:.3f})"

    return Column(f"{test} t/s", speed, 26), Column("times baseline", ratio, 22)


def _pace(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.{2 if tokens_per_s < 1000 else 0}f}"


def _bits() -> list[Column[ComparedModel]]:
    return [
        Column("bits/weight", lambda model: f"{_present(model.any.bits_per_weight):.2f}"),
        Column("of experts", lambda model: f"{_present(model.any.expert_bits_per_weight):.2f}"),
    ]


def _quality() -> list[Column[ComparedModel]]:
    return [_with_error("perplexity", lambda row: row.perplexity, lambda row: row.perplexity_error, "{:.3f}")]


def _divergence() -> list[Column[ComparedModel]]:
    return [
        _with_error("mean KL", lambda row: row.mean_kl, lambda row: row.mean_kl_error, "{:.5f}"),
        _with_error("same top %", lambda row: row.same_top, lambda row: row.same_top_error, "{:.2f}", 100),
    ]


Figure = Callable[["CompareRow"], "float | None"]


def _with_error(title: str, value: Figure, error: Figure, form: str, times: float = 1) -> Column[ComparedModel]:
    def cell(model: ComparedModel) -> str:
        return " ± ".join(form.format(times * _present(figure(model.any))) for figure in (value, error))

    return Column(title, cell, 2 * len(form.format(times * 0.5)) + 4)  # the sign, and a digit more


def _present(figure: float | None) -> float:
    assert figure is not None  # these columns are shown where quality is measured
    return figure
