"""Which runs of "*", "_" and "~" open and close emphasis: CommonMark's rules for one run after the other."""

from __future__ import annotations

from dataclasses import dataclass

from markdown_it.common.utils import isPunctChar, isWhiteSpace


@dataclass
class Run:
    """Delimiters of one sign in a row. left: how many have no partner yet."""

    sign: str
    length: int
    opens: bool
    closes: bool
    left: int

    @classmethod
    def between(cls, before: str, sign: str, length: int, after: str) -> Run:
        """before, after: the neighbours; "" at the ends of the text"""
        is_left = not is_space(after) and (not is_punctuation(after) or is_space(before) or is_punctuation(before))
        is_right = not is_space(before) and (not is_punctuation(before) or is_space(after) or is_punctuation(after))
        opens, closes = is_left, is_right
        if sign == "_":  # not within a word
            opens = is_left and (not is_right or is_punctuation(before))
            closes = is_right and (not is_left or is_punctuation(after))
        return cls(sign, length, opens, closes, length)

    def pairs_with(self, closer: Run) -> bool:
        """The "multiple of 3" rule."""
        if (self.closes or closer.opens) and (self.length + closer.length) % 3 == 0:
            return self.length % 3 == 0 and closer.length % 3 == 0
        return True


class Emphasis:
    """What a first run opens, until it is closed."""

    def __init__(self, first: Run) -> None:
        self._first = first
        self._openers = [first]

    def is_closed_by(self, run: Run) -> bool:
        """Whether the next run is the last partner of the first."""
        index = len(self._openers) - 1 if run.closes else -1
        while run.left and index >= 0:
            opener = self._openers[index]
            if opener.pairs_with(run) and (run.sign != "~" or min(opener.left, run.left) > 1):
                used = min(2, opener.left, run.left)
                opener.left -= used
                run.left -= used
                del self._openers[index + (1 if opener.left else 0) :]
                if not opener.left:
                    index -= 1
            else:
                index -= 1
        if run.opens and run.left:
            self._openers.append(run)
        return not self._first.left


def is_space(character: str) -> bool:
    return not character or isWhiteSpace(ord(character))


def is_punctuation(character: str) -> bool:
    return bool(character) and isPunctChar(character)


def stand_in(character: str) -> str:
    """A plain character of the same class."""
    return " " if is_space(character) else "." if is_punctuation(character) else "a"
