"""Batches that a server answers: what is asked, what is made of the answers, and what of a server that fails."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_answer import Answer, json_answer
from openai_double import (
    MODEL,
    Ask,
    OpenAIDouble,
    chat_answer,
    complaint,
    cut,
    dropped,
    expected,
    good_answer,
    silent,
    text_answer,
)

from mixlocal.app.batch import openai_crew, openai_retries
from mixlocal.app.batch.engine import Pulse, Reply, Request, TokenLogprob
from mixlocal.app.batch.openai_answer import decode
from mixlocal.app.batch.openai_engine import OpenAIEngine
from mixlocal.app.batch.openai_request import encode
from mixlocal.app.json_form import ANY_OBJECT, read_form
from mixlocal.app.template import Message
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import (
    AccessError,
    ContextOverflowError,
    NetworkError,
    NotFoundError,
    RefusedError,
    SchemaError,
    UsageError,
)
from mixlocal.store.patience import Patience, TryAgainError

QUICK = Patience(give_up=0.5, reach=0.3, read=5.0, longest_wait=0.3)
SCHEMA = b'{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
Fault = Callable[[Ask], Answer | None]


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_retries, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(openai_retries, "WAIT_LIMIT", 0.05)


def rows(count: int) -> Iterator[Request]:
    return (Request(f"row-{n}", f"prompt {n}", SamplingParams(seed=n)) for n in range(count))


def engine(server: OpenAIDouble, concurrency: int = 4, **options: Any) -> OpenAIEngine:
    return OpenAIEngine(server.base_url, MODEL, concurrency, **{"patience": QUICK, **options})


def run(server: OpenAIDouble, requests: Iterator[Request], concurrency: int = 4, **options: Any) -> list[Reply]:
    events = engine(server, concurrency, **options).answer(requests)
    return [event for event in events if isinstance(event, Reply)]


def check(replies: list[Reply], count: int, failed: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Each of the rows once, with its own answer or, if it is to have failed, without."""
    assert sorted(reply.id for reply in replies) == sorted(f"row-{n}" for n in range(count))
    assert {reply.id for reply in replies if reply.error} == failed
    for reply in replies:
        if not reply.error:
            n = int(reply.id.removeprefix("row-"))
            assert reply.text == expected(f"prompt {n}", n)


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "batch-openai"]


def one(fault: Fault, **options: Any) -> Reply:
    with OpenAIDouble(fault=fault) as server:
        (reply,) = run(server, rows(1), **options)
    return reply


# What is asked


def body(request: Request) -> dict[str, Any]:
    return json.loads(encode(request, "m")[1])


def test_a_request_as_it_is_sent() -> None:
    params = SamplingParams(0.5, 0.9, 40, 0.05, 1.1, 99, 7, ("a", "b"), 2)
    form = read_form(SCHEMA, "schema")
    talk = (Message("system", "be kind", (1,)), Message("user", "hi", (2, 3)), Message("assistant", "yes?", (4,)))
    sampling = {
        "max_tokens": 99, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["a", "b"], "top_k": 40, "min_p": 0.05,
        "repetition_penalty": 1.1,
    }  # fmt: skip
    schema = {"name": "answer", "strict": True, "schema": json.loads(SCHEMA)}
    path, sent = encode(Request("1", talk, params, form=form), "m")
    assert path == "chat/completions"
    assert json.loads(sent) == sampling | {
        "model": "m",
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes?"},
        ],
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    path, sent = encode(Request("1", "once", params, raw=True), "m")
    assert path == "completions"
    assert json.loads(sent) == sampling | {"model": "m", "prompt": "once", "logprobs": 2}


def test_what_a_server_may_not_know_is_sent_only_where_it_matters() -> None:
    sent = body(Request("1", "hi", SamplingParams()))
    assert sent == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 512, "temperature": 0.7,
        "top_p": 0.95,
    }  # fmt: skip
    any_object = body(Request("1", "hi", SamplingParams(), form=read_form(ANY_OBJECT.encode(), "form")))
    assert any_object["response_format"] == {"type": "json_object"}


