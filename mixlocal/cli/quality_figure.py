"""The rows of `quality` as a picture: quality against size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixlocal.cli.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox, Transform
    from numpy.typing import ArrayLike, NDArray

    from mixlocal.app.quality.run import QualityRow

WIDTH, HEIGHT = 9.0, 6.0  # inches
SAME_SIZE = 1e-3  # parameters that differ by less are those of one model
BAR = 1.96  # standard errors: 95 times of 100 the true mean lies within
ROOM = 1.2  # of the horizontal axis, times the largest
FOOT = 0.03  # of the axis' height: where zero is drawn on an axis that has none
# Where a label may stand beside its point, in points; the first that is free is taken.
SIDES = tuple((x, y * rank) for rank in (1, 4, 7) for y in (6, -6) for x in (8, -8))


@dataclass(frozen=True, slots=True)
class Point:
    """x: for example gigabytes on disk. value: a figure, with its standard error."""

    label: str
    x: float
    value: float
    error: float


def draw(rows: Sequence[QualityRow]) -> Figure:
    """Divergence on a logarithmic axis where there is a reference, else perplexity. Rows of the same text."""
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_subplot()
    points = [_point(row, rows) for row in rows]
    against = rows[0].against
    if against:
        axes.set_yscale("log", nonpositive="clip")
    axes.set(xlabel="GB on disk", ylabel=f"{'mean KL, nats a token' if against else 'perplexity'} (bars: 95 %)")
    axes.margins(y=0.15)
    axes.set_xlim(0, ROOM * max(point.x for point in points))
    axes.grid(visible=True, which="major", alpha=0.3)
    add_bits(axes, [8 * row.nbytes / row.bits_per_weight for row in rows])
    title = f"{rows[0].text}, {rows[0].tokens} tokens scored" + (f", against {against}" if against else "")
    axes.set_title(plain(f"What bits cost: {title}"), parse_math=False, pad=14, fontsize=11)
    draw_points(axes, points)
    return figure


def draw_points(axes: Axes, points: Sequence[Point]) -> None:
    above = [point for point in points if point.value > 0]
    axes.errorbar(
        [point.x for point in above], [point.value for point in above],
        yerr=[BAR * point.error for point in above],
        fmt="o", color="tab:blue", ecolor="0.55", capsize=4, markersize=7,
    )  # fmt: skip
    foot = axes.get_xaxis_transform()
    for point in points:
        if point not in above:
            axes.plot([point.x], [FOOT], "v", color="tab:green", markersize=9, transform=foot)
    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]  # it has one
    places: list[Bbox] = []
    for point in points:
        if point in above:
            _label(axes, point.label, (point.x, point.value), "data", places)
        else:
            _label(axes, f"{point.label}: 0", (point.x, FOOT), foot, places)


def _point(row: QualityRow, rows: Sequence[QualityRow]) -> Point:
    """Labelled by what tells it from the others."""
    name = row.variant if len({other.model for other in rows}) == 1 else f"{row.model}:{row.variant}"
    counts = {other.experts_per_token for other in rows}
    experts = f"{row.experts_per_token} expert{'s' if row.experts_per_token > 1 else ''}"
    label = name if len(counts) == 1 else f"{name}, {experts}"
    if row.mean_kl is None or row.mean_kl_error is None:
        return Point(label, row.nbytes / 1e9, row.perplexity, row.perplexity_error)
    return Point(label, row.nbytes / 1e9, row.mean_kl, row.mean_kl_error)


def _label(axes: Axes, text: str, at: tuple[float, float], coordinates: str | Transform, places: list[Bbox]) -> None:
    """Where no other label is and the axes do not end, as far as there is such a place."""
    label = axes.annotate(
        plain(text), at, SIDES[0], xycoords=coordinates, textcoords="offset points", parse_math=False
    )  # fmt: skip
    label.set_in_layout(False)
    for x, y in (*SIDES, SIDES[0]):
        label.set(position=(x, y), ha="left" if x > 0 else "right", va="bottom" if y > 0 else "top")
        box = label.get_window_extent()
        inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
        if inside and not any(box.overlaps(place) for place in places):
            break
    places.append(box)


def add_bits(axes: Axes, parameters: Sequence[float]) -> None:
    """A second scale, where all models are of one number of parameters."""
    import numpy as np

    if max(parameters) - min(parameters) > SAME_SIZE * max(parameters):
        return
    bits = 8e9 / parameters[0]  # a gigabyte's

    def to_bits(gigabytes: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(gigabytes, dtype=np.float64) * bits

    def to_gigabytes(figures: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(figures, dtype=np.float64) / bits

    scale = axes.secondary_xaxis("top", functions=(to_bits, to_gigabytes))
    scale.set_xlabel("bits per weight, of all that is on disk")


def plain(text: str) -> str:
    """What the picture's font surely has."""
    readable = text.encode("ascii", "replace").decode()
    return "".join(character if character.isprintable() else "?" for character in readable)
