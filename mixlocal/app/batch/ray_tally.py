"""Sums of pulses: over the batches that a worker answers one after another, and over workers."""

from __future__ import annotations

from collections import Counter

from mixlocal.app.batch.engine import Pulse


class Tally:
    """Counts since the last `take`, out of pulses that count from the beginning of an `answer`."""

    def __init__(self) -> None:
        self._last = Pulse()
        self._sum = Pulse()
        self._notes: list[str] = []

    def begin(self) -> None:
        """A new `answer`: its pulses count from zero."""
        self._last = Pulse()

    def add(self, pulse: Pulse) -> None:
        self._sum = plus(self._sum, pulse, self._last)
        self._last = pulse
        if pulse.note:
            self._notes.append(pulse.note)

    def take(self) -> list[Pulse]:
        """The counts, then the notes; both begin anew."""
        taken = [self._sum, *(Pulse(note=note) for note in self._notes)]
        self._sum, self._notes = Pulse(), []
        return taken


def plus(total: Pulse, pulse: Pulse, before: Pulse | None = None) -> Pulse:
    """`total` and what `pulse` counts beyond `before`. running and note are left out."""
    before = before or Pulse()
    found = None
    if total.found is not None or pulse.found is not None:
        counts = Counter(total.found or {})
        counts.update(pulse.found or {})
        counts.subtract(before.found or {})
        found = dict(counts)
    read = total.read + pulse.read - before.read
    return Pulse(0, read, total.generated + pulse.generated - before.generated, found)
