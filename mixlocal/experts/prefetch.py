"""Lookahead: this layer's hidden state put through the next layer's gate tells most of the experts it will choose.

A guess that is read ahead and right hides a part of a read; a wrong one keeps the disk from what is needed. Which
weighs more depends on the machine, so it is tried: passes with and without it in turns, and the faster way is kept for
a while.
"""

from __future__ import annotations

from statistics import median

BLOCK = 8  # passes of one kind in a row
PAIRS = 6  # blocks of each kind in a trial
HELD = 512  # passes between two trials
GAIN = 0.98  # share of the time without it that it must stay below


class Lookahead:
    """Decides pass by pass. Passes of several tokens use nearly every expert, so there it is always worth it."""

    def __init__(self, wanted: bool) -> None:
        """wanted False: never."""
        self._wanted = wanted
        self._tokens, self._passes = 1, 0
        self._seconds: dict[bool, list[float]] = {True: [0.0], False: [0.0]}
        self._kept: bool | None = None  # the last trial's outcome; None: a trial is going on

    @property
    def on(self) -> bool:
        """Whether to look ahead in this pass."""
        if not self._wanted or self._tokens > 1:
            return self._wanted
        return self._kept if self._kept is not None else self._passes // BLOCK % 2 == 0

    def begin(self, tokens: int) -> None:
        """A pass of so many tokens begins."""
        self._tokens = tokens

    def end(self, seconds: float) -> None:
        """The pass took so long."""
        if self._tokens > 1 or not self._wanted:
            return
        if self._kept is None:
            self._seconds[self.on][-1] += seconds
        self._passes += 1
        if self._kept is not None:
            if self._passes == HELD:
                self._kept, self._passes = None, 0
        elif self._passes == 2 * BLOCK * PAIRS:
            tried, plain = (median(self._seconds[on]) for on in (True, False))
            self._kept, self._passes = tried < GAIN * plain, 0
            self._seconds = {True: [0.0], False: [0.0]}
        elif self._passes % (2 * BLOCK) == 0:
            for blocks in self._seconds.values():
                blocks.append(0.0)
