"""A conversation: what is computed again, what is kept, what is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import tiny
from stores import quantized

from mixlocal.app.chat import Answer, Chat
from mixlocal.app.session import Chunk, Session
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import ContextOverflowError, DiskFullError, UsageError
from mixlocal.store.session_db import Turn

PARAMS = SamplingParams(max_tokens=12, seed=5, temperature=1.0)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    root = tmp_path_factory.mktemp("chat")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=512)
    store = quantized(checkpoint, root / "tiny", template="mistral-v1")
    with Session.open(str(store.folder)) as session:
        yield session


class Notebook:
    """A record that remembers what it was told, unless its disk is full."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.full = False

    def put(self, n: int, turn: Turn) -> None:
        if self.full:
            raise DiskFullError("no space left on device")
        assert n <= len(self.turns)
        self.turns[n : n + 1] = [turn]

    def truncate(self, count: int) -> None:
        del self.turns[count:]


@pytest.fixture
def chat(session: Session) -> Chat:
    return Chat(session, params=PARAMS, record=Notebook())


def finish(answer: Answer, tokens: int | None = None) -> list[Chunk]:
    """All of an answer, or so many tokens of it and then an interrupt."""
    with answer:
        chunks = []
        for chunk in answer:
            chunks.append(chunk)
            if tokens is not None and answer.count == tokens:
                break
    return chunks


def prefilled(chunks: list[Chunk]) -> tuple[int, int]:
    """(tokens that were there, tokens that were computed)."""
    first = chunks[0].prefilled
    assert first is not None
    return first.kept, first.total - first.kept


def test_a_second_turn_computes_only_what_is_new(chat: Chat) -> None:
    finish(chat.send("Hello there, how are you?"))
    before = chat.cache.length
    kept, computed = prefilled(finish(chat.send("Fine?")))
    assert kept == before
    assert computed == 1 + len("</s>") - 3 + len("[INST] Fine? [/INST]")  # the last token of the answer, and the turn
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 2


def test_answers_are_those_of_a_chat_that_computes_everything(chat: Chat, session: Session) -> None:
    """Bit for bit: probabilities too."""
    finish(chat.send("Hello there"))
    finish(chat.send("And now?"))
    again = Chat(session, params=PARAMS, turns=chat.turns[:2])
    fresh = finish(again.send("And now?"))
    assert prefilled(fresh)[0] == 0
    chat.undo()
    reused = finish(chat.send("And now?"))
    assert prefilled(reused)[0] > 20
    assert [chunk.choice for chunk in reused] == [chunk.choice for chunk in fresh]
    assert again.turns == chat.turns


@pytest.mark.parametrize("how", ["undo", "regenerate", "edit", "proceed"])
def test_going_back_keeps_what_was_computed(chat: Chat, how: str) -> None:
    finish(chat.send("Hello there"))
    finish(chat.send("Tell me more"))
    if how == "undo":
        assert chat.undo().content == "Tell me more"
        assert len(chat.turns) == 2
        answer = chat.send("Tell me all")
    else:
        edit = partial(chat.edit, "Tell me all")
        answer = {"regenerate": chat.regenerate, "edit": edit, "proceed": chat.proceed}[how]()
    kept, computed = prefilled(finish(answer))
    assert kept > 40
    assert computed <= {"undo": 15, "regenerate": 1, "edit": 15, "proceed": 1}[how]
    assert [turn.role for turn in chat.turns] == ["user", "assistant"] * 2
    assert chat.turns[2].content == ("Tell me more" if how in ("regenerate", "proceed") else "Tell me all")
    assert chat.record.turns == chat.turns


def test_an_interrupted_answer_is_kept_and_goes_on(chat: Chat, session: Session) -> None:
    """Together they are what an uninterrupted answer would have been: at temperature 0."""
    chat.params = SamplingParams(max_tokens=16, temperature=0, seed=1)
    finish(chat.send("Hello there"))
    whole = chat.turns[-1]
    chat.undo()
    finish(chat.send("Hello there"), tokens=6)
    part = chat.turns[-1]
    assert part.interrupted
    assert part.ids == whole.ids[:6]
    assert part.content == session.tokenizer.decode(part.ids).rstrip("\ufffd")
    chat.params = SamplingParams(max_tokens=10, temperature=0, seed=1)
    finish(chat.proceed())
    assert chat.turns[-1].ids == whole.ids
    assert chat.turns[-1].content == whole.content
    assert not chat.turns[-1].interrupted
    assert chat.record.turns == chat.turns


def test_an_interrupt_before_the_first_token(chat: Chat) -> None:
    """The message stays, and is asked together with the next one."""
    with chat.send("First question"):
        pass
    assert chat.turns == [Turn("user", "First question"), Turn("assistant", "", (), True, 5)]
    messages = chat.conversation.messages([*chat.turns, Turn("user", "second")], 0)
    assert [(m.role, m.content) for m in messages] == [("user", "First question\n\nsecond")]
    finish(chat.proceed())
    assert len(chat.turns) == 2
    assert chat.turns[1].content


def test_a_new_answer_that_never_began_leaves_the_former(chat: Chat) -> None:
    finish(chat.send("Hello"))
    former = chat.turns[-1]
    with chat.regenerate():
        pass
    assert chat.turns[-1] == former
    assert chat.record.turns == chat.turns
    finish(chat.regenerate(), tokens=3)
    assert chat.turns[-1] != former


