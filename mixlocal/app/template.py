"""A conversation to token ids.

Every template first makes a list of parts, text that we or the model's author wrote (trusted) and text of the
conversation (not trusted), and `encode_parts` turns them into ids so that only trusted text can hold control tokens.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NoReturn, Protocol

import msgspec
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mixlocal.app.tokenizer import ControlSpan, Tokenizer, is_there, read_bytes, read_json_if_there
from mixlocal.errors import CorruptError, RefusedError, UsageError

MAX_TEMPLATE_BYTES = 64 << 10
MAX_RENDERED_CHARS = 16 << 20
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatTemplate(Protocol):
    """A model's way of writing a conversation."""

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        prefill: str = "",
    ) -> list[int]:
        """Token ids of a conversation, BOS included where the format has one, ready for the model to answer.

        `prefill` is the beginning of the answer. UsageError for roles out of order, RefusedError for a template or a
        tokenizer that does not fit.
        """


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the prompt; only a trusted one may hold control tokens."""

    text: str
    trusted: bool = False


def encode_parts(parts: Sequence[Part], tokenizer: Tokenizer) -> list[int]:
    """Token ids of parts joined together, control tokens read in trusted text only.

    Ordinarily no other text writes a control token, not even across a border; then the whole is encoded at once, as
    the model's own library does. Otherwise the text between the trusted control tokens is encoded as plain text.
    """
    whole = "".join([part.text for part in parts])
    trusted = _trusted_spans(parts, tokenizer)
    if tokenizer.control_spans(whole) == trusted:
        return tokenizer.encode(whole, special=True)
    ids: list[int] = []
    position = 0
    for start, end, token_id in trusted:
        ids += [*tokenizer.encode(whole[position:start]), token_id]
        position = end
    return ids + tokenizer.encode(whole[position:])


def _trusted_spans(parts: Sequence[Part], tokenizer: Tokenizer) -> list[ControlSpan]:
    """Where the trusted parts write control tokens, counted in the joined text."""
    spans: list[ControlSpan] = []
    offset = 0
    for part in parts:
        found = tokenizer.control_spans(part.text) if part.trusted else []
        spans += [(offset + start, offset + end, token_id) for start, end, token_id in found]
        offset += len(part.text)
    return spans


def _split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """(system text, turns): system messages stand first, then a user. UsageError otherwise."""
    count = next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
    turns = list(messages[count:])
    if not turns or turns[0].role != "user":
        raise UsageError("a conversation begins with a user message (a system message may come before it)")
    if any(turn.role == "system" for turn in turns):
        raise UsageError("a system message may only come at the beginning of a conversation")
    return "\n\n".join([message.content for message in messages[:count] if message.content]), turns


def _check_answerable(turns: Sequence[Message], wanted: bool, prefill: str) -> None:
    if wanted and turns[-1].role != "user":
        raise UsageError("the last message is the assistant's: there is nothing to answer")
    if prefill and not wanted:
        raise UsageError("a prefill begins an answer, and no answer was asked for")


class MistralV1:
    """Mixtral-8x7B-Instruct's format, token for token that of mistral-common's v1 instruct tokenizer.

    `<s>[INST] user [/INST]answer</s>[INST] user [/INST]`; each turn is encoded by itself and nothing is stripped. There
    is no system role: its text and a blank line go before the first user text. The format's brackets are plain text, so
    a user can write them too. Unlike mistral-common, an empty answer is accepted and two users in a row are not merged.
    """

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        prefill: str = "",
    ) -> list[int]:
        system, turns = _split_system(messages)
        self._check_order(turns)
        _check_answerable(turns, add_generation_prompt, prefill)
        if tokenizer.bos_id is None or not tokenizer.eos_ids:
            raise RefusedError("the mistral-v1 template needs a tokenizer with BOS and EOS tokens")
        ids = [tokenizer.bos_id]
        for n, turn in enumerate(turns):
            if turn.role == "user":
                content = f"{system}\n\n{turn.content}" if n == 0 and system else turn.content
                ids += tokenizer.encode(f"[INST] {content} [/INST]")
            else:
                ids += [*tokenizer.encode(turn.content), tokenizer.eos_ids[0]]
        return ids + tokenizer.encode(prefill)

    @staticmethod
    def _check_order(turns: Sequence[Message]) -> None:
        for before, after in pairwise(turns):
            if before.role == after.role:
                raise UsageError(f"user and assistant must take turns: there are two {after.role} messages in a row")


@dataclass(frozen=True, slots=True)
class ChatML:
    """`<|im_start|>role\\ncontent<|im_end|>\\n`, without BOS; SmolLM2's, with its system text where there is none."""

    default_system: str = SMOLLM2_SYSTEM

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        prefill: str = "",
    ) -> list[int]:
        _, turns = _split_system(messages)
        _check_answerable(turns, add_generation_prompt, prefill)
        if len(tokenizer.control_spans("<|im_start|><|im_end|>")) != 2:
            raise RefusedError("the chatml template needs a tokenizer with <|im_start|> and <|im_end|>")
        if messages[0].role != "system" and self.default_system:
            messages = [Message("system", self.default_system), *messages]
        parts: list[Part] = []
        for message in messages:
            parts += [Part(f"<|im_start|>{message.role}\n", True), Part(message.content), Part("<|im_end|>\n", True)]
        if add_generation_prompt:
            parts += [Part("<|im_start|>assistant\n", True), Part(prefill)]
        return encode_parts(parts, tokenizer)


