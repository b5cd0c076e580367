"""The figures of `experts` as a picture."""

from __future__ import annotations

from math import log2
from typing import TYPE_CHECKING

from mixlocal.cli.experts_table import MIXTRAL_FIRST_SAME, MIXTRAL_LAYERS, MIXTRAL_SHARED, highest_load
from mixlocal.cli.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from mixlocal.app.expert_caches import CacheHits
    from mixlocal.app.expert_reading import ExpertFigures
    from mixlocal.app.expert_usage import RouterFigures, Usage

WIDTH, HEIGHT = 13.0, 12.0  # inches
ROOM = 1.3
FIRST, SHARED, PLAIN = "tab:blue", "tab:orange", "0.45"


def draw(found: ExpertFigures, title: str) -> Figure:
    """The load as a heat map; beside it what consecutive tokens share, what routers tell, and what caches hold."""
    figure = new_figure(WIDTH, HEIGHT)
    places = figure.add_gridspec(4, 2, width_ratios=(1.0, 1.15), height_ratios=(1.35, 1.0, 1.0, 1.35))
    _load(figure, figure.add_subplot(places[:, 0]), found.usage)
    _shared(figure.add_subplot(places[0, 1]), found.usage)
    _foreseen(figure.add_subplot(places[1, 1]), found.router, found.usage)
    _entropy(figure.add_subplot(places[2, 1]), found.router, found.usage)
    _hits(figure.add_subplot(places[3, 1]), found.hits)
    readable = f"{title}: {found.usage.tokens} tokens".encode("ascii", "replace").decode()
    figure.suptitle("".join(c if c.isprintable() else "?" for c in readable), parse_math=False, fontsize=13)
    return figure


def _load(figure: Figure, axes: Axes, usage: Usage) -> None:
    percents = [[100 * share for share in row] for row in usage.load]
    image = axes.imshow(percents, aspect="auto", vmin=0, vmax=100 * highest_load(usage), interpolation="nearest")
    axes.set(title="Load: each expert's share of a layer's choices", xlabel="expert", ylabel="layer")
    _count_in_wholes(axes.xaxis)
    _count_in_wholes(axes.yaxis)
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.9, pad=0.02)
    bar.set_label(f"% of choices; an even load is {100 / usage.n_experts:.1f} %")


def _shared(axes: Axes, usage: Usage) -> None:
    last = len(usage.load) - 1
    rows = (
        ("first or second choice shared", usage.shared, usage.random_shared, MIXTRAL_SHARED, SHARED),
        ("same first choice", usage.first_same, usage.random_first_same, MIXTRAL_FIRST_SAME, FIRST),
    )
    for label, shares, random, published, colour in rows:
        axes.plot([100 * share for share in shares], color=colour, marker=".", label=label)
        axes.axhline(100 * random, color=colour, linestyle=":", label=f"random: {100 * random:.1f} %")
        where = [layer / MIXTRAL_LAYERS[-1] * last for layer in MIXTRAL_LAYERS]
        lows, highs = zip(*published, strict=True)
        axes.vlines(where, lows, highs, color=colour, alpha=0.35, linewidth=9)
    axes.set(title="Consecutive tokens", ylabel="% of pairs")
    axes.text(
        0.01, 0.02, "broad bars: Mixtral 8x7B, layers 0, 15 and 31 of 32 (arXiv 2401.04088, Table 5)",
        transform=axes.transAxes, fontsize=8, color=PLAIN,
    )  # fmt: skip
    _finish_layers(axes, usage, 100)


def _foreseen(axes: Axes, router: RouterFigures, usage: Usage) -> None:
    known = [(layer, 100 * share) for layer, share in enumerate(router.recall) if share is not None]
    axes.plot([layer for layer, _ in known], [share for _, share in known], color=FIRST, marker=".", label="foreseen")
    chance = 100 * usage.top_k / usage.n_experts
    axes.axhline(chance, color=FIRST, linestyle=":", label=f"random: {chance:.1f} %")
    axes.set(title="Next-layer prediction: choices that were foreseen a layer early", ylabel="% of choices")
    _finish_layers(axes, usage, 100)


def _entropy(axes: Axes, router: RouterFigures, usage: Usage) -> None:
    most = log2(usage.n_experts)
    axes.plot(router.entropy, color=FIRST, marker=".", label="router's probabilities, mean of the tokens")
    axes.plot(usage.load_entropy, color=SHARED, marker=".", label="load")
    axes.axhline(most, color=PLAIN, linestyle=":", label=f"none preferred: {most:.1f}")
    axes.set(title="Entropy", ylabel="bits")
    _finish_layers(axes, usage, most)


def _hits(axes: Axes, hits: CacheHits) -> None:
    for label, shares, style, colour in (
        ("aged frequency, one pool for all layers", hits.aged, "o-", FIRST),
        ("LRU by layer", hits.lru, "s-", SHARED),
        ("uniform", hits.uniform, ":", PLAIN),
    ):
        axes.plot(hits.slots, [100 * share for share in shares], style, color=colour, label=label)
    axes.set(title=f"Cache hits: {hits.tokens} tokens one by one, from an empty cache", ylabel="% of choices",
             xlabel="experts held of a layer")  # fmt: skip
    _count_in_wholes(axes.xaxis)
    _finish(axes, 100)


def _count_in_wholes(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=16))


def _finish_layers(axes: Axes, usage: Usage, most: float) -> None:
    axes.set(xlabel="layer", xlim=(-0.5, len(usage.load) - 0.5))
    _count_in_wholes(axes.xaxis)
    _finish(axes, most)


def _finish(axes: Axes, most: float) -> None:
    """Above `most` there is room for the legend."""
    axes.set_ylim(0, ROOM * most)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= most])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=4, loc="upper center")
