"""Move or compute? An expert in this computer's memory is computed where it lies, or copied to the GPU first.

Both ways run beside each other, so the slower one decides: work is shared out so that its end comes soonest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

SAMPLES = 5


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds, measured on this machine. host_fixed, host_token: of computing one expert on the host, for a token and
    each further one. move: of copying one expert to the GPU and computing it there."""

    host_fixed: float
    host_token: float
    move: float

    def host(self, tokens: int) -> float:
        return self.host_fixed + self.host_token * (tokens - 1)


MOVE_ALL = Costs(math.inf, 0.0, 0.0)  # nothing is computed on the host


def worth_moving(costs: Costs, tokens: Mapping[int, int]) -> list[int]:
    """The keys that are copied; the others stay. tokens: how many chose each key.

    Experts with most tokens first, each goes where it ends sooner: the list-scheduling bound (Graham 1969) is 3/2 of
    the best for two ways.
    """
    host_end = move_end = 0.0
    moved = []
    for key, count in sorted(tokens.items(), key=lambda item: -item[1]):
        if move_end + costs.move < host_end + costs.host(count):
            move_end += costs.move
            moved.append(key)
        else:
            host_end += costs.host(count)
    return moved


def measure_costs(host: Callable[[int], object], move: Callable[[], object], many: int = 33) -> Costs:
    """host(tokens): compute one expert here.  move(): copy one to the GPU, compute a token there and wait for it."""
    one, more = _seconds(lambda: host(1)), _seconds(lambda: host(many))
    return Costs(one, max(0.0, more - one) / (many - 1), _seconds(move))


def _seconds(work: Callable[[], object]) -> float:
    samples = []
    for _ in range(SAMPLES + 1):
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return median(samples[1:])  # the first warms up
