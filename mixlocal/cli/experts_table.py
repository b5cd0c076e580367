"""The figures of `experts` as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mixlocal.cli.render import print_table, safe_text

if TYPE_CHECKING:
    from rich.table import Table

    from mixlocal.app.expert_reading import ExpertFigures, Reading
    from mixlocal.app.expert_usage import Usage
    from mixlocal.cli.options import Globals

LOADS = " ▁▂▃▄▅▆▇█"
SPACED_EXPERTS = 16  # of more, bars have no space between
MOST_SIZES = 16  # of caches shown
# Mixtral 8x7B, lowest and highest of eight texts, in percent: arXiv 2401.04088, Table 5.
MIXTRAL_LAYERS = (0, 15, 31)
MIXTRAL_FIRST_SAME = ((13.6, 14.9), (23.6, 28.4), (19.7, 26.3))
MIXTRAL_SHARED = ((44.9, 49.9), (61.6, 67.0), (44.5, 53.6))


def bars(loads: Sequence[float], highest: float) -> str:
    """One block an expert; a full one is `highest`."""
    blocks = [LOADS[round(load / highest * (len(LOADS) - 1))] for load in loads]
    return (" " if len(blocks) <= SPACED_EXPERTS else "").join(blocks)


def highest_load(usage: Usage) -> float:
    return max(map(max, usage.load))


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def print_figures(options: Globals, reading: Reading, name: str, found: ExpertFigures, layers: Sequence[int]) -> None:
    usage = found.usage
    several = f" in {len(reading.chunks)} pieces of at most {reading.run.context}" if len(reading.chunks) > 1 else ""
    choice = f"{usage.top_k} of {usage.n_experts} experts each"
    print(safe_text(f"{reading.name}, {name}: {usage.tokens} tokens{several}, {choice}"))
    for table in (_layer_table(found, layers), _summary_table(usage)):
        print()
        print_table(options, table)
    print("Mixtral 8x7B's are the lowest and highest of eight texts (arXiv 2401.04088, Table 5).")
    print()
    print_table(options, hit_table(found))
    replayed = found.hits.tokens
    which = "the first" if replayed < usage.tokens else "all"
    print(f"Shares of the choices that were held, of {which} {replayed} tokens one by one, from an empty cache.")


def _layer_table(found: ExpertFigures, layers: Sequence[int]) -> Table:
    usage, router = found.usage, found.router
    table = _table("LAYER", f"LOAD 0 TO {usage.n_experts - 1}", "MOST", "LEAST",
                   "FIRST SAME", "SHARED", "ROUTER BITS", "LOAD BITS", "FORESEEN")  # fmt: skip
    highest = highest_load(usage)
    for layer in layers:
        load, most, least = usage.load[layer], usage.most(layer), usage.least(layer)
        table.add_row(
            str(layer), bars(load, highest), f"{most}: {percent(load[most])}", f"{least}: {percent(load[least])}",
            percent(usage.first_same[layer]), percent(usage.shared[layer]), f"{router.entropy[layer]:.2f}",
            f"{usage.load_entropy[layer]:.2f}", percent(router.recall[layer]),
        )  # fmt: skip
    return table


def _summary_table(usage: Usage) -> Table:
    layers = [f"LAYER {layer}" for layer in MIXTRAL_LAYERS]
    layers[0] = f"MIXTRAL'S {layers[0]}"
    table = _table("CONSECUTIVE TOKENS", "LOWEST", "MEAN", "HIGHEST", "RANDOM", *layers)
    rows = (
        ("same first choice", usage.first_same, usage.random_first_same, MIXTRAL_FIRST_SAME),
        ("first or second shared", usage.shared, usage.random_shared, MIXTRAL_SHARED),
    )
    for title, shares, random, published in rows:
        table.add_row(
            title, percent(min(shares)), percent(sum(shares) / len(shares)), percent(max(shares)), percent(random),
            *(f"{low:.1f} to {high:.1f} %" for low, high in published),
        )  # fmt: skip
    return table


def hit_table(found: ExpertFigures) -> Table:
    hits, usage = found.hits, found.usage
    table = _table("EXPERTS HELD OF A LAYER", "UNIFORM", "LRU", "AGED FREQUENCY")
    step = -(-len(hits.slots) // MOST_SIZES) or 1
    for place in range(step - 1, len(hits.slots), step):
        table.add_row(
            f"{hits.slots[place]} of {usage.n_experts}", percent(hits.uniform[place]), percent(hits.lru[place]),
            percent(hits.aged[place]),
        )  # fmt: skip
    return table


def _table(first: str, *others: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in (first, *others):
        left = heading.startswith("LOAD 0") or (heading == first and heading != "LAYER")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    return table


def as_dict(reading: Reading, name: str, found: ExpertFigures, layers: Sequence[int]) -> dict[str, Any]:
    """Nothing is rounded; what is "by layer" has one entry for each of `layers`."""
    usage, router = found.usage, found.router
    manifest = reading.run.store.manifest

    def chosen(values: Sequence[Any]) -> list[Any]:
        return [values[layer] for layer in layers]

    return {
        "model": manifest.name, "variant": manifest.variant, "text": name, "tokens": usage.tokens,
        "pieces": len(reading.chunks), "ctx": reading.run.context, "pairs": usage.pairs,
        "n_experts": usage.n_experts, "experts_per_token": usage.top_k,
        "layers": list(layers),
        "load": chosen(usage.load),
        "token_share": [[usage.top_k * share for share in usage.load[layer]] for layer in layers],
        "most_used": [usage.most(layer) for layer in layers], "least_used": [usage.least(layer) for layer in layers],
        "first_same": chosen(usage.first_same), "shared": chosen(usage.shared),
        "random": {"first_same": usage.random_first_same, "shared": usage.random_shared},
        "router_entropy": chosen(router.entropy), "load_entropy": chosen(usage.load_entropy),
        "recall": chosen(router.recall), "hits": asdict(found.hits),
    }  # fmt: skip
