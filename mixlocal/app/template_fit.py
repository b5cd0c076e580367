"""What a template made of a conversation, taken apart again into its own text and what was said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mixlocal.app.template import Message, Part

_STRIPS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)


def _variants(message: Message) -> list[str]:
    """What a template may make of a content, unchanged first."""
    bases = [message.content]
    if message.role == "assistant" and "</think>" in message.content:
        bases.append(message.content.rpartition("</think>")[2])
    return list(dict.fromkeys(strip(base) for base in bases for strip in _STRIPS))


def fit(real: str, pieces: Sequence[str | Message]) -> list[Part] | None:
    """The parts that concatenate to `real`: each string piece as it is, each message in one of its variants.

    Where several choices fit, the first variant of the earliest message wins. None when nothing fits.
    """
    options = [[p] if isinstance(p, str) else _variants(p) for p in pieces]
    begins = [{0}]  # per piece, the positions in `real` where it can begin, from the left ...
    for texts in options:
        begins.append({at + len(text) for at in begins[-1] for text in texts if real.startswith(text, at)})
    begins[-1] &= {len(real)}
    for n, texts in reversed(list(enumerate(options))):  # ... and from the right
        ends = begins[n + 1]
        begins[n] = {at for at in begins[n] for text in texts if real.startswith(text, at) and at + len(text) in ends}
    if not begins[0]:
        return None
    return list(_choose(real, pieces, options, begins))


def _choose(
    real: str, pieces: Sequence[str | Message], options: Sequence[list[str]], begins: Sequence[set[int]]
) -> Iterator[Part]:
    """Walk from the left, taking at each piece the first variant from which the end can be reached."""
    at = 0
    for n, texts in enumerate(options):
        text = next(text for text in texts if real.startswith(text, at) and at + len(text) in begins[n + 1])
        yield _part(pieces[n], text)
        at += len(text)


def _part(piece: str | Message, text: str) -> Part:
    """A message that stands there unchanged brings its ids."""
    if isinstance(piece, str):
        return Part(text, trusted=True)
    return Part(text, ids=piece.ids if text == piece.content else ())
