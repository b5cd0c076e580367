"""The small machines that a stream of tokens needs: one makes whole characters, one finds stop strings, one is both."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from mixlocal.app.tokenizer import Tokenizer
from mixlocal.errors import UsageError

_LONE_BYTE = re.compile("[\udc80-\udcff]")  # what the error handler `surrogateescape` makes of one malformed byte


class TextStream:
    """Token ids in, text out, as soon as a character is whole.

    The pieces and `flush()` concatenate to `tokenizer.decode(ids)`. With `continuation=True` the ids go on from a text
    (a prefill, a raw prompt), so the space before the first word is part of it; otherwise it is the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, *, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._first = not continuation
        errors = "replace" if tokenizer.byte_level else "surrogateescape"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """The text that became certain; at most three bytes are ever held back."""
        if not self._tokenizer.is_text(token_id):
            return "" if self._tokenizer.byte_level else self.flush()
        raw = self._tokenizer.token_bytes(token_id, first=self._first)
        self._first = False
        return _LONE_BYTE.sub("\ufffd", self._utf8.decode(raw))

    def flush(self) -> str:
        """What was held back, as U+FFFD; the stream may go on afterwards."""
        return _LONE_BYTE.sub("\ufffd", self._utf8.decode(b"", final=True))


class StopScanner:
    """Finds stop strings in text that arrives in pieces, and never shows one, nor any part of one.

    The answer does not depend on how the text is cut: the stop string that is complete first wins, the longest of
    several that end together. Only the longest tail that could still begin a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UsageError("an empty stop string would end every answer at once", "Leave out the empty --stop.")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text safe to show, whether a stop string was found); after that, nothing more is shown."""
        if self._stopped:
            return "", True
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self._stopped = bool(found)
        keep = min(found)[1] if found else len(self._held) - self._tail()
        shown, self._held = self._held[:keep], "" if found else self._held[keep:]
        return shown, self._stopped

    def _tail(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = range(min(max(map(len, self._stops), default=1) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)

    def flush(self) -> str:
        """The text held back when the stream ended without a stop string."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """An answer's text as its tokens come, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stream, self._scanner = TextStream(tokenizer, continuation=continuation), StopScanner(stops)

    def push(self, token_id: int) -> tuple[str, bool]:
        """(text safe to show, whether a stop string was found).

        The end of an answer has no text, nor has a row by which an embedding is padded beyond the last token.
        """
        if token_id in self._tokenizer.eos_ids or token_id >= self._tokenizer.vocab_size:
            return "", False
        return self._scanner.push(self._stream.push(token_id))

    def rest(self) -> str:
        """What was held back, if the answer ended otherwise."""
        shown, _ = self._scanner.push(self._stream.flush())
        return shown + self._scanner.flush()
