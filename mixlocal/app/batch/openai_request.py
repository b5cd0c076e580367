"""A request as OpenAI's API has it: https://platform.openai.com/docs/api-reference/chat/create.

What OpenAI does not have goes by vLLM's name: top_k, min_p, repetition_penalty.
"""

from __future__ import annotations

from typing import Any

import msgspec

from mixlocal.app.batch.engine import Request
from mixlocal.app.json_form import ANY_OBJECT, JsonForm
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import RefusedError

CHAT, TEXT = "chat/completions", "completions"


def encode(request: Request, model: str) -> tuple[str, bytes]:
    """Where it goes, and the body. Raises `RefusedError` for what is no text."""
    path = TEXT if request.raw else CHAT
    body = {"model": model, **_prompt(request), **_sampling(request.params, path)}
    if request.form:
        body["response_format"] = _response_format(request.form)
    try:
        return path, msgspec.json.encode(body)
    except UnicodeEncodeError as error:
        raise RefusedError("it has half a surrogate pair, which is no text") from error


def _prompt(request: Request) -> dict[str, Any]:
    if isinstance(request.prompt, str):
        return {"prompt": request.prompt} if request.raw else {"messages": [_message("user", request.prompt)]}
    if request.raw:
        raise RefusedError("a conversation cannot be continued as it is")
    return {"messages": [_message(message.role, message.content) for message in request.prompt]}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _sampling(params: SamplingParams, path: str) -> dict[str, Any]:
    """Those of its own that a server may not know only where they ask for something."""
    body: dict[str, Any] = {
        "max_tokens": params.max_tokens, "temperature": params.temperature, "top_p": params.top_p,
    }  # fmt: skip
    if params.seed is not None:
        body["seed"] = params.seed
    if params.stop:
        body["stop"] = list(params.stop)
    off = SamplingParams()
    theirs = {"top_k": "top_k", "min_p": "min_p", "repeat_penalty": "repetition_penalty"}
    asked = {name: getattr(params, name) for name in theirs if getattr(params, name) != getattr(off, name)}
    body |= {theirs[name]: value for name, value in asked.items()}
    if params.logprobs:
        body |= {"logprobs": True, "top_logprobs": params.logprobs} if path == CHAT else {"logprobs": params.logprobs}
    return body


def _response_format(form: JsonForm) -> dict[str, Any]:
    schema = msgspec.json.decode(form.schema)
    schema.pop("x-guidance", None)  # llguidance's own
    if schema == msgspec.json.decode(ANY_OBJECT):
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