class PlainTemplate:
    """A base model knows no roles: one user message, its text as it is, after BOS where the tokenizer puts one."""

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        prefill: str = "",
    ) -> list[int]:
        if len(messages) != 1 or messages[0].role != "user":
            hint = "Use a model trained to chat, or name a template."
            raise UsageError("this model has no chat format: it continues one text, without roles or turns", hint)
        _check_answerable(messages, add_generation_prompt, prefill)
        bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        return bos + tokenizer.encode(messages[0].content + prefill)


# ---------------------------------------------------------------------------------------------------------------------
# Templates that come with a model


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
        _check_answerable(_split_system(messages)[1], add_generation_prompt, prefill)
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


# ---------------------------------------------------------------------------------------------------------------------
# Choosing

TEMPLATES: Mapping[str, ChatTemplate] = MappingProxyType(
    {"mistral-v1": MistralV1(), "chatml": ChatML(), "plain": PlainTemplate()}
)


class _Content(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


class _TemplateConfig(msgspec.Struct):
    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _Content | None = None
    eos_token: str | _Content | None = None


def load_template(folder: Path, name: str | None) -> ChatTemplate:
    """The template called `name`, else the folder's chat_template.jinja, else tokenizer_config.json's, else plain.

    UsageError for an unknown name, RefusedError or CorruptError naming the file that holds a bad template.
    """
    if name is not None:
        return _built_in(name)
    config_path = folder / "tokenizer_config.json"
    config = read_json_if_there(config_path, _TemplateConfig)
    path = folder / "chat_template.jinja"
    source = _read_source(path) if is_there(path) else _default_source(config_path, config)
    if source is None:
        return TEMPLATES["plain"]
    origin = str(path if is_there(path) else config_path)
    bos, eos = _token_text(config.bos_token), _token_text(config.eos_token)
    return JinjaTemplate(source, bos_token=bos, eos_token=eos, origin=origin)


def _built_in(name: str) -> ChatTemplate:
    if name not in TEMPLATES:
        raise UsageError(f"no template called {name!r}", f"Known templates: {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def _read_source(path: Path) -> str:
    try:
        return read_bytes(path, MAX_TEMPLATE_BYTES).decode()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path} is not UTF-8 text: bad byte at {error.start}") from error


def _default_source(path: Path, config: _TemplateConfig) -> str | None:
    """The template of tokenizer_config.json; of a list of them, the one called "default"."""
    if not isinstance(config.chat_template, list):
        return config.chat_template
    by_name = {entry.name: entry.template for entry in config.chat_template}
    if "default" not in by_name:
        raise RefusedError(f"{path}: chat_template lists {len(by_name)} templates, and none is called 'default'")
    return by_name["default"]


def _token_text(token: str | _Content | None) -> str:
    return token.content if isinstance(token, _Content) else token or ""
