"""A conversation to token ids.

Every template first makes a list of parts, text that we or the model's author wrote (trusted) and text of the
conversation (not trusted), and `encode_parts` turns them into ids so that only trusted text can hold control tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol

import msgspec

from mixlocal.app.tokenizer import ControlSpan, Tokenizer
from mixlocal.app.tokenizer_files import TokenText, is_there, read_bytes, read_json_if_there, token_text
from mixlocal.errors import CorruptError, RefusedError, UsageError

MAX_TEMPLATE_BYTES = 64 << 10
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


def split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """(system text, turns): system messages stand first, then a user. UsageError otherwise."""
    count = next((n for n, message in enumerate(messages) if message.role != "system"), len(messages))
    turns = list(messages[count:])
    if not turns or turns[0].role != "user":
        raise UsageError("a conversation begins with a user message (a system message may come before it)")
    if any(turn.role == "system" for turn in turns):
        raise UsageError("a system message may only come at the beginning of a conversation")
    return "\n\n".join([message.content for message in messages[:count] if message.content]), turns


def check_answerable(turns: Sequence[Message], wanted: bool, prefill: str) -> None:
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
        system, turns = split_system(messages)
        self._check_order(turns)
        check_answerable(turns, add_generation_prompt, prefill)
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
        _, turns = split_system(messages)
        check_answerable(turns, add_generation_prompt, prefill)
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
        check_answerable(messages, add_generation_prompt, prefill)
        bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        return bos + tokenizer.encode(messages[0].content + prefill)


TEMPLATES: Mapping[str, ChatTemplate] = MappingProxyType(
    {"mistral-v1": MistralV1(), "chatml": ChatML(), "plain": PlainTemplate()}
)
_FORMATS = {
    "mistral-v1": "<s>[INST] ... [/INST]...</s>, system text before the first user text",
    "chatml": r"<|im_start|>role\n...<|im_end|>\n, with SmolLM2's system text where there is none",
    "plain": "the text as it is, no roles and no turns",
}


class _NamedSource(msgspec.Struct):
    name: str
    template: str


class _TemplateConfig(msgspec.Struct):
    """tokenizer_config.json."""

    chat_template: str | list[_NamedSource] | None = None
    bos_token: str | TokenText | None = None
    eos_token: str | TokenText | None = None


@dataclass(frozen=True, slots=True)
class _OwnTemplate:
    """What a folder says of its template. source: Jinja; origin: the file it stands in."""

    source: str
    origin: Path
    bos_token: str
    eos_token: str


def load_template(folder: Path, name: str | None) -> ChatTemplate:
    """The template called `name`, else the folder's chat_template.jinja, else tokenizer_config.json's, else plain.

    UsageError for an unknown name, RefusedError or CorruptError naming the file that holds a bad template.
    """
    if name is not None:
        return _built_in(name)
    own = _read_own(folder)
    if own is None:
        return TEMPLATES["plain"]
    # Imported here: jinja2 takes nearly a tenth of a second to load, and the built-in templates do without.
    from mixlocal.app.template_jinja import JinjaTemplate

    return JinjaTemplate(own.source, bos_token=own.bos_token, eos_token=own.eos_token, origin=str(own.origin))


def describe_template(folder: Path, name: str | None) -> str:
    """What `load_template` would choose, for a reader: a built-in's name and format, or the folder's Jinja source."""
    if name is not None:
        _built_in(name)
        return f"{name}: {_FORMATS[name]}"
    own = _read_own(folder)
    return "none: the model continues plain text" if own is None else own.source


def _built_in(name: str) -> ChatTemplate:
    if name not in TEMPLATES:
        raise UsageError(f"no template called {name!r}", f"Known templates: {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]


def _read_own(folder: Path) -> _OwnTemplate | None:
    file, config_file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    config = read_json_if_there(config_file, _TemplateConfig)
    origin = file if is_there(file) else config_file
    source = _read_source(file) if origin == file else _default_source(config_file, config)
    if source is None:
        return None
    return _OwnTemplate(source, origin, token_text(config.bos_token), token_text(config.eos_token))


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
