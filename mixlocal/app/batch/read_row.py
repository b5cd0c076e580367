"""A line of the input as a row, in each of the formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixlocal.app.batch.lines import MAX_LINE_BYTES, InputFormat, Line
from mixlocal.app.batch.row import Asked, Row, bad_row, good_row
from mixlocal.app.batch.row_keys import (
    MAX_ID,
    ChatBody,
    ChatMessage,
    CompletionBody,
    OpenAIRow,
    SimpleRow,
    convert,
    schema_form,
)
from mixlocal.app.batch.row_template import LINE
from mixlocal.app.batch.setup import Setup
from mixlocal.app.json_form import ANY_OBJECT, JsonForm
from mixlocal.app.template import Message
from mixlocal.errors import MixlocalError, UsageError
from mixlocal.store.strict_json import parse_json_object

_ID_KEYS: dict[InputFormat, str] = {"openai": "custom_id", "jsonl": "id"}


def read_row(line: Line, setup: Setup) -> Row:
    """A row with an error for whatever cannot be asked."""
    name: str | None = str(line.number) if setup.format == "txt" else None
    try:
        if line.data is None:
            raise UsageError(f"longer than {MAX_LINE_BYTES >> 20} MiB")
        if setup.format == "txt":
            return good_row(line, str(line.number), _asked_text(line.data, setup))
        value = parse_json_object(line.data, "not a row")
        name = _id(value.get(_ID_KEYS[setup.format]), line, needed=setup.format == "openai")
        return good_row(line, name, _ASK[setup.format](value, setup))
    except RecursionError:
        return bad_row(line, name, UsageError("nested too deeply"))
    except ValueError as error:  # a number that JSON does not have, in a field of a template
        return bad_row(line, name, UsageError(str(error)))
    except MixlocalError as error:
        return bad_row(line, name, error)


def _id(value: object, line: Line, *, needed: bool) -> str:
    """Raises `UsageError` for one that cannot tell a row from others."""
    if value is None and not needed:
        return str(line.number)
    if isinstance(value, int) and not isinstance(value, bool) and not needed:
        value = str(value)
    if not isinstance(value, str):
        raise UsageError("has no custom_id" if value is None else "its id must be a text")
    if not 0 < len(value) <= MAX_ID:
        raise UsageError(f"its id has {len(value)} characters, not 1 to {MAX_ID}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError("its id is no text") from error
    return value


def _asked_text(data: bytes, setup: Setup) -> Asked:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error
    if setup.template is not None:
        text = setup.template.fill({LINE: text})
    return Asked(setup.conversation(text), setup.sampling, form=setup.form)


def _asked_simple(value: dict[str, Any], setup: Setup) -> Asked:
    """With a template all keys are its fields, and those that are ours and no prompt mean what they always do."""
    if setup.template is None:
        keys = convert(value, SimpleRow)
        prompt, messages = keys.prompt, keys.messages
    else:
        ours = set(SimpleRow.__struct_fields__) - {"prompt", "messages"}
        keys = convert({name: field for name, field in value.items() if name in ours}, SimpleRow)
        prompt, messages = setup.template.fill(value), None
    form = _simple_form(keys) or setup.form
    sampling = setup.sampling | keys.sampling()
    if (prompt is None) == (messages is None):
        raise UsageError("needs a prompt or messages" if prompt is None else "has both a prompt and messages")
    if prompt is None:
        if keys.raw:
            raise UsageError("raw goes with a prompt, not with messages")
        return Asked(setup.with_system(_messages(messages or []), keys.system), sampling, form=form)
    if keys.raw:
        if keys.system:
            raise UsageError("raw has no place for a system text")
        return Asked(prompt, sampling, raw=True, form=form)
    return Asked(setup.conversation(prompt, keys.system), sampling, form=form)


def _simple_form(keys: SimpleRow) -> JsonForm | None:
    if keys.schema is not None and keys.json_object:
        raise UsageError("schema and json_object: only one of them")
    if keys.schema is not None:
        return schema_form(keys.schema)
    return JsonForm(ANY_OBJECT) if keys.json_object else None


def _asked_openai(value: dict[str, Any], setup: Setup) -> Asked:
    row = convert(value, OpenAIRow)
    if row.url == "/v1/completions":
        completion = convert(row.body, CompletionBody, "body")
        return _asked_body(completion, completion.prompt, setup)
    chat = convert(row.body, ChatBody, "body")
    return _asked_body(chat, setup.with_system(_messages(chat.messages)), setup)


def _asked_body(body: ChatBody | CompletionBody, prompt: str | tuple[Message, ...], setup: Setup) -> Asked:
    """A completion goes on with its text as it is."""
    body.check()
    form = body.response_format.form() if body.response_format else setup.form
    raw = isinstance(body, CompletionBody)
    return Asked(prompt, setup.sampling | body.sampling(), raw, form, body.model)


def _messages(messages: list[ChatMessage]) -> tuple[Message, ...]:
    if not messages:
        raise UsageError("messages is empty")
    return tuple(message.message() for message in messages)


_ASK: dict[InputFormat, Callable[[dict[str, Any], Setup], Asked]] = {"openai": _asked_openai, "jsonl": _asked_simple}
