"""The Jinja template that a model's repository carries.

Its source may be hostile, and it must not let the text of a conversation pass for its own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mixlocal.app.template import (
    MAX_TEMPLATE_BYTES,
    Message,
    Part,
    check_answerable,
    encode_parts,
    split_system,
)
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.errors import RefusedError, UsageError

MAX_RENDERED_CHARS = 16 << 20


class _TemplateSaysNoError(TemplateError):
    """`raise_exception` was called: the template does not take this conversation."""


def _raise_exception(message: object) -> NoReturn:
    raise _TemplateSaysNoError(str(message))


# What compiling and running a template can raise besides TemplateError; SyntaxError and MemoryError come from Python's
# compiler when blocks are nested too deeply.
_TEMPLATE_FAULTS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class JinjaTemplate:
    """The template string that a model's repository carries, run in jinja2's immutable sandbox.

    The template is as trusted as the model, but contents are not. It is rendered twice: with the real contents, and
    with an unguessable marker in place of each content, which tells the template's own text (where control tokens are
    read) from the contents. Marker rendering and real contents must fit together to exactly the real rendering;
    contents may only have been stripped at their ends, or (an assistant's) cut after "</think>". A template that does
    more, or decides by what a content says, is refused. Memory and time are not limited here, only sizes are.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "", origin: str = "chat template") -> None:
        """RefusedError for a template that is too large or does not compile; `origin` is the file to name."""
        self._origin = origin
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        if len(source.encode("utf-8", "surrogatepass")) > MAX_TEMPLATE_BYTES:
            raise RefusedError(f"{origin} is larger than {MAX_TEMPLATE_BYTES} bytes")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except _TEMPLATE_FAULTS as error:
            raise self._refusal(error) from error

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        prefill: str = "",
    ) -> list[int]:
        check_answerable(split_system(messages)[1], add_generation_prompt, prefill)
        parts = [*self._parts(messages, add_generation_prompt), Part(prefill)]
        return encode_parts(parts, tokenizer)

    def _parts(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Part]:
        real = self._render([message.content for message in messages], messages, add_generation_prompt)
        markers = {f"{secrets.token_hex(16)}x{n}x": message for n, message in enumerate(messages)}
        # Nothing can be smuggled in white space, and templates ask whether a content is empty.
        shown = [m.content if not m.content.strip() else mark for mark, m in markers.items()]
        marked = self._render(shown, messages, add_generation_prompt)
        pieces = re.split("(" + "|".join(markers) + ")", marked)
        parts = _fit(real, [markers.get(piece, piece) for piece in pieces])
        if parts is None:
            hint = "Choose one of the built-in templates instead."
            raise RefusedError(f"{self._origin} changes what a message says, so it cannot be used safely", hint)
        return parts

    def _render(self, contents: Sequence[str], messages: Sequence[Message], add_generation_prompt: bool) -> str:
        turns = [{"role": m.role, "content": content} for m, content in zip(messages, contents, strict=True)]
        values = {**self._tokens, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(messages=turns, **values):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_RENDERED_CHARS:
                    raise RefusedError(f"{self._origin} writes more than {MAX_RENDERED_CHARS} characters")
        except _TemplateSaysNoError as error:
            raise UsageError(f"{self._origin} does not take this conversation: {_one_line(error)}") from error
        except _TEMPLATE_FAULTS as error:
            raise self._refusal(error) from error
        return "".join(pieces)

    def _refusal(self, error: BaseException) -> RefusedError:
        return RefusedError(f"{self._origin} cannot be used: {type(error).__name__}: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


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


def _fit(real: str, pieces: Sequence[str | Message]) -> list[Part] | None:
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
        yield Part(text, isinstance(pieces[n], str))
        at += len(text)