def test_what_cannot_be_sent() -> None:
    half = Request("1", "a\ud800", SamplingParams())
    with pytest.raises(RefusedError, match="half a surrogate pair"):
        encode(half, "m")
    with pytest.raises(RefusedError, match="continued as it is"):
        encode(Request("1", (Message("user", "hi"),), SamplingParams(), raw=True), "m")
    with OpenAIDouble() as server:
        replies = run(server, iter([half, *rows(3)]))
    assert {reply.id for reply in replies if reply.error} == {"1"}
    assert len(replies) == 4


# What is made of an answer


def read(answer: Answer, **request: Any) -> Reply:
    given = {"prompt": "hi", "params": SamplingParams(logprobs=2), **request}
    return decode(Request("1", **given), b"".join(answer.body))  # type: ignore[arg-type]


def test_an_answer() -> None:
    reply = read(chat_answer("Grüße 😀\0\x1b[2J", 3, "length"))
    assert reply == Reply("1", "Grüße 😀\0\x1b[2J", "length", 3, 12)
    assert read(text_answer("x", 3), raw=True) == Reply("1", "x", "stop", 3, 1)
    assert read(chat_answer(None)).text == ""


def test_log_probabilities() -> None:
    top = [{"token": "a", "logprob": -0.5, "bytes": [97]}, {"token": "ü", "logprob": -2, "bytes": None}]
    given = {"content": [{**top[0], "top_logprobs": top}, {"token": "\ufffd", "logprob": -1, "bytes": [195]}]}
    found = read(chat_answer("a", logprobs=given)).logprobs
    assert found == (
        TokenLogprob(b"a", -0.5, ((b"a", -0.5), ("ü".encode(), -2.0))),
        TokenLogprob(b"\xc3", -1.0),
    )
    given = {
        "tokens": ["x", "y"], "token_logprobs": [None, -1], "top_logprobs": [None, {"y": -1, "z": -3}],
        "text_offset": [0, 1],
    }  # fmt: skip
    assert read(text_answer("xy", logprobs=given), raw=True).logprobs == (
        TokenLogprob(b"y", -1.0, ((b"y", -1.0), (b"z", -3.0))),
    )
    assert read(chat_answer("a", logprobs=given), params=SamplingParams()).logprobs == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (rb"a\ud83d", "a\ufffd"), (rb"\ude00\ud83d\ude00", "\ufffd😀"), (rb"\\ud83d", "\\ud83d"),
        (b"a\xff\xc3", "a\ufffd\ufffd"), (rb"\ud83d\ud83d\ude00", "\ufffd😀"), (rb"\u0000\"", '\0"'),
    ],
)  # fmt: skip
def test_half_characters_are_marked(text: bytes, found: str) -> None:
    data = b'{"choices": [{"message": {"content": "%b"}, "finish_reason": "stop"}]}' % text
    assert decode(Request("1", "hi", SamplingParams()), data).text == found


DEEP = b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
CHOICE = '{{"choices": [{{"message": {{"content": "a"}}, "finish_reason": "stop"{}}}]{}}}'


