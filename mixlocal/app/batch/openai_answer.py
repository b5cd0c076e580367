"""An answer as OpenAI's API has it: https://platform.openai.com/docs/api-reference/chat/object."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated

import msgspec

from mixlocal.app.batch.engine import Reply, Request, TokenLogprob
from mixlocal.app.json_form import JsonForm
from mixlocal.errors import RefusedError, SchemaError
from mixlocal.store.chat_api import one_line
from mixlocal.store.patience import TryAgainError

DROPPED = "abort"  # vLLM's reason for an answer that it gave up, as when it is told to end
# An escape of JSON: a pair of surrogates, one alone (the group), or any other.
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.DOTALL
)

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Byte = Annotated[int, msgspec.Meta(ge=0, le=255)]


def decode(request: Request, data: bytes) -> Reply:
    """Raises `TryAgainError` for what is no answer, `RefusedError` for one that is not what was asked for."""
    answer = _parse(data, _Text if request.raw else _Chat)
    choice, usage = answer.choices[0], answer.usage or _Usage()
    if choice.finish_reason == DROPPED:
        raise TryAgainError("the server dropped the request")
    if choice.refusal:
        raise RefusedError(f"the model refuses: {one_line(choice.refusal)}")
    if choice.finish_reason not in ("stop", "length"):
        raise RefusedError(f"the server ended the answer for another reason: {one_line(str(choice.finish_reason))}")
    reply = Reply(
        request.id, choice.answer, "stop" if choice.finish_reason == "stop" else "length", usage.prompt_tokens,
        usage.completion_tokens, logprobs=choice.token_logprobs if request.params.logprobs else (),
    )  # fmt: skip
    return _checked(reply, request.form)


def _checked(reply: Reply, form: JsonForm | None) -> Reply:
    """With an error if it had to be JSON and is none: cut short, or by a server that takes no notice of the form.

    That it follows the schema is the server's to see to: whitespace and order of keys differ from llguidance's.
    """
    if form is None:
        return reply
    try:
        msgspec.json.decode(reply.text)
    except (ValueError, RecursionError):
        return replace(
            reply,
            error=SchemaError(
                f"the answer ended after {reply.completion_tokens} tokens and is no whole JSON",
                "raise --max-tokens, or bound the schema: maxLength, maxItems, additionalProperties false",
            ),
        )
    return reply


def _parse(data: bytes, form: type[_Chat] | type[_Text]) -> _Chat | _Text:
    """Half a character (models cut them in two, and some servers pass that on) becomes U+FFFD."""
    try:
        try:
            return msgspec.json.decode(data, type=form)
        except ValueError:
            return msgspec.json.decode(_mended(data), type=form)
    except (ValueError, RecursionError) as error:
        raise TryAgainError(f"the server's answer is none ({one_line(str(error))})", odd=True) from error


def _mended(data: bytes) -> bytes:
    text = data.decode("utf-8", "replace").encode()
    return _ESCAPE.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], text)


class _Usage(msgspec.Struct):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0


class _Candidate(msgspec.Struct):
    token: str
    logprob: float
    raw: list[Byte] | None = msgspec.field(default=None, name="bytes")

    @property
    def text(self) -> bytes:
        return self.token.encode() if self.raw is None else bytes(self.raw)


class _Place(_Candidate):
    top_logprobs: list[_Candidate] | None = None


class _ChatLogprobs(msgspec.Struct):
    content: list[_Place] | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _ChatChoice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    logprobs: _ChatLogprobs | None = None

    @property
    def answer(self) -> str:
        return self.message.content or ""

    @property
    def refusal(self) -> str:
        return self.message.refusal or ""

    @property
    def token_logprobs(self) -> tuple[TokenLogprob, ...]:
        places = (self.logprobs.content if self.logprobs else None) or []
        return tuple(
            TokenLogprob(
                place.text, place.logprob, tuple((other.text, other.logprob) for other in place.top_logprobs or ())
            )
            for place in places
        )


class _TextLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class _TextChoice(msgspec.Struct):
    text: str
    finish_reason: str | None = None
    logprobs: _TextLogprobs | None = None
    refusal = ""

    @property
    def answer(self) -> str:
        return self.text

    @property
    def token_logprobs(self) -> tuple[TokenLogprob, ...]:
        """A token with no log probability is the text's first, of which nothing is known."""
        given = self.logprobs or _TextLogprobs()
        tops = given.top_logprobs or [None] * len(given.tokens)
        return tuple(
            TokenLogprob(token.encode(), logprob, tuple((name.encode(), value) for name, value in (top or {}).items()))
            for token, logprob, top in zip(given.tokens, given.token_logprobs, tops, strict=False)
            if logprob is not None
        )


class _Chat(msgspec.Struct):
    choices: Annotated[list[_ChatChoice], msgspec.Meta(min_length=1)]
    usage: _Usage | None = None


class _Text(msgspec.Struct):
    choices: Annotated[list[_TextChoice], msgspec.Meta(min_length=1)]
    usage: _Usage | None = None
