"""What has been said, and how much of it fits a context."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mixlocal.app.template import Message
from mixlocal.errors import ContextOverflowError
from mixlocal.store.session_db import Turn

Overflow = Literal["error", "drop-oldest"]
KEPT_SHARE = 0.75  # of the context, once turns must go: dropping one at each message would prefill all at each message


@dataclass(slots=True)
class Conversation:
    """system: empty for none. turns: all of them; `first`: the first that is still sent to the model."""

    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    first: int = 0

    def messages(self, turns: Sequence[Turn], first: int) -> list[Message]:
        """What the model sees. A message that got no answer is asked together with the next."""
        messages = [Message("system", self.system)] if self.system else []
        for turn in turns[first:]:
            if turn.role == "user" and messages and messages[-1].role == "user":
                messages[-1] = Message("user", f"{messages[-1].content}\n\n{turn.content}")
            elif turn.role == "user" or turn.content:
                messages.append(Message(turn.role, turn.content, turn.ids))
        return messages

    def questions(self) -> list[int]:
        """Where the user's turns are: a conversation can be cut before each."""
        return [n for n, turn in enumerate(self.turns) if turn.role == "user"]


def fit(
    turns: Sequence[Turn], first: int, encode: Callable[[int], list[int]], limit: int, overflow: Overflow
) -> tuple[int, list[int]]:
    """(first turn to send, its prompt): as many of the newest as `limit` tokens hold. encode: the prompt from one on.

    Raises `ContextOverflowError` where nothing may be dropped, or the last question alone is too long.
    """
    ids = encode(first)
    if len(ids) <= limit:
        return first, ids
    starts = [n for n, turn in enumerate(turns) if turn.role == "user" and n > first]
    if overflow == "error" or not starts:
        raise _too_long(len(ids), limit, overflow)
    prompts: dict[int, list[int]] = {}

    def fits(start: int) -> bool:
        prompts[start] = encode(start)
        return len(prompts[start]) <= limit * KEPT_SHARE

    start = starts[min(bisect_left(starts, True, key=fits), len(starts) - 1)]
    if len(prompts[start]) > limit:
        raise _too_long(len(prompts[start]), limit, overflow)
    return start, prompts[start]


def _too_long(tokens: int, limit: int, overflow: Overflow) -> ContextOverflowError:
    what = "the conversation" if overflow == "error" else "the last message alone"
    other = ", or let old turns go: --on-overflow drop-oldest" if overflow == "error" else ""
    message = f"{what} has {tokens} tokens and the context has room for {limit}"
    return ContextOverflowError(message, f"shorten it, raise --ctx{other}")