@pytest.mark.parametrize(
    "data",
    [
        b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": [{"message": 5}]}', DEEP,
        b'{"choices": [{"message": {"content": ["a"]}}]}',
        CHOICE.format("", ', "usage": {"prompt_tokens": -1}').encode(),
        CHOICE.format("", ', "usage": {"prompt_tokens": NaN}').encode(),
        CHOICE.format("", ', "usage": {"prompt_tokens": 99999999999999999999}').encode(),
        CHOICE.format(', "logprobs": {"content": [{"token": "a", "logprob": 1e999}]}', "").encode(),
        CHOICE.format(', "logprobs": {"content": [{"token": "a", "logprob": 0, "bytes": [256]}]}', "").encode(),
        CHOICE.format("", "")[:-1].encode(),
    ],
)  # fmt: skip
def test_what_is_no_answer(data: bytes) -> None:
    with pytest.raises(TryAgainError, match="server's answer is none") as raised:
        decode(Request("1", "hi", SamplingParams(logprobs=1)), data)
    assert len(raised.value.reason) < 400


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (chat_answer("a", finish="content_filter"), "another reason: content_filter"),
        (chat_answer("a", finish=None), "another reason: None"),
        (chat_answer("a", finish="x\n" * 5000), "another reason: x x"),
        (chat_answer(None, message={"content": None, "refusal": "I\nwill not"}), "the model refuses: I will not"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for(answer: Answer, message: str) -> None:
    with pytest.raises(RefusedError, match=message) as raised:
        read(answer)
    assert len(raised.value.message) < 400


def test_an_answer_that_the_server_dropped_is_asked_for_again() -> None:
    reply = one(lambda ask: chat_answer("", finish="abort") if ask.attempt == 1 else None)
    assert reply.text == expected("prompt 0", 0)


def test_json_that_is_none() -> None:
    form = read_form(SCHEMA, "schema")
    cases = [(chat_answer('{"a": 1}'), True), (chat_answer('{"a"', finish="length"), False), (chat_answer("no"), False)]
    for answer, good in cases:
        reply = read(answer, form=form)
        assert reply.text
        assert isinstance(reply.error, SchemaError) != good


# The model


def test_the_only_model_of_a_server() -> None:
    with OpenAIDouble(["a/b"]) as server:
        found = OpenAIEngine(server.base_url + "/")
        assert found.identity == {"engine": "openai", "model": "a/b"}
        assert (found.concurrency, found.defaults) == (32, SamplingParams())
        assert next(iter(found.answer(rows(1)))).id == "row-0"
        assert [request.path for request in server.requests] == ["/v1/models", "/v1/chat/completions"]
        assert server.asks[0].body["model"] == "a/b"


@pytest.mark.parametrize(
    ("models", "message"),
    [((), "serves no model"), (("a", "b\n" * 999), "several models: a, b b"), (map(str, range(30)), "9 and 20 more")],
)
def test_a_server_with_more_models_or_none(models: Any, message: str) -> None:
    with OpenAIDouble(list(models)) as server, pytest.raises(UsageError, match=message) as raised:
        _ = OpenAIEngine(server.base_url).identity
    assert len(raised.value.message) < 500


def test_a_named_model_is_not_looked_for() -> None:
    assert OpenAIEngine("http://nobody.invalid/v1", "m").identity == {"engine": "openai", "model": "m"}


def test_no_list_of_models() -> None:
    for listing, kind, message in (
        (complaint(404), UsageError, "no list of models"), (complaint(401, "who?"), AccessError, "who?"),
        (complaint(500), NetworkError, "500"),
    ):  # fmt: skip
        with OpenAIDouble(listing=listing) as server, pytest.raises(kind, match=message):
            _ = OpenAIEngine(server.base_url, patience=QUICK).identity


@pytest.mark.parametrize("concurrency", [0, -1, 1025])
def test_a_concurrency_out_of_range(concurrency: int) -> None:
    with pytest.raises(UsageError, match="concurrency"):
        OpenAIEngine("http://x/v1", "m", concurrency)


# Many at once


def test_each_is_asked_once_as_many_at_a_time_as_allowed() -> None:
    taken: list[str] = []

    def watched() -> Iterator[Request]:
        for request in rows(60):
            taken.append(request.id)
            yield request

    with OpenAIDouble(seconds=0.02) as server:
        replies = []
        for event in engine(server, 6).answer(watched()):
            if isinstance(event, Reply):
                replies.append(event)
                assert len(taken) < len(replies) + 6
        assert server.peak == 6
        assert len(server.asks) == 60
        assert set(server.answered.values()) == {1}
    check(replies, 60)
    assert all(0.02 <= reply.total_s < 5 and reply.prompt_tokens and reply.completion_tokens for reply in replies)


def test_replies_come_as_they_finish() -> None:
    def slow_first(ask: Ask) -> Answer:
        wait = 0.4 if ask.prompt == "prompt 0" else 0
        good = good_answer(ask.path, ask.body)
        return Answer(good.status, good.headers, good.body, wait=wait)

    with OpenAIDouble(fault=slow_first) as server:
        assert [reply.id for reply in run(server, rows(20))][-1] == "row-0"


def test_nothing_to_ask() -> None:
    with OpenAIDouble() as server:
        assert run(server, iter(())) == []
        assert server.requests == []


def test_raw_rows_and_talks_side_by_side() -> None:
    with OpenAIDouble() as server:
        talk = Request("t", (Message("user", "a"), Message("assistant", "b"), Message("user", "c")), SamplingParams())
        raw = Request("r", "once", SamplingParams(seed=1), raw=True)
        found = {reply.id: reply.text for reply in run(server, iter([talk, raw]))}
    assert found == {"t": expected("c", None), "r": expected("once", 1)}


def test_rows_that_cannot_be_read_end_the_batch() -> None:
    def broken() -> Iterator[Request]:
        yield from rows(3)
        raise LookupError("line 4")

    with OpenAIDouble(fault=lambda ask: silent()) as server, pytest.raises(LookupError):
        run(server, broken(), 8)


def test_200_rows_with_faults_are_answered_once_each() -> None:
    chance = random.Random(7)
    plan: dict[tuple[str, int], int] = {}

    def fault(ask: Ask) -> Answer | None:
        kind = plan.setdefault((ask.prompt, ask.attempt), chance.randrange(16) if ask.attempt <= 4 else 99)
        faults = {
            0: dropped(), 1: cut(ask.good), 2: cut(ask.good, "rst"), 3: complaint(429, Retry_After="0"),
            4: complaint(503), 5: complaint(500), 6: Answer(200, {}).with_body(b"<p>"), 7: Answer(0, {}, ending="fin"),
        }  # fmt: skip
        return faults.get(kind)

    with OpenAIDouble(fault=fault, seconds=0.001) as server:
        replies = run(server, rows(200), 16)
        asked = len(server.asks)
        failed = sum(kind < 8 for kind in plan.values())
        assert set(server.answered.values()) == {1}
        assert len(server.answered) == 200
        assert server.peak <= 16
    check(replies, 200)
    assert failed > 100
    assert asked == 200 + failed


# What one row is to blame for


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (complaint(400), RefusedError), (complaint(413), RefusedError), (complaint(422), RefusedError),
        (complaint(400, "maximum context length is 9"), ContextOverflowError),
        (chat_answer("x", finish="tool_calls"), RefusedError),
    ],
)  # fmt: skip
def test_a_row_that_is_refused(answer: Answer, kind: type[Exception]) -> None:
    with OpenAIDouble(fault=lambda ask: answer if ask.prompt == "prompt 3" else None) as server:
        replies = run(server, rows(10))
        assert len(server.asks) == 10
    check(replies, 10, {"row-3"})
    assert [type(reply.error) for reply in replies if reply.error] == [kind]


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("answer", [complaint(500), dropped(), Answer(200, {}).with_body(b"<html>")])
def test_a_row_that_the_server_always_fails_with(answer: Answer, concurrency: int) -> None:
    """Is asked a few times, fails alone and keeps no other from being answered."""
    poison = {"prompt 2", "prompt 9"}
    with OpenAIDouble(fault=lambda ask: answer if ask.prompt in poison else None) as server:
        replies = run(server, rows(10), concurrency)
        tries = {prompt: sum(ask.prompt == prompt for ask in server.asks) for prompt in poison}
    check(replies, 10, {"row-2", "row-9"})
    assert all(6 <= count <= 12 for count in tries.values()), tries
    assert all(isinstance(reply.error, NetworkError) for reply in replies if reply.error)
    assert "times" in next(reply.error.message for reply in replies if reply.error)


