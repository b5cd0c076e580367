"""The Jinja template that a model's repository carries.

Its source may be hostile, and it must not let the text of a conversation pass for its own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence

from mixlocal.app.template import (
    MAX_TEMPLATE_BYTES,
    SYSTEM_NOTE,
    Message,
    Part,
    check_answerable,
    encode_parts,
    merge_system,
    split_system,
)
from mixlocal.app.template_fit import fit
from mixlocal.app.template_sandbox import Sandbox
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.app.vocabulary import check_text
from mixlocal.errors import RefusedError, UsageError

# What a template may write, in characters: the contents a few times over, and text of its own.
_OWN_CHARS, _CHARS_PER_MESSAGE, _TIMES = 256 << 10, 1 << 10, 4


class JinjaTemplate:
    """The template string that a model's repository carries, run in a process of its own (`Sandbox`).

    The template is as trusted as the model, but contents are not. It is rendered twice: with the real contents, and
    with an unguessable marker in place of each content, which tells the template's own text (where control tokens are
    read) from the contents. Marker rendering and real contents must fit together to exactly the real rendering;
    contents may only have been stripped at their ends, or (an assistant's) cut after "</think>". A template that does
    more, or decides by what a content says, is refused. One that takes no system message, or leaves it out, gets its
    text before the first user's.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", origin: str = "chat template") -> None:
        """RefusedError for a template that is too large or does not compile; `origin` is the file to name."""
        self._origin = origin
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise RefusedError(f"{origin} is larger than {MAX_TEMPLATE_BYTES} bytes")
        self._sandbox = Sandbox(source, origin)
        self._sandbox.compile()

    def close(self) -> None:
        """End the template's process, as dropping the template does; the next use starts another."""
        self._sandbox.close()

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        prefill: str = "",
    ) -> list[int]:
        check_answerable(split_system(messages)[1], add_generation_prompt, prefill)
        parts, _ = self._draw(messages, add_generation_prompt)
        return encode_parts([*parts, Part(prefill)], tokenizer)

    def system_note(self, messages: Sequence[Message]) -> str | None:
        if not split_system(messages)[0].strip():
            return None
        return SYSTEM_NOTE if self._draw(messages, messages[-1].role == "user")[1] else None

    def _draw(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[list[Part], bool]:
        """The rendering, and whether the system text had to go before the first user's."""
        try:
            parts, shows_system = self._render(messages, add_generation_prompt)
            if shows_system:
                return parts, False
        except UsageError:
            if messages[0].role != "system":
                raise
        parts, _ = self._render(merge_system(messages), add_generation_prompt)
        return parts, True

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> tuple[list[Part], bool]:
        """The rendering, and whether every system text is in it."""
        markers = {f"{secrets.token_hex(16)}x{n}x": message for n, message in enumerate(messages)}
        shown = [[message.content for message in messages], *_masks(markers)]
        real, *marked = self._run(messages, shown, add_generation_prompt)
        for text in marked:
            pieces = [markers.get(piece, piece) for piece in re.split("(" + "|".join(markers) + ")", text)]
            parts = fit(real, pieces)
            if parts is not None:
                return parts, all(m in pieces for m in messages if m.role == "system" and m.content.strip())
        hint = "Choose one of the built-in templates instead."
        raise RefusedError(f"{self._origin} changes what a message says, so it cannot be used safely", hint)

    def _run(
        self, messages: Sequence[Message], shown: Sequence[Sequence[str]], add_generation_prompt: bool
    ) -> list[str]:
        """Each of `shown` is what the messages say in one rendering."""
        for message in messages:
            check_text(message.content)
        turns = [
            [{"role": m.role, "content": text} for m, text in zip(messages, contents, strict=True)]
            for contents in shown
        ]
        values = {**self._tokens, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        size = sum([len(text) for contents in shown for text in contents])
        return self._sandbox.render(turns, values, _OWN_CHARS + _CHARS_PER_MESSAGE * len(messages) + _TIMES * size)


def _masks(markers: dict[str, Message]) -> Iterator[list[str]]:
    """What to show in place of the contents, to be tried in turn.

    Nothing can be smuggled in white space, and templates ask whether a content is empty: it stays. But where the ids of
    an answer without words are to be put in its place, the place must be found.
    """
    if any(m.ids and not m.content.strip() for m in markers.values()):
        yield [mark if m.ids or m.content.strip() else m.content for mark, m in markers.items()]
    yield [mark if m.content.strip() else m.content for mark, m in markers.items()]
