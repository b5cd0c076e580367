"""How fast a plan will decode: arithmetic on what was measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from mixlocal.experts.plan import MemoryPlan


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds, of one step in which each of `sequences` sequences gets a token, with all weights in memory.

    layer: of one layer.  rest: of what is outside the layers.  record: of reading one expert from disk and checking
    it; None if that could not be measured.
    """

    sequences: int
    layer: float
    rest: float
    record: float | None


@dataclass(frozen=True, slots=True)
class Look:
    """What a step looks up. experts: distinct ones, of all layers.  found: the share of them that has a slot;
    learnt: from earlier runs; else every expert counts as equally likely.
    """

    n_layers: int
    experts: float
    found: float
    learnt: bool


@dataclass(frozen=True, slots=True)
class Forecast:
    """tokens_per_s of all sequences together. compute_s, disk_s: of one step; what the disk reads is not hidden behind
    the arithmetic but for a little, so they add up."""

    tokens_per_s: float
    compute_s: float
    disk_s: float
    look: Look
    speeds: Speeds


def look_up(plan: MemoryPlan, n_layers: int, top_k: int, hits: float | None) -> Look:
    """hits: the share found in memory when one sequence decodes, where it was learnt."""
    n_experts = plan.n_records // n_layers
    distinct = n_experts * (1 - (1 - top_k / n_experts) ** plan.sequences)
    learnt = hits is not None and plan.sequences == 1
    found = hits if hits is not None and learnt else plan.share
    return Look(n_layers, n_layers * distinct, found, learnt)


def forecast(look: Look, speeds: Speeds) -> Forecast | None:
    """None where reads are needed and their speed is not known."""
    missed = look.experts * (1 - look.found)
    if missed and speeds.record is None:
        return None
    compute = look.n_layers * speeds.layer + speeds.rest
    disk = missed * (speeds.record or 0.0)
    return Forecast(speeds.sequences / (compute + disk), compute, disk, look, speeds)
