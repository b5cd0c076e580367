"""A conversation with a model: every message goes on from the KV cache that the last answer left.

chat = Chat(session)
with chat.send("Why is the sky blue?") as answer:
    for chunk in answer:
        print(chunk.text, end="", flush=True)
with chat.send("And at night?") as answer:  # computes the new tokens only
    ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol, Self

from mixlocal.app.conversation import Conversation, Overflow, fit
from mixlocal.app.run_stats import RunStats
from mixlocal.app.session import Chunk, Session, with_seed
from mixlocal.engine.generate import Finish
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import UsageError
from mixlocal.store.session_db import Turn


class Record(Protocol):
    """Where the turns of a chat are kept as they come."""

    def put(self, n: int, turn: Turn) -> None:
        """Turn `n` is this one now."""

    def truncate(self, count: int) -> None:
        """The first `count` turns stay."""


class Chat:
    """params: without a seed each answer draws its own. overflow: what to do with old turns that do not fit."""

    def __init__(
        self,
        session: Session,
        *,
        system: str = "",
        turns: Sequence[Turn] = (),
        params: SamplingParams | None = None,
        overflow: Overflow = "drop-oldest",
        record: Record | None = None,
    ) -> None:
        self.session, self.overflow, self.record = session, overflow, record
        self.params = params or session.defaults
        self.conversation = Conversation(system, list(turns))
        self.cache = session.new_cache()
        self.stats: RunStats | None = None  # of the last answer
        self._noted: set[str] = set()
        self._recorded = len(turns)  # of the turns, those that are in the record

    @property
    def turns(self) -> list[Turn]:
        return self.conversation.turns

    def send(self, text: str) -> Answer:
        """Ask, and get the answer as it comes. Raises `ContextOverflowError` if the message does not fit."""
        return self._ask([*self.turns, Turn("user", text)])

    def regenerate(self) -> Answer:
        """Answer the last message once more; the former answer stays until there is a new one."""
        return self._ask(self.turns[: self._last_question() + 1])

    def edit(self, text: str) -> Answer:
        """Replace the last message and answer it."""
        return self._ask([*self.turns[: self._last_question()], Turn("user", text)])

    def proceed(self) -> Answer:
        """Go on with the last answer, from where it was interrupted or too long."""
        if not self.turns or self.turns[-1].role != "assistant":
            raise UsageError("there is no answer to go on with", "/regen answers the last message")
        if not self.turns[-1].content:
            return self.regenerate()
        return self._ask(self.turns[:-1], begun=self.turns[-1])

    def undo(self) -> Turn:
        """Take the last message and its answer back; returns the message."""
        at = self._last_question()
        question = self.turns[at]
        self._truncate(at, at)
        return question

    def clear(self, system: str | None = None, turns: Sequence[Turn] = ()) -> None:
        """Another conversation, with the same system text if none is given; the record is the caller's to change."""
        self.conversation = Conversation(self.conversation.system if system is None else system, list(turns))
        self.stats, self._recorded = None, len(turns)

    def use(self, session: Session) -> None:
        """Go on with another model, to which the tokens of the former mean nothing."""
        self.session, self.cache = session, session.new_cache()
        self.conversation.turns = [replace(turn, ids=()) for turn in self.turns]
        self.conversation.first = 0
        self._noted.clear()

    def count_tokens(self) -> int:
        """Tokens of the context that what was said takes, as it would be sent."""
        if not self.turns:
            return 0
        last = self.turns[-1]
        if last.role == "user" or not last.content:
            return len(self._encode(self.turns, self.conversation.first))
        answer = len(last.ids) or len(self.session.tokenizer.encode(last.content))
        return len(self._encode(self.turns[:-1], self.conversation.first)) + answer

    def _ask(self, turns: list[Turn], begun: Turn | None = None) -> Answer:
        params = with_seed(self.params)
        ids = list(begun.ids or self.session.tokenizer.encode(begun.content)) if begun else []
        limit = self.session.context - min(params.max_tokens, self.session.context // 8)
        first = self.conversation.first if self.conversation.first < len(turns) else 0
        first, prompt = fit(turns, first, lambda start: self._encode(turns, start) + ids, limit, self.overflow)
        notices = self._notices(turns, first)
        self.conversation.first = first
        self._keep_question(turns)
        return Answer(self, prompt, params, ids, begun.content if begun else "", notices)

    def _encode(self, turns: Sequence[Turn], start: int) -> list[int]:
        return self.session.encode(self.conversation.messages(turns, start))

    def _notices(self, turns: list[Turn], first: int) -> list[str]:
        """What the user should hear before the answer."""
        notices = []
        gone = first - self.conversation.first
        if gone > 0:
            notices.append(
                f"the context of {self.session.context} tokens is full: the oldest {first} turns are no longer sent, "
                "so what is left is read anew; they stay in the saved session"
            )
        note = self.session.template.system_note(self.conversation.messages(turns, first))
        if note and note not in self._noted:
            self._noted.add(note)
            notices.append(note)
        return notices

    def _keep_question(self, turns: list[Turn]) -> None:
        """Record the message that is asked, if it is a new one. Whatever this raises, nothing has been said then."""
        at = len(turns) - 1
        if at < len(self.turns) and self.turns[at] is turns[at]:
            return
        self.write(at, turns[at])
        if at < len(self.turns):
            self._truncate(at, at + 1)
        self.turns.append(turns[at])

    def _truncate(self, count: int, recorded: int) -> None:
        """The first `count` turns stay, and `recorded` of the record."""
        if self.record is not None:
            self.record.truncate(recorded)
            self._recorded = min(self._recorded, recorded)
        del self.turns[count:]
        self.conversation.first = self.conversation.first if self.conversation.first < count else 0

    def write(self, n: int, turn: Turn) -> None:
        """Record turn `n`, and before it those that could not be recorded when they came."""
        if self.record is None:
            return
        for missed in range(self._recorded, n):
            self.record.put(missed, self.turns[missed])
            self._recorded = missed + 1
        self.record.put(n, turn)
        self._recorded = max(self._recorded, n + 1)

    def _last_question(self) -> int:
        questions = self.conversation.questions()
        if not questions:
            raise UsageError("nothing has been said yet", "type a message first")
        return questions[-1]


class Answer:
    """One answer on its way: iterate it, and whatever came until `end` is kept, an interrupted one too.

    notices: to be told before it. text: so far, with what it went on from. seed: what replays it.
    """

    def __init__(
        self, chat: Chat, prompt: list[int], params: SamplingParams, ids: list[int], text: str, notices: list[str]
    ) -> None:
        """ids, text: of the answer that `prompt` ends with, if it goes on with one."""
        self.notices, self.params, self.text = notices, params, text
        self.finish: Finish | None = None
        self.count = 0
        self._chat, self._ids = chat, ids
        self._at = chat.conversation.questions()[-1] + 1
        self._chunks = chat.session.stream_ids(prompt, params, continuation=bool(ids), cache=chat.cache)
        self._ended = False

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = next(self._chunks)
        if chunk.choice is not None and chunk.choice.id not in self._chat.session.tokenizer.eos_ids:
            self._ids.append(chunk.choice.id)
            self.count += 1
        self.text += chunk.text
        if chunk.finish is not None:
            self.finish, self._chat.stats = chunk.finish, chunk.stats
        return chunk

    def keep(self) -> None:
        """Record what there is by now. Raises what the record does; the chat has it then all the same."""
        turn = self._turn()
        turns = self._chat.turns
        if not self.count and self._at < len(turns):
            return  # the former answer is better than none
        turns[self._at :] = [turn]
        self._chat.write(self._at, turn)

    def end(self) -> None:
        """Stop, and record what came. Twice is as once."""
        if self._ended:
            return
        self._ended = True
        self._chunks.close()
        self.keep()

    def _turn(self) -> Turn:
        """Tokens are kept where they are the text: not where a stop string was cut off it."""
        tokenizer = self._chat.session.tokenizer
        whole = tokenizer.decode([token for token in self._ids if token < tokenizer.vocab_size])
        begun = whole.rstrip("\ufffd")  # an interrupted answer may end within a character
        text = self.text if self.finish is not None else begun
        ids = tuple(self._ids) if begun == text.rstrip("\ufffd") else ()
        return Turn("assistant", text, ids, self.finish is None, self.params.seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
