"""Text to token ids and back: `tokenizer.json` through `tokenizers`, else `tokenizer.model` through `sentencepiece`.

Decoding is our own, from the bytes of each token, so that a stream and a whole decode cannot disagree:

    byte-level (GPT-2 style)   a text is one UTF-8 byte string cut anywhere; a malformed sequence is one U+FFFD
    sentencepiece style        a token is text, a byte only as a fallback; every malformed byte is one U+FFFD
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

ControlSpan = tuple[int, int, int]  # start, end, token id


class Tokenizer(Protocol):
    """What the rest of the program sees of a tokenizer; ids lie in `range(vocab_size)`, some may be unassigned."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool:
        """Whether the model expects `bos_id` in front of a plain text (chat templates write their own)."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def byte_level(self) -> bool:
        """True: tokens are slices of one UTF-8 byte string. False: tokens are text, with single bytes as a fallback."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, never with BOS or EOS around it.

        `special=True` reads control tokens written in the text ("<|im_start|>") as their ids: for text that we or the
        template wrote. With False, text can never become a control token. UsageError for a lone surrogate.
        """

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        """The text of some ids, control tokens left out; exactly what `TextStream` gives piece by piece."""

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes a token adds, b"" for a control token; `first`: it opens a text, where a dummy space is dropped."""

    def is_text(self, token_id: int) -> bool:
        """False for control tokens and unassigned ids; RefusedError for an id outside the vocabulary."""

    def control_spans(self, text: str) -> list[ControlSpan]:
        """Where control tokens are written in a text."""
