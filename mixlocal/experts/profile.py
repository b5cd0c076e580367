"""What was learnt about a model's routing, kept from one run to the next: a small file, and only advice.

It holds averages and no sequence of choices, from which a text could be guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from mixlocal.experts.policies import AgedFrequency, Floats
from mixlocal.experts.residency import Residency
from mixlocal.experts.trace import RoutedStep, RoutingTrace, hit_rate, mean_rates
from mixlocal.store.durable import make_folder, write_file
from mixlocal.store.strict_json import MAX_BYTES

FORMAT = 1
SHARES = (0.25, 0.5, 0.75)  # of all experts in memory, for which hits are kept
SETTLED_TOKENS = 4096  # of so many an average is kept; what comes later moves it slowly
SURE_TOKENS = 1024  # of so many, hits are taken for known: to find them anew would cost every exit a fifth of a second
SIMULATED_TOKENS = 64
FEWEST_TOKENS = 32


class RoutingProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """rates[layer][expert]: share of tokens that chose it.  hits: aged frequency's at `SHARES`; empty: not known."""

    format: int
    tokens: int
    rates: tuple[tuple[float, ...], ...]
    hits: tuple[float, ...] = ()

    def array(self) -> Floats:
        return np.array(self.rates)

    def hottest(self) -> list[int]:
        """All keys, the most used first; of equally used ones, one of each layer in turns."""
        rates = self.array().T
        experts, layers = np.divmod(np.argsort(-rates, axis=None, kind="stable"), rates.shape[1])
        keys: list[int] = (layers * rates.shape[0] + experts).tolist()
        return keys

    def expected_hits(self, share: float) -> float | None:
        """Share of an answer's expert look-ups found when `share` of all experts is in memory; None: not known."""
        if not self.hits:
            return None
        return float(np.interp(share, (0.0, *SHARES, 1.0), (0.0, *self.hits, 1.0)))


def load_profile(path: Path, n_layers: int, n_experts: int) -> RoutingProfile | None:
    """None where there is none for a model of this shape; a damaged one is written anew at the next exit."""
    try:
        with path.open("rb") as file:
            profile = msgspec.json.decode(file.read(MAX_BYTES), type=RoutingProfile)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    shaped = len(profile.rates) == n_layers and all(len(row) == n_experts for row in profile.rates)
    sane = all(0 <= rate <= 1 for row in profile.rates for rate in row) and all(0 <= hit <= 1 for hit in profile.hits)
    whole = profile.format == FORMAT and profile.tokens > 0 and len(profile.hits) in (0, len(SHARES))
    return profile if shaped and sane and whole else None


def save_profile(path: Path, profile: RoutingProfile) -> None:
    make_folder(path.parent)
    write_file(path, msgspec.json.encode(profile))


def learn(trace: RoutingTrace, before: RoutingProfile | None) -> RoutingProfile | None:
    """`before` with what `trace` adds to it; None if that is too little to be worth a file."""
    steps = trace.steps()
    rates, tokens = mean_rates(steps, trace.n_layers, trace.n_experts)
    if tokens < FEWEST_TOKENS:
        return None
    hits = before.hits if before else ()
    if before is not None:
        old = min(before.tokens, SETTLED_TOKENS)
        rates, tokens = (before.array() * old + rates * tokens) / (old + tokens), old + tokens
    if not hits or tokens < SURE_TOKENS:
        hits = _hits([step for step in steps if step.tokens == 1], rates) or hits
    rounded = tuple(tuple(round(rate, 5) for rate in row) for row in rates.tolist())
    return RoutingProfile(FORMAT, min(tokens, SETTLED_TOKENS), rounded, hits)


def _hits(steps: Sequence[RoutedStep], rates: Floats) -> tuple[float, ...]:
    n_layers, n_experts = rates.shape
    if len(steps) < n_layers * FEWEST_TOKENS:
        return ()
    steps = steps[-n_layers * SIMULATED_TOKENS :]
    keys = np.argsort(-rates, axis=None, kind="stable").tolist()
    found = []
    for share in SHARES:
        policy = AgedFrequency(n_layers, n_experts, rates)
        residency = Residency(n_layers, n_experts, max(n_experts, round(share * rates.size)), policy)
        found.append(round(hit_rate(steps, residency, policy, keys), 4))
    return tuple(found)
