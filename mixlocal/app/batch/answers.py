"""A line of the output: OpenAI's batch output, with seed and timings; a failed row's is among them, with its error."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from typing import Any

from mixlocal.app.batch.engine import Reply, Request, TokenLogprob
from mixlocal.errors import MixlocalError, UsageError

INVALID = "invalid_request"  # the code of a row that nobody could answer


def answer_line(request: Request, reply: Reply, key: bytes, model: str) -> bytes:
    """key: of the row; the ids are made of it, so that they are the same in every run."""
    name = _name(key)
    body = {
        "id": f"{'cmpl' if request.raw else 'chatcmpl'}-{name}",
        "object": "text_completion" if request.raw else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_completion(request, reply) if request.raw else _message(request, reply)],
        "usage": {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "total_tokens": reply.prompt_tokens + reply.completion_tokens,
        },
    }
    return _line(
        {
            "id": f"batch_req_{name}", "custom_id": request.id,
            "response": {"status_code": 200, "request_id": name, "body": body}, "error": None,
            "seed": request.params.seed,
            "timings": {"ttft_s": round(reply.ttft_s, 4), "total_s": round(reply.total_s, 4)},
        }
    )  # fmt: skip


def failed_line(name: str | None, key: bytes, error: MixlocalError) -> bytes:
    """name: of the row; None where that is not known, and then the message has the line's number."""
    code = INVALID if isinstance(error, UsageError) else error.code
    message = f"{error.message} ({error.hint})" if error.hint else error.message
    return _line(
        {
            "id": f"batch_req_{_name(key)}", "custom_id": name, "response": None,
            "error": {"code": code, "message": message},
        }
    )  # fmt: skip


def _name(key: bytes) -> str:
    return base64.b32encode(key).decode().lower()[:24]


def _line(value: dict[str, Any]) -> bytes:
    """All but ASCII is escaped: nothing in it can end a line or steer a terminal, and half characters survive."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _message(request: Request, reply: Reply) -> dict[str, Any]:
    logprobs = None
    if request.params.logprobs:
        logprobs = {"content": [_token(entry) for entry in reply.logprobs]}
    return {
        "index": 0, "message": {"role": "assistant", "content": reply.text}, "logprobs": logprobs,
        "finish_reason": reply.finish,
    }  # fmt: skip


def _token(entry: TokenLogprob) -> dict[str, Any]:
    def one(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": _text(token), "bytes": list(token), "logprob": _finite(logprob)}

    return one(entry.token, entry.logprob) | {"top_logprobs": [one(*pair) for pair in entry.top]}


def _completion(request: Request, reply: Reply) -> dict[str, Any]:
    logprobs = None
    if request.params.logprobs:
        logprobs = {
            "tokens": [_text(entry.token) for entry in reply.logprobs],
            "token_logprobs": [_finite(entry.logprob) for entry in reply.logprobs],
            "top_logprobs": [{_text(token): _finite(value) for token, value in entry.top} for entry in reply.logprobs],
            "text_offset": _offsets(reply.logprobs),
        }
    return {"index": 0, "text": reply.text, "logprobs": logprobs, "finish_reason": reply.finish}


def _offsets(entries: Sequence[TokenLogprob]) -> list[int]:
    """Where in the answer's text each token begins, as its tokens are shown."""
    offsets, position = [], 0
    for entry in entries:
        offsets.append(position)
        position += len(_text(entry.token))
    return offsets


def _text(token: bytes) -> str:
    return token.decode(errors="replace")


def _finite(logprob: float) -> float:
    """JSON has no minus infinity; OpenAI writes this for the unlikeliest."""
    return max(logprob, -9999.0)
