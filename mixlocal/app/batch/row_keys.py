"""The keys that a row may have, by format; any other is an error that names it."""

from __future__ import annotations

import functools
import json
from typing import Any, Literal, TypeVar

import msgspec

from mixlocal.app.json_form import ANY_OBJECT, JsonForm, read_form
from mixlocal.app.template import Message
from mixlocal.errors import UsageError

Keys = TypeVar("Keys", bound=msgspec.Struct)
MAX_ID = 512
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed", "stop", "logprobs")


class SamplingKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all formats call by the same names; null is as if it were not there."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    def sampling(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that are there."""
        given = {name: getattr(self, name, None) for name in SAMPLING}
        if given["stop"] is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return {name: value for name, value in given.items() if value is not None}


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class SimpleRow(SamplingKeys, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Our own lines. system: goes before a prompt. schema, json_object: the JSON that the answer must be."""

    id: str | int | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    system: str | None = None
    raw: bool = False
    schema: dict[str, Any] | None = None
    json_object: bool = False
    logprobs: int | None = None


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def form(self) -> JsonForm | None:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise UsageError('response_format: json_schema goes with "type": "json_schema"')
        if self.json_schema is not None:
            return schema_form(self.json_schema.schema)
        return schema_form(json.loads(ANY_OBJECT)) if self.type == "json_object" else None


class OpenAIBody(SamplingKeys, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints take. n, stream and the penalties may only be what they are when left out."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    user: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        """Raises `UsageError` naming what we do not do."""
        only = {"n": 1, "stream": False, "frequency_penalty": 0, "presence_penalty": 0}
        for name, value in only.items():
            if getattr(self, name) not in (None, value):
                raise UsageError(f"{name} = {getattr(self, name)!r}: only {value!r} is possible")


class ChatBody(OpenAIBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        given.pop("logprobs", None)
        if self.max_completion_tokens is not None:
            given["max_tokens"] = self.max_completion_tokens
        if self.logprobs:
            given["logprobs"] = max(1, self.top_logprobs or 0)
        elif self.top_logprobs:
            raise UsageError("top_logprobs needs logprobs: true")
        return given


class CompletionBody(OpenAIBody, frozen=True, forbid_unknown_fields=True, kw_only=True):
    prompt: str
    logprobs: int | None = None


class OpenAIRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    custom_id: str
    url: Literal["/v1/chat/completions", "/v1/completions"]
    body: dict[str, Any]
    method: Literal["POST"] = "POST"


def convert(value: dict[str, Any], kind: type[Keys], inside: str = "") -> Keys:
    """Raises `UsageError` naming a key that is unknown, missing or of the wrong type. inside: a path to `value`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        place = f"{inside}{place.removesuffix('`')}".removeprefix(".")
        text += f" - at `{place}`" if place else ""
        raise UsageError(text[:1].lower() + text[1:]) from error


@functools.lru_cache(maxsize=64)
def _form(schema: str) -> JsonForm:
    return read_form(schema.encode(), "schema")


def schema_form(schema: dict[str, Any]) -> JsonForm:
    """Rows of one batch mostly have the same one."""
    return _form(json.dumps(schema))
