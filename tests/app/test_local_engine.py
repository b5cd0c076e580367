"""A batch on this machine: each row is answered as if it were alone, and what is wrong with one is its own affair."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from stores import quantized

from mixlocal.app.batch.engine import Pulse, Reply, Request
from mixlocal.app.batch.engines import local_identity
from mixlocal.app.batch.local import LocalEngine
from mixlocal.app.json_form import read_form
from mixlocal.app.session import Chunk, Session
from mixlocal.app.template import Message
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import ContextOverflowError, CorruptError, SchemaError, UsageError
from mixlocal.model.transformer import Transformer
from mixlocal.store.manifest import read_manifest

CONTEXT = 512
SCHEMA = read_form(b'{"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 2, "maxItems": 4}', "it")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batch")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=CONTEXT)
    return quantized(checkpoint, root / "models" / "tiny" / "q4", template="mistral-v1").folder


@pytest.fixture(scope="module")
def session(store: Path) -> Iterator[Session]:
    with Session.open(str(store), sequences=8) as opened:
        yield opened


def params(**given: object) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 30, "seed": 5} | given)


def rows() -> list[Request]:
    """Of every kind, some of which fail."""
    conversation = (Message("user", "One"), Message("assistant", "Two"), Message("user", "Three"))
    kinds = [
        Request("plain", "Hello", params()),
        Request("greedy", "Hello", params(temperature=0)),
        Request("conversation", conversation, params(seed=9)),
        Request("raw", "Once upon a time", params(seed=1), raw=True),
        Request("stop", "Hello", params(max_tokens=200, stop=("e", "ab"))),
        Request("logprobs", "Hi", params(logprobs=3)),
        Request("hot", "Hi", params(temperature=50.0, top_p=1.0, max_tokens=300)),
        Request("form", "List", params(max_tokens=100), form=SCHEMA),
        Request("long", "y" * (CONTEXT - 20), params(max_tokens=300), raw=True),
        Request("full", "y" * CONTEXT, params(), raw=True),
        Request("nothing", "Hello", params(max_tokens=0)),
        Request("too long", "y" * (CONTEXT + 1), params(), raw=True),
        Request("empty", "", params(), raw=True),
        Request("cut form", "List", params(max_tokens=2), form=SCHEMA),
    ]
    return [replace(row, id=f"{row.id} {n}") for n in range(3) for row in kinds]


def singly(session: Session, row: Request) -> list[Chunk]:
    return list(session.stream(row.prompt, row.params, raw=row.raw))


def test_each_row_is_answered_as_alone(session: Session) -> None:
    replies = {reply.id: reply for reply in session.batch(rows())}
    assert replies.keys() == {row.id for row in rows()}
    for row in rows():
        reply = replies[row.id]
        if row.form or reply.error:
            continue
        chunks = singly(session, row)
        assert reply.text == "".join(chunk.text for chunk in chunks), row.id
        assert reply.finish == chunks[-1].finish
        stats = chunks[-1].stats
        assert stats is not None
        assert (reply.prompt_tokens, reply.completion_tokens) == (stats.prompt_tokens, stats.completion_tokens)
        choices = [c.choice for c in chunks if c.choice and c.choice.id not in session.tokenizer.eos_ids]
        assert reply.token_ids == tuple(choice.id for choice in choices)
        if row.params.logprobs:
            assert [place.logprob for place in reply.logprobs] == [choice.logprob for choice in choices]
            assert [len(place.top) for place in reply.logprobs] == [3] * len(choices)
            assert reply.logprobs[0].token == session.token_bytes(choices[0].id)
        else:
            assert reply.logprobs == ()
        assert 0 <= reply.ttft_s <= reply.total_s
    for row_id, reply in replies.items():
        kind = row_id.rsplit(" ", 1)[0]
        if kind == "form":
            assert set(json.loads(reply.text)) <= {1, 22, 333}
    assert (replies["full 0"].text, replies["full 0"].finish) == ("", "length")


def test_what_is_wrong_with_a_row_is_its_own_affair(session: Session) -> None:
    errors = {reply.id[:-2]: reply.error for reply in session.batch(rows()) if reply.error is not None}
    assert {name: type(error) for name, error in errors.items()} == {
        "too long": ContextOverflowError, "empty": UsageError, "cut form": SchemaError
    }  # fmt: skip
    assert errors["empty"].message == "the prompt is empty"
    assert f"context holds {CONTEXT}" in errors["too long"].message


def test_logits_that_are_no_numbers_fail_their_row_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, mark = Transformer.forward_many, session.tokenizer.encode("!")[0]

    def broken(self: Transformer, pieces: list, **given: bool) -> torch.Tensor:
        logits = forward(self, pieces, **given).clone()
        for row, piece in zip(logits, pieces, strict=True):
            if mark in piece.cache.ids[:3] and piece.cache.length > 6:
                row[:] = torch.nan
        return logits

    monkeypatch.setattr(Transformer, "forward_many", broken)
    work = [Request(text, text, params(temperature=0), raw=True) for text in ("abc", "!bc", "xyz")]
    replies = {reply.id: reply for reply in session.batch(work)}
    assert isinstance(replies["!bc"].error, CorruptError)
    assert replies["abc"].error is replies["xyz"].error is None


def test_rows_are_taken_when_there_is_room(session: Session) -> None:
    """At most `concurrency` beyond those that are done, and the generator is not asked again once it has ended."""
    engine = LocalEngine(session, 3)
    assert engine.concurrency == 3
    taken, ended = 0, 0

    def source() -> Iterator[Request]:
        nonlocal taken, ended
        for number in range(20):
            taken += 1
            yield Request(str(number), "Hello", params(seed=number, max_tokens=1 + number % 7))
        ended += 1

    done = 0
    for event in engine.answer(source()):
        if isinstance(event, Reply):
            assert taken - done <= 3
            done += 1
    assert (done, taken, ended) == (20, 20, 1)


def test_no_more_at_once_than_memory_was_planned_for(session: Session) -> None:
    assert LocalEngine(session, 100).concurrency == LocalEngine(session).concurrency == 8


def test_pulses_tell_how_it_goes(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlocal.app.batch.local.PULSE_SECONDS", 0.0)
    events = list(LocalEngine(session).answer(iter(rows()[:4])))
    pulses = [event for event in events if isinstance(event, Pulse)]
    assert pulses[0].running == 4
    assert 0 < pulses[0].generated < pulses[-1].generated <= 120
    assert all(a.read <= b.read and a.generated <= b.generated for a, b in pairwise(pulses))
    assert pulses[-1].found is not None
    assert pulses[-1].found["ram"] > 0 == pulses[-1].found["disk"]


def test_closing_gives_up_and_the_session_goes_on(session: Session) -> None:
    running = LocalEngine(session).answer(iter(rows()))
    next(running)
    running.close()
    assert [reply.id for reply in session.batch(["Hello"])] == ["0"]


def test_texts_have_the_models_own_sampling(session: Session) -> None:
    replies = list(session.batch(["Hello", "Good day"]))
    assert {reply.id for reply in replies} == {"0", "1"}
    assert all(reply.error is None and reply.completion_tokens for reply in replies)


def test_an_engine_says_what_was_said_of_it_before(session: Session, store: Path) -> None:
    assert LocalEngine(session).identity == local_identity(read_manifest(store), session.run.options)