def test_what_is_not_there() -> None:
    """Neither a server without this API nor one without this model fails ten thousand rows."""
    with OpenAIDouble() as server:
        elsewhere = OpenAIEngine(server.base_url.removesuffix("/v1"), MODEL, patience=QUICK)
        with pytest.raises(UsageError, match="404") as raised:
            list(elsewhere.answer(rows(100)))
        assert "/v1" in raised.value.hint
        assert len(server.requests) <= 32
    with OpenAIDouble(fault=lambda ask: complaint(404) if ask.prompt == "prompt 5" else None) as server:
        replies = run(server, rows(10), 1)
    check(replies, 10, {"row-5"})
    assert [type(reply.error) for reply in replies if reply.error] == [NotFoundError]


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(complaint(401), AccessError), (complaint(403), AccessError), (complaint(308, Location="/v2"), UsageError)],
)
def test_what_would_befall_every_row(answer: Answer, kind: type[Exception]) -> None:
    with OpenAIDouble(fault=lambda ask: answer) as server, pytest.raises(kind):
        run(server, rows(100))
    assert len(server.asks) <= 8


# A server that is away


def test_a_server_that_comes_back() -> None:
    """Everything that was lost on the way is asked again, and nothing else."""
    with OpenAIDouble(seconds=0.01) as server:
        replies = []
        for event in engine(server, patience=Patience(20, 20, 5, 0.3)).answer(rows(60)):
            if isinstance(event, Reply):
                replies.append(event)
                if len(replies) == 20:
                    server.stop()
                    threading.Timer(0.5, server.start).start()
        asked = len(server.asks)
    check(replies, 60)
    assert 60 <= asked <= 64


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_server_that_does_not_come_back(concurrency: int) -> None:
    """No row is to blame: the batch ends, and can go on."""
    replies = []
    with OpenAIDouble() as server:
        started = time.monotonic()
        events = engine(server, concurrency).answer(rows(1000))
        while len(replies) < 20:
            if isinstance(event := next(events), Reply):
                replies.append(event)
        server.stop()
        with pytest.raises(NetworkError, match="no request was answered for") as raised:
            replies += [event for event in events if isinstance(event, Reply)]
    assert raised.value.exit_code == 5
    assert "run the same command again" in raised.value.hint
    assert len(replies) >= 20
    assert not any(reply.error for reply in replies)
    assert QUICK.give_up < time.monotonic() - started < 5


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("answer", [complaint(500), complaint(429, "slow down"), dropped()])
def test_a_server_that_fails_with_everything(answer: Answer, concurrency: int) -> None:
    with OpenAIDouble(fault=lambda ask: answer) as server:
        events = engine(server, concurrency).answer(rows(1000))
        with pytest.raises(NetworkError, match="no request was answered for"):
            assert not [event for event in events if isinstance(event, Reply)]
        assert len({ask.prompt for ask in server.asks}) <= 2 * concurrency + openai_crew.MAX_ASIDE


