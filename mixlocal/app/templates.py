"""Which template a model is talked to with: a built-in by name, or its folder's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec

from mixlocal.app.template import MAX_TEMPLATE_BYTES, ChatML, ChatTemplate, MistralV1, PlainTemplate
from mixlocal.app.template_jinja import JinjaTemplate
from mixlocal.app.tokenizer_files import TokenText, is_there, read_bytes, read_json_if_there, token_text
from mixlocal.errors import CorruptError, RefusedError, UsageError

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
