"""A text as chunks of token ids, cut as llama-perplexity cuts it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

import mixlocal
from mixlocal.app.batch.source import check_input
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.errors import RefusedError, UsageError
from mixlocal.store.durable import named_errors

OWN_TEXT = Path(mixlocal.__file__).parent / "data" / "evaluation.txt"
LEAST_CONTEXT = 8


@dataclass(frozen=True, slots=True)
class Text:
    name: str
    content: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Chunks:
    """ids: of the whole text, with BOS in front where the model expects it. BOS stands in place of the first token of
    each chunk too, for each is a sequence of its own; what is left behind the last whole chunk is dropped.

    The second half of a chunk is scored, so that all that is scored has half a chunk or more before it.
    """

    context: int
    ids: tuple[int, ...]
    bos: tuple[int, ...]
    count: int

    def chunk(self, number: int) -> list[int]:
        start = number * self.context + len(self.bos)
        return [*self.bos, *self.ids[start : (number + 1) * self.context]]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(msgspec.json.encode((self.bos, self.ids))).hexdigest()


def scored(context: int) -> slice:
    """The positions of a chunk whose logits are scored, each against the token behind it."""
    return slice(context // 2, context - 1)


def n_scored(context: int) -> int:
    return context - 1 - context // 2


def read_text(path: Path | None) -> Text:
    """The package's own without a path. Raises `NotFoundError`, `UsageError` for a folder, `RefusedError` for bytes
    that are no UTF-8."""
    path = path or OWN_TEXT
    check_input(path, str(path))
    with named_errors(path):
        data = path.read_bytes()
    try:
        return Text(path.name, data.decode(), hashlib.sha256(data).hexdigest())
    except UnicodeDecodeError as error:
        raise RefusedError(
            f"{path}: no UTF-8 text: byte {data[error.start]:#04x} at {error.start}", "convert it, for example by iconv"
        ) from error


def cut(text: Text, tokenizer: Tokenizer, context: int, most: int | None, model: str) -> Chunks:
    """At most `most` chunks. Raises `UsageError` for a text that has none, naming `model`."""
    bos = (tokenizer.bos_id,) if tokenizer.adds_bos and tokenizer.bos_id is not None else ()
    ids = (*bos, *tokenizer.encode(text.content))
    count = len(ids) // context
    if not count:
        hint = f"--ctx {len(ids)} or less" if len(ids) >= LEAST_CONTEXT else "give a longer text"
        raise UsageError(f"{text.name} has {len(ids)} tokens for {model}, and a chunk has --ctx {context}", hint)
    return Chunks(context, ids, bos, count if most is None else min(count, most))


def check_same_tokens(ours: Tokenizer, theirs: Tokenizer, names: tuple[str, str]) -> None:
    """Raises `RefusedError`: probabilities of tokens that are not the same cannot be compared."""
    difference = _difference(ours, theirs)
    if difference:
        raise RefusedError(
            f"{names[0]} and {names[1]} have different tokenizers: {difference}",
            "compare models of one family, whose tokens are the same",
        )


def _difference(ours: Tokenizer, theirs: Tokenizer) -> str:
    if ours.vocab_size != theirs.vocab_size:
        return f"{ours.vocab_size} tokens against {theirs.vocab_size}"
    for token_id in range(ours.vocab_size):
        mine, other = _meaning(ours, token_id), _meaning(theirs, token_id)
        if mine != other:
            return f"token {token_id} is {mine[1]!r} in one, {other[1]!r} in the other"
    return ""


def _meaning(tokenizer: Tokenizer, token_id: int) -> tuple[bool, bytes]:
    return tokenizer.is_text(token_id), tokenizer.token_bytes(token_id)