def test_a_server_that_fails_with_all_of_few_rows() -> None:
    """At the end of a batch it is asked for its models: one that answers is not down."""
    with OpenAIDouble(fault=lambda ask: complaint(500)) as server:
        check(run(server, rows(2), patience=Patience(30, 30, 5, 0.3)), 2, {"row-0", "row-1"})
    down = {"fault": lambda ask: complaint(500), "listing": complaint(500)}
    with OpenAIDouble(**down) as server, pytest.raises(NetworkError, match="no request was answered for"):
        run(server, rows(2))


def test_rows_in_an_outage_are_not_to_blame() -> None:
    """For a while everything fails with 500; what was put aside meanwhile is asked again."""
    ends = time.monotonic() + 0.5

    def fault(ask: Ask) -> Answer | None:
        return complaint(500) if time.monotonic() < ends else None

    with OpenAIDouble(fault=fault) as server:
        replies = run(server, rows(40), 4, patience=Patience(30, 30, 5, 0.3))
        assert set(server.answered.values()) == {1}
    check(replies, 40)


def test_nobody_was_ever_there() -> None:
    server = OpenAIDouble()
    server.stop()
    started = time.monotonic()
    with pytest.raises(NetworkError, match="no connection"):
        run(server, rows(5))
    assert QUICK.reach <= time.monotonic() - started < 4


@pytest.mark.parametrize(("asked", "least", "most"), [("1", 1.0, 5.0), ("99999", 0.3, 5.0)])
def test_a_server_says_when_to_ask_again(asked: str, least: float, most: float) -> None:
    """And is heeded within reason."""
    started = time.monotonic()
    reply = one(
        lambda ask: complaint(429, Retry_After=asked) if ask.attempt == 1 else None,
        patience=Patience(30, 30, 5, 1.5 if asked == "1" else 0.3),
    )
    assert not reply.error
    assert least <= time.monotonic() - started < most


# How it goes, and the end


def test_pulses_come_while_nothing_finishes() -> None:
    with OpenAIDouble(fault=lambda ask: silent() if ask.prompt == "prompt 1" else None) as server:
        events = engine(server).answer(rows(2))
        started, pulses = time.monotonic(), []
        assert next(events) == Reply("row-0", expected("prompt 0", 0), "stop", 8, 12, total_s=pytest.approx(0, abs=0.5))
        while len(pulses) < 2:
            pulses.append(next(events))
        assert pulses == [Pulse(1, 8, 12)] * 2
        assert 1.9 < time.monotonic() - started < 5
        events.close()


def test_pulses_come_while_much_finishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_crew, "PULSE_SECONDS", 0.3)
    with OpenAIDouble(seconds=0.01) as server:
        seen, started = [], time.monotonic()
        for event in engine(server, 2).answer(rows(10_000)):
            seen.append(type(event))
            if time.monotonic() > started + 0.5:
                break
    assert seen.count(Pulse) in (1, 2)
    assert seen.count(Reply) > 20


