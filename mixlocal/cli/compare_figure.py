"""The rows of `bench --compare` as a picture: quality against size and against speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixlocal.cli.figures import new_figure
from mixlocal.cli.quality_figure import FOOT, ROOM, Point, add_bits, draw_points, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mixlocal.app.bench_compare import CompareRow

WIDTH, HEIGHT = 13.0, 6.0  # inches


def draw(rows: Sequence[CompareRow]) -> Figure:
    """Rows of one run with quality: divergence on a logarithmic axis where there is a reference, else perplexity."""
    figure = new_figure(WIDTH, HEIGHT)
    size, speed = figure.subplots(1, 2, sharey=True)
    shown = _decoding(rows)
    first, against = shown[0], shown[0].against
    if against:
        size.set_yscale("log", nonpositive="clip")
    size.set(xlabel="GB on disk", ylabel=f"{'mean KL, nats a token' if against else 'perplexity'} (bars: 95 %)")
    size.set_xlim(0, ROOM * max(row.model_size for row in shown) / 1e9)
    add_bits(size, [row.model_n_params for row in shown])
    speed.set(xlabel=f"tokens/s, {first.test}, median of {len(first.samples_ts)} (bars: slowest to fastest)")
    speed.set_xlim(0, ROOM * max(row.max_ts for row in shown))
    for axes in (size, speed):
        axes.margins(y=0.15)
        axes.grid(visible=True, which="major", alpha=0.3)
    title = f"{first.text}, {first.tokens} tokens scored" + (f", against {against}" if against else "")
    figure.suptitle(plain(f"What bits cost, and how fast they are: {title}"), parse_math=False, fontsize=11)
    draw_points(size, [_point(row, row.model_size / 1e9, rows) for row in shown])
    _draw_ranges(speed, shown)
    draw_points(speed, [_point(row, row.median_ts, rows) for row in shown])
    return figure


def _decoding(rows: Sequence[CompareRow]) -> list[CompareRow]:
    """One row of each model: of the first test that generates, or of the first if none does."""
    test = next((row.test for row in rows if row.n_gen), rows[0].test)
    return [row for row in rows if row.test == test]


def _draw_ranges(axes: Axes, rows: Sequence[CompareRow]) -> None:
    """Of the speeds, where `draw_points` will put the points."""
    for row in rows:
        value, _ = _figure(row)
        below, above = row.median_ts - row.min_ts, row.max_ts - row.median_ts
        coordinates = axes.transData if value > 0 else axes.get_xaxis_transform()
        axes.errorbar(
            [row.median_ts], [value if value > 0 else FOOT], xerr=[[below], [above]],
            fmt="none", ecolor="0.55", capsize=4, transform=coordinates,
        )  # fmt: skip


def _point(row: CompareRow, x: float, rows: Sequence[CompareRow]) -> Point:
    """Labelled by what tells it from the others."""
    is_one_model = len({other.model for other in rows}) == 1
    return Point(row.label.removeprefix(f"{row.model}:") if is_one_model else row.label, x, *_figure(row))


def _figure(row: CompareRow) -> tuple[float, float]:
    """What the vertical axis shows, and its error."""
    value, error = (row.mean_kl, row.mean_kl_error) if row.against else (row.perplexity, row.perplexity_error)
    assert value is not None  # rows with quality
    assert error is not None
    return value, error
