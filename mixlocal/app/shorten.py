"""How much of a text's end fits."""

from __future__ import annotations

from collections.abc import Callable

FIRST_GUESS = 1024


def most_kept(length: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to `length` that `fits`, which may be asked anything up to twice as much; -1 if not even 0.

    For a text's last characters: whatever lies far before what fits is never looked at.
    """
    low, high = -1, min(FIRST_GUESS, length)
    while fits(high):
        if high == length:
            return length
        low, high = high, min(2 * high, length)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
