"""What every benchmark needs: where it is, and how fast this machine reads memory meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

from mixlocal.kernels.isa import chosen_isa, read_bandwidth

BANDWIDTH_BYTES = 1 << 28  # several times the usual last-level cache, and little beside a model


@dataclass(frozen=True, slots=True)
class Running:
    """What is being measured: `done` of `total` tokens or repetitions are over."""

    what: str
    done: int
    total: int


def sample_bandwidth() -> list[float]:
    """Bytes/s read from memory right now, by the threads that `set_threads` set; a first reading warms up.

    One sample, or none where there are no compiled kernels to read with.
    """
    return read_bandwidth(BANDWIDTH_BYTES, 2)[1:] if chosen_isa() else []
