"""Answers in JSON: what a form allows becomes a mask over the next token, through llguidance.

form = read_form(b'{"type": "object", "properties": {"age": {"type": "integer"}}}', "--schema")
table = TokenTable(session.tokenizer, session.config.vocab_size)
session.stream("How old?", constraint=JsonConstraint(form, table))
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy
import torch

from mixlocal.app.json_form import JsonForm, library, make_table, one_line
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.errors import RefusedError, SchemaError, UsageError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class TokenTable:
    """A vocabulary as llguidance wants it. Making it takes a third of a second for 50,000 tokens: keep it."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        """size: of the logits; rows beyond the tokenizer's are no tokens. Raises `RefusedError` for a tokenizer with no
        end-of-sequence token: no answer would ever end."""
        if not tokenizer.eos_ids:
            raise RefusedError("the model has no end-of-sequence token, so an answer in JSON could not end")
        self.tokenizer, self.size = tokenizer, size
        tokens = [_text_bytes(tokenizer, token) for token in range(size)]
        self.tokens = make_table(tokens, tokenizer.eos_ids[0], functools.partial(_encode, tokenizer))


class JsonConstraint:
    """A `Constraint` of `Sampler`, for one answer."""

    def __init__(self, form: JsonForm, table: TokenTable, begun: str = "") -> None:
        """begun: the beginning of the answer, where that is given. Raises `UsageError` if the form does not allow it,
        or is too large for llguidance."""
        self._size, self._ends = table.size, list(table.tokenizer.eos_ids)
        # Sentencepiece writes an answer's first word with a space in front, which nobody sees.
        grammar = form.grammar(space=not table.tokenizer.byte_level)
        self._matcher: LLMatcher = library().LLMatcher(table.tokens, grammar, log_level=0)
        if self._matcher.is_error():
            raise UsageError(f"the schema cannot be followed: {one_line(self._matcher.get_error())}")
        if begun and not self._matcher.consume_tokens(table.tokens.greedy_tokenize(begun)):
            raise UsageError(f"the schema allows no answer that begins with {begun[:80]!r}")

    def allowed(self) -> torch.Tensor:
        """bool [V]. Raises `SchemaError` if following the schema outgrows llguidance's limits."""
        packed = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        self._check()
        bits = numpy.unpackbits(packed, count=self._size, bitorder="little")
        bits[self._ends] = bits[self._ends[0]]
        return torch.from_numpy(bits.view(numpy.bool_))

    def accept(self, token: int) -> None:
        self._matcher.consume_token(self._ends[0] if token in self._ends else token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            trouble = one_line(self._matcher.get_error())
            raise SchemaError(f"the schema could not be followed to the answer's end: {trouble}", "make it simpler")


def _text_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token writes; nothing for what is no text. 0xFF, in no text either, would mark a control token."""
    known = token < tokenizer.vocab_size and tokenizer.is_text(token)
    data = tokenizer.token_bytes(token) if known else b""
    return b"" if data.startswith(b"\xff") else data


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens that the model knows for a text, to prefer where the form leaves only that text; [] for any.

    Sentencepiece puts a space in front: it gets a line feed there, which is taken away again.
    """
    if tokenizer.byte_level:
        return tokenizer.encode(text)
    front, ids = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    return ids[len(front) :] if ids[: len(front)] == front else []
