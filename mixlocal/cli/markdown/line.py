"""A line of Markdown of which the beginning has arrived."""

from __future__ import annotations

from dataclasses import dataclass


class OpenLineError(Exception):
    """What the line means depends on characters that have not arrived."""


@dataclass
class Line:
    """A cursor that never sees the end of what has arrived, unless the line ends there.

    So what is decided about a line does not depend on how much of it was there.
    """

    text: str
    is_complete: bool
    at: int = 0

    def peek(self, ahead: int = 0) -> str:
        """The character `ahead` of the cursor; "" at the end of the line."""
        if self.at + ahead < len(self.text):
            return self.text[self.at + ahead]
        if self.is_complete:
            return ""
        raise OpenLineError

    def spaces(self) -> int:
        """How many follow."""
        return self.run(" ")

    def run(self, sign: str, ahead: int = 0) -> int:
        """How many of one sign follow."""
        start = self.at + ahead
        count = len(self.text) - start - len(self.text[start:].lstrip(sign))
        self.peek(ahead + count)
        return count

    def rest(self, longest: int | None = None) -> str | None:
        """What follows, once it is complete; None where it is longer than `longest`."""
        if longest is not None and len(self.text) - self.at > longest:
            return None
        if not self.is_complete:
            raise OpenLineError
        return self.text[self.at :]