def test_what_came_so_far_can_be_kept_at_any_time(chat: Chat) -> None:
    """A crash behind `keep` takes nothing of what came before it."""
    with chat.send("Hello") as answer:
        for _ in answer:
            if answer.count:
                answer.keep()
                assert chat.record.turns[-1].ids == tuple(answer._ids)
                assert chat.record.turns[-1].interrupted == (answer.finish is None)
    assert len(chat.record.turns) == 2


@pytest.mark.parametrize("how", ["send", "edit"])
def test_a_full_disk_refuses_a_message_and_loses_nothing(chat: Chat, how: str) -> None:
    finish(chat.send("Hello"))
    before = list(chat.turns)
    chat.record.full = True
    with pytest.raises(DiskFullError):
        getattr(chat, how)("And now?")
    assert chat.turns == before == chat.record.turns
    chat.record.full = False
    finish(getattr(chat, how)("And now?"))
    assert chat.record.turns == chat.turns
    assert [turn.content for turn in chat.turns if turn.role == "user"][-1] == "And now?"


def test_an_answer_that_could_not_be_recorded_is_recorded_later(chat: Chat) -> None:
    answer = chat.send("Hello")
    chat.record.full = True
    with pytest.raises(DiskFullError):
        finish(answer)
    assert len(chat.turns) == 2
    assert len(chat.record.turns) == 1
    chat.record.full = False
    finish(chat.send("And now?"))
    assert len(chat.turns) == 4
    assert chat.record.turns == chat.turns


def test_tokens_are_not_kept_where_a_stop_string_was_cut_off(chat: Chat) -> None:
    finish(chat.send("Hello"))
    text = chat.turns[-1].content
    stop = next(character for character in text[1:] if character != "\ufffd")
    chat.undo()
    chat.params = SamplingParams(max_tokens=12, seed=5, temperature=1.0, stop=(stop,))
    finish(chat.send("Hello"))
    assert chat.turns[-1].content == text[: text.index(stop)]
    assert chat.turns[-1].ids == ()
    assert not chat.turns[-1].interrupted


def test_old_turns_go_when_the_context_is_full_and_it_is_said(session: Session) -> None:
    chat = Chat(session, params=PARAMS, system="Be brief.", record=Notebook())
    notices = []
    for n in range(12):
        answer = chat.send(f"question number {n} " + "and so on " * 4)
        notices += answer.notices
        finish(answer)
    full = [notice for notice in notices if "context of 512 tokens is full" in notice]
    assert 1 < len(full) < 10  # not at every message: room is made for several
    assert len(chat.turns) == len(chat.record.turns) == 24
    first = chat.conversation.first
    assert first >= 6
    assert first % 2 == 0
    assert chat.turns[first].role == "user"
    sent = chat.conversation.messages(chat.turns, first)
    assert (sent[0].role, sent[0].content) == ("system", "Be brief.")
    assert chat.count_tokens() <= 512
    assert chat.cache.length <= 512


def test_overflow_by_the_other_policy_changes_nothing(session: Session) -> None:
    chat = Chat(session, params=PARAMS, overflow="error", record=Notebook())
    finish(chat.send("short"))
    before = list(chat.turns)
    with pytest.raises(ContextOverflowError, match=r"has \d+ tokens and the context has room for 500"):
        chat.send("x" * 480)
    assert chat.turns == before == chat.record.turns
    finish(chat.send("still here"))


@pytest.mark.parametrize("policy", ["error", "drop-oldest"])
def test_a_message_that_alone_is_too_long(session: Session, policy: str) -> None:
    chat = Chat(session, params=PARAMS, overflow=policy)
    finish(chat.send("short"))
    with pytest.raises(ContextOverflowError):
        chat.send("x" * 700)
    assert len(chat.turns) == 2


def test_the_context_s_end_ends_an_answer(session: Session) -> None:
    chat = Chat(session, params=SamplingParams(max_tokens=5000, seed=3, temperature=1.0))
    chunks = finish(chat.send("x" * 300))
    if chunks[-1].finish == "length":
        assert chat.cache.length == session.context - 1
    else:
        assert chunks[-1].finish == "stop"


def test_a_system_text_without_a_role_is_told_once(session: Session) -> None:
    chat = Chat(session, params=PARAMS, system="Be brief.")
    assert any("no system role" in notice for notice in chat.send("a").notices)
    assert chat.send("b").notices == []
    assert Chat(session, params=PARAMS).send("a").notices == []


def test_a_seed_is_drawn_for_each_answer(session: Session) -> None:
    chat = Chat(session, params=SamplingParams(max_tokens=8, temperature=1.5))
    seeds = {chat.send("Hello").params.seed for _ in range(3)}
    assert len(seeds) == 3
    assert None not in seeds


@pytest.mark.parametrize("what", ["regenerate", "undo", "proceed"])
def test_nothing_said_yet(session: Session, what: str) -> None:
    with pytest.raises(UsageError):
        getattr(Chat(session), what)()


def test_another_model_gets_no_tokens_of_the_former(chat: Chat, session: Session) -> None:
    finish(chat.send("Hello"))
    assert chat.turns[-1].ids
    chat.use(session)
    assert chat.turns[-1].ids == ()
    assert prefilled(finish(chat.send("again")))[0] == 0
