"""A conversation to token ids.

Every template first makes a list of parts, text that we or the model's author wrote (trusted) and text of the
conversation (not trusted), and `encode_parts` turns them into ids so that only trusted text can hold control tokens.
An answer that comes with its tokens keeps them: so the tokens of one turn are the beginning of those of the next, and
the KV cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol

from mixlocal.app.tokenizer import ControlSpan, Tokenizer
from mixlocal.errors import RefusedError, UsageError

MAX_TEMPLATE_BYTES = 64 << 10
SYSTEM_NOTE = "this model's format has no system role: its text goes before your first message"
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    ids: the tokens that this answer was generated as; its text is encoded where there are none.
    """

    role: Literal["system", "user", "assistant"]
    content: str
    ids: tuple[int, ...] = ()


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

    def system_note(self, messages: Sequence[Message]) -> str | None:
        """What a user should be told of where the system text goes in this conversation, if it has no role."""


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the prompt; only a trusted one may hold control tokens. ids: stand for the text as they are."""

    text: str
    trusted: bool = False
    ids: tuple[int, ...] = ()


def encode_parts(parts: Sequence[Part], tokenizer: Tokenizer) -> list[int]:
    """Token ids of parts joined together, control tokens read in trusted text only.

    Between parts that bring their ids, the text is encoded by itself: so it has the ids that it had as a prompt.
    """
    ids: list[int] = []
    run: list[Part] = []
    for part in parts:
        if part.ids:
            ids += [*_encode_run(run, tokenizer, bool(ids)), *part.ids]
            run = []
        else:
            run.append(part)
    return ids + _encode_run(run, tokenizer, bool(ids))


def _encode_run(run: Sequence[Part], tokenizer: Tokenizer, goes_on: bool) -> list[int]:
    """Ids of parts without ids. goes_on: other tokens come before.

    Such a text has no first word, before which a tokenizer of the sentencepiece kind would put a space of its own.
    """
    if not goes_on or tokenizer.byte_level:
        return _encode_joined(run, tokenizer)
    line = tokenizer.encode("\n")
    ids = _encode_joined([Part("\n"), *run], tokenizer)
    return ids[len(line) :] if ids[: len(line)] == line else _encode_joined(run, tokenizer)


def _encode_joined(parts: Sequence[Part], tokenizer: Tokenizer) -> list[int]:
    """Token ids of the joined text.

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


def merge_system(messages: Sequence[Message]) -> list[Message]:
    """The turns, the system text and a blank line before the first user's."""
    system, turns = split_system(messages)
    if system:
        turns[0] = replace(turns[0], content=f"{system}\n\n{turns[0].content}")
    return turns


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
        turns = merge_system(messages)
        self._check_order(turns)
        check_answerable(turns, add_generation_prompt, prefill)
        if tokenizer.bos_id is None or not tokenizer.eos_ids:
            raise RefusedError("the mistral-v1 template needs a tokenizer with BOS and EOS tokens")
        ids = [tokenizer.bos_id]
        for turn in turns:
            if turn.role == "user":
                ids += tokenizer.encode(f"[INST] {turn.content} [/INST]")
            else:
                ids += [*(turn.ids or tokenizer.encode(turn.content)), tokenizer.eos_ids[0]]
        return ids + tokenizer.encode(prefill)

    def system_note(self, messages: Sequence[Message]) -> str | None:
        return SYSTEM_NOTE if split_system(messages)[0] else None

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
            content = Part(message.content, ids=message.ids)
            parts += [Part(f"<|im_start|>{message.role}\n", True), content, Part("<|im_end|>\n", True)]
        if add_generation_prompt:
            parts += [Part("<|im_start|>assistant\n", True), Part(prefill)]
        return encode_parts(parts, tokenizer)

    def system_note(self, messages: Sequence[Message]) -> str | None:
        return None


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

    def system_note(self, messages: Sequence[Message]) -> str | None:
        return None
