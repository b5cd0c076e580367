"""What `quality` shows of its rows in a Markdown table; the others of their figures are in CSV and JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mixlocal.cli.render import size
from mixlocal.cli.report import Column

if TYPE_CHECKING:
    from mixlocal.app.quality.run import QualityJob, QualityRequest, QualityRow


def columns(job: QualityJob, request: QualityRequest) -> list[Column[QualityRow]]:
    several = request.experts_per_token != (None,)
    return [
        Column("model", lambda row: f"{row.model}:{row.variant}", max(map(len, job.names)), right=False),
        *([Column("experts/token", lambda row: str(row.experts_per_token))] if several else []),
        Column("size", lambda row: size(row.nbytes), 7),
        Column("bits/weight", lambda row: f"{row.bits_per_weight:.2f}"),
        Column("of experts", lambda row: f"{row.expert_bits_per_weight:.2f}"),
        Column("perplexity", lambda row: f"{row.perplexity:.3f} ± {row.perplexity_error:.3f}", 15),
        *(_divergence() if request.against else ()),
    ]


def _divergence() -> list[Column[QualityRow]]:
    return [
        _with_error("ln ratio", lambda row: row.log_ratio, lambda row: row.log_ratio_error, "{:.5f}"),
        _with_error("mean KL", lambda row: row.mean_kl, lambda row: row.mean_kl_error, "{:.5f}"),
        _nats("median KL", lambda row: row.median_kl),
        _nats("99 % KL", lambda row: row.kl_99),
        _nats("max KL", lambda row: row.max_kl),
        _with_error("same top %", lambda row: row.same_top, lambda row: row.same_top_error, "{:.2f}", 100),
        _with_error("RMS dp %", lambda row: row.rms_dp, lambda row: row.rms_dp_error, "{:.2f}", 100),
        Column("of REF's top", lambda row: f"{100 * _present(row.rms_top_dp):.2f}"),
    ]


Figure = Callable[["QualityRow"], "float | None"]


def _nats(title: str, value: Figure) -> Column[QualityRow]:
    return Column(title, lambda row: f"{_present(value(row)):.5f}", 7)


def _with_error(title: str, value: Figure, error: Figure, form: str, times: float = 1) -> Column[QualityRow]:
    def cell(row: QualityRow) -> str:
        return " ± ".join(form.format(times * _present(figure)) for figure in (value(row), error(row)))

    return Column(title, cell, 2 * len(form.format(times * 0.5)) + 4)  # a sign


def _present(figure: float | None) -> float:
    assert figure is not None  # these columns are shown with a reference only
    return figure