def test_a_user_hears_of_a_server_that_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_crew, "PULSE_SECONDS", 0.02)
    with OpenAIDouble(fault=lambda ask: complaint(503, "loading\nthe model") if ask.attempt < 5 else None) as server:
        notes = [event.note for event in engine(server).answer(rows(1)) if isinstance(event, Pulse) and event.note]
        host = f"127.0.0.1:{server.port}"
    assert notes == [f"{host}: the server answered 503: loading the model; again in 0 s"]


def test_closing_gives_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_crew, "PULSE_SECONDS", 0.1)
    with OpenAIDouble(fault=lambda ask: silent()) as server:
        one_of_them = engine(server, 16)
        events = one_of_them.answer(rows(100))
        assert isinstance(next(events), Pulse)
        await_true(lambda: server.connections == 16)
        started = time.monotonic()
        events.close()
        assert time.monotonic() - started < 2
        assert not workers()
        await_true(lambda: not server.connections)
        server.fault = lambda ask: None
        assert len(list(one_of_them.answer(rows(3)))) == 3  # the engine itself is as good as before


def test_closing_wakes_who_waits_for_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_crew, "PULSE_SECONDS", 0.1)
    busy = complaint(429, Retry_After="250")
    with OpenAIDouble(fault=lambda ask: busy) as server:
        events = engine(server, patience=Patience(600, 600, 600, 300)).answer(rows(4))
        assert isinstance(next(events), Pulse)
        started = time.monotonic()
        events.close()
        assert time.monotonic() - started < 2
    assert not workers()


def test_an_interrupt_ends_the_process(tmp_path: Path) -> None:
    """Loads no PyTorch either."""
    script = """
        import sys
        from mixlocal.app.batch.engine import Request
        from mixlocal.app.batch.openai_engine import OpenAIEngine
        from mixlocal.engine.params import SamplingParams

        assert "torch" not in sys.modules
        engine = OpenAIEngine(sys.argv[1], "m", 8)
        for event in engine.answer(Request(str(n), "hi", SamplingParams()) for n in range(100)):
            print(event, flush=True)
    """
    with OpenAIDouble(fault=lambda ask: silent()) as server:
        command = [sys.executable, "-c", textwrap.dedent(script), server.base_url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stdout
            assert child.stderr
            assert "Pulse(running=8" in child.stdout.readline()
            started = time.monotonic()
            child.send_signal(signal.SIGINT)
            code = child.wait(5)
            assert time.monotonic() - started < 4
            said = child.stderr.read()
        assert said.rstrip().endswith("KeyboardInterrupt")
        assert code == -signal.SIGINT
        await_true(lambda: not server.connections)


def test_the_key_is_sent_and_never_told(capfd: pytest.CaptureFixture[str]) -> None:
    key = "sk-very-secret"
    seen = [str(engine)]
    with OpenAIDouble(fault=lambda ask: complaint(400, f"I saw {key}") if ask.prompt == "prompt 1" else None) as server:
        keyed = engine(server, api_key=key)
        seen += [str(event) for event in keyed.answer(rows(4))]
        seen += [repr(keyed), str(keyed.identity), str(vars(keyed))]
        assert {ask.headers["authorization"] for ask in server.asks} == {f"Bearer {key}"}
    with OpenAIDouble(fault=lambda ask: complaint(401, f"{key} is not known")) as server:
        with pytest.raises(AccessError) as raised:
            run(server, rows(1), api_key=key)
        seen += [str(raised.value), raised.value.hint]
    assert "***" in raised.value.message
    assert key not in "".join([*seen, *capfd.readouterr()])


def test_no_key_no_header() -> None:
    with OpenAIDouble() as server:
        run(server, rows(1), api_key="")
        assert "authorization" not in server.asks[0].headers
    with pytest.raises(UsageError, match="in clear"):
        OpenAIEngine("http://gpu.lan/v1", "m", api_key="k")


def test_a_listing_is_json_answer() -> None:
    """The double itself: what it lists is what OpenAI's clients read."""
    with OpenAIDouble(["a"], listing=json_answer({"object": "list", "data": [{"id": "b", "x": 1}]})) as server:
        assert OpenAIEngine(server.base_url).model == "b"
