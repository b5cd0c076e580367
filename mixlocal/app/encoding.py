"""A prompt to token ids."""

from __future__ import annotations

from collections.abc import Sequence

from mixlocal.app.template import ChatTemplate, Message
from mixlocal.app.tokenizer import Tokenizer


def encode_prompt(
    prompt: str | Sequence[Message], template: ChatTemplate, tokenizer: Tokenizer, *, raw: bool, prefill: str
) -> list[int]:
    """Token ids of a conversation in the model's chat format, or of plain text with `raw`. prefill: of the answer."""
    if raw:
        text = prompt if isinstance(prompt, str) else "".join(message.content for message in prompt)
        bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
        return bos + tokenizer.encode(text + prefill)
    messages = [Message("user", prompt)] if isinstance(prompt, str) else prompt
    return template.encode(messages, tokenizer, prefill=prefill)
