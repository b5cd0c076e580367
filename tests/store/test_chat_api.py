"""One request to a server that may be anybody."""

from __future__ import annotations

import gzip
import ssl
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from hub_answer import Answer, Fill, json_answer
from openai_double import OpenAIDouble, chat_answer, complaint, cut, dropped, silent

from mixlocal.errors import (
    AccessError,
    ContextOverflowError,
    NetworkError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from mixlocal.store import chat_api
from mixlocal.store.chat_api import ApiAddress, ChatApi, NotTakenError, one_line
from mixlocal.store.live_sockets import LiveSockets
from mixlocal.store.patience import Cancellation, CancelledError, Patience, TryAgainError

KEY = "sk-very-secret"
BODY = b'{"messages": [{"role": "user", "content": "hi"}]}'


def client(url: str, key: str | None = None, read: float = 5.0, cancellation: Cancellation | None = None) -> ChatApi:
    return ChatApi(ApiAddress(url, key), cancellation or Cancellation(), Patience(read=read), 2)


def post(answer: Answer, key: str | None = None, read: float = 5.0) -> bytes:
    """What becomes of a request that is answered so."""
    with OpenAIDouble(fault=lambda ask: answer) as server:
        return client(server.base_url, key, read).post("chat/completions", BODY)


@pytest.mark.parametrize(
    "url",
    [
        "", "localhost:8000", "ftp://x/v1", "https://", "http://me:word@x/v1", "http://x/v1?key=1", "http://x/v1#a",
        "http://x:port/v1", "http://[::1/v1", "http://x/a b", "http://x/\nv1", "http://ä/v1",
    ],
)  # fmt: skip
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UsageError, match="--base-url is not the address") as raised:
        ApiAddress(url)
    assert "word" not in f"{raised.value}{raised.value.hint}"


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://api.openai.com/v1", True), ("http://127.0.0.1:8000/v1", True), ("http://localhost:8000/v1", True),
        ("http://[::1]:8000/v1", True), ("http://gpu.lan:8000/v1", False), ("http://10.0.0.1/v1", False),
        ("http://127.0.0.1.evil.com/v1", False),
    ],
)  # fmt: skip
def test_where_a_key_may_go(url: str, safe: bool) -> None:
    assert "Authorization" not in ApiAddress(url).headers
    if safe:
        assert ApiAddress(url, KEY).headers["Authorization"] == f"Bearer {KEY}"
        assert KEY not in repr(ApiAddress(url, KEY))
        return
    with pytest.raises(UsageError, match="in clear") as raised:
        ApiAddress(url, KEY)
    assert KEY not in f"{raised.value}{raised.value.hint}"


def test_a_key_that_is_none() -> None:
    with pytest.raises(UsageError, match="no key has") as raised:
        ApiAddress("https://x/v1", f"{KEY}\r\nX: y")
    assert KEY not in f"{raised.value}{raised.value.hint}"


def overflow(message: str, code: object = None) -> Answer:
    return complaint(400, message, code)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (complaint(400), RefusedError), (complaint(413), RefusedError), (complaint(422), RefusedError),
        (complaint(418), RefusedError), (complaint(404), NotFoundError), (complaint(401), AccessError),
        (complaint(403), AccessError), (complaint(429, code="insufficient_quota"), AccessError),
        (complaint(408), TryAgainError), (complaint(500), TryAgainError), (complaint(502), TryAgainError),
        (complaint(409), NotTakenError), (complaint(425), NotTakenError), (complaint(429), NotTakenError),
        (complaint(503), NotTakenError), (complaint(302, Location="http://x/"), UsageError),
        (overflow("no", "context_length_exceeded"), ContextOverflowError),
        (overflow("This model's maximum context length is 8 tokens. However, you requested 9"), ContextOverflowError),
        (overflow("The decoder prompt is longer than the maximum model length of 8"), ContextOverflowError),
        (overflow("the request exceeds the available context size", "exceed_context_size_error"), ContextOverflowError),
    ],
)  # fmt: skip
def test_what_a_complaint_means(answer: Answer, kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised:
        post(answer)
    assert type(raised.value) is kind


@pytest.mark.parametrize(
    "content",
    [
        {"error": {"message": "bad row", "code": None}}, {"error": "bad row"}, {"detail": "bad row"},
        {"object": "error", "message": "bad row", "code": 400}, {"detail": [{"msg": "bad row"}]},
    ],
)  # fmt: skip
def test_how_servers_word_a_complaint(content: Any) -> None:
    with pytest.raises(RefusedError, match=r"the server answered 400: .*bad row"):
        post(json_answer(content, 400))


def test_what_a_server_says_is_one_short_line() -> None:
    with pytest.raises(RefusedError) as raised:
        post(complaint(400, "a\r\n\tb\x1b[2J" + "!" * 5000))
    assert "400: a b" in raised.value.message
    assert "\n" not in raised.value.message
    assert len(raised.value.message) < 400
    assert one_line("x" * 300) == "x" * 300
    deep = Answer(400, {}).with_body(b"[" * 5000)
    with pytest.raises(RefusedError, match=r"400: \[\[\["):
        post(deep)
    with pytest.raises(RefusedError, match="400: xxx"):
        post(Answer(400, {}).with_body(Fill(b"x", 10 << 20)))


def test_a_server_that_tells_our_key() -> None:
    with pytest.raises(RefusedError, match=r"the key \*\*\* is") as raised:
        post(complaint(400, f"the key {KEY} is fine"), KEY)
    assert KEY not in f"{raised.value}{raised.value.hint}"


def test_the_key_goes_to_its_server_only() -> None:
    """Not along with a redirect, and not to a proxy in clear."""
    with OpenAIDouble() as other:
        moved = complaint(307, Location=f"{other.base_url}/chat/completions")
        with OpenAIDouble(fault=lambda ask: moved) as server:
            with pytest.raises(UsageError, match="sends requests on to") as raised:
                client(server.base_url, KEY).post("chat/completions", BODY)
            assert server.asks[0].headers["authorization"] == f"Bearer {KEY}"
        assert raised.value.hint == "give that address as --base-url"
        assert other.requests == []


def test_a_proxy_is_used_but_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenAIDouble() as proxy, OpenAIDouble() as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert client(server.base_url, KEY).models() == ["test/mixtral"]
        assert proxy.requests == []
        with pytest.raises(NotFoundError):  # the double knows no address of another server
            client("http://gpu.invalid/v1").models()
        assert [request.path for request in proxy.requests] == ["http://gpu.invalid/v1/models"]


GOOD = chat_answer("hello")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (dropped(), "the connection broke"), (cut(GOOD), "the connection ended early"),
        (cut(GOOD, "rst"), "the connection broke"), (Answer(0, {}, ending="fin"), "the connection broke"),
        (replace(GOOD, wait=2.0), "no data in time"), (replace(GOOD, step=1, pause=0.02), "no data in time"),
        (Answer(200, {"Content-Encoding": "gzip"}).with_body(gzip.compress(b"{}")), "compressed"),
        (replace(GOOD, headers={"Content-Length": "many"}), "no data in time"),
    ],
)  # fmt: skip
def test_what_may_pass(answer: Answer, reason: str) -> None:
    """Drops, cuts, silence and dripping, each within the time that an answer may take."""
    started = time.monotonic()
    with pytest.raises(TryAgainError, match=reason) as raised:
        post(answer, read=0.5)
    assert not isinstance(raised.value, NotTakenError)
    assert time.monotonic() - started < 1.5


def test_nobody_is_there() -> None:
    server = OpenAIDouble()
    server.stop()
    api = client(server.base_url)
    with pytest.raises(NotTakenError, match="no connection"):
        api.post("chat/completions", BODY)
    assert not api.reached
    with pytest.raises(NotTakenError, match="cannot be resolved"):
        client("http://nobody.invalid/v1").models()


def test_an_answer_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_api, "MAX_ANSWER", 1 << 20)
    endless = Answer(200, {"Transfer-Encoding": "chunked"}, (Fill(b" ", 1 << 30),), chunked=True)
    with pytest.raises(RefusedError, match="larger than 1 MiB"):
        post(endless)


@pytest.mark.parametrize(
    "listing", [json_answer({}), json_answer({"data": [{}]}), Answer(200, {}).with_body(b"<html>")]
)
def test_a_list_of_models_that_is_none(listing: Answer) -> None:
    with OpenAIDouble(listing=listing) as server, pytest.raises(TryAgainError, match="list of models is none"):
        client(server.base_url).models()


def test_https_where_there_is_none() -> None:
    """Nothing is said in clear. A server may close at what it hears, or go on waiting for a line's end."""
    with OpenAIDouble() as server:
        api = client(server.base_url.replace("http:", "https:"), KEY, read=0.5)
        with pytest.raises(TryAgainError, match=r"TLS failed|connection broke|no data in time"):
            api.models()
        assert not api.reached
        assert server.requests == []


def test_a_certificate_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ssl.SSLCertVerificationError("self-signed certificate")

    api = client("https://gpu.invalid/v1", KEY)
    monkeypatch.setattr(api._pool, "request", refuse)
    with pytest.raises(NetworkError, match="TLS failed"):
        api.models()


def test_a_request_that_waits_is_ended() -> None:
    """Although its connection has not brought the head of an answer yet; the server sees it close."""
    cancellation = Cancellation()
    with OpenAIDouble(fault=lambda ask: silent()) as server:
        ended: list[BaseException] = []
        api = client(server.base_url, read=60, cancellation=cancellation)

        def ask() -> None:
            try:
                api.post("chat/completions", BODY)
            except CancelledError as error:
                ended.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        await_true(lambda: server.asks)
        cancellation.cancel()
        thread.join(1)
        assert ended
        await_true(lambda: server.connections == 0)
        with pytest.raises(CancelledError):
            api.post("chat/completions", BODY)


def test_a_connection_that_comes_too_late_is_shut() -> None:
    with OpenAIDouble() as server:
        api = client(server.base_url)
        api._sockets.shut()
        with pytest.raises(TryAgainError):
            api.models()
        await_true(lambda: server.connections == 0)


def test_connections_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    add = LiveSockets.add
    monkeypatch.setattr(LiveSockets, "add", lambda self, sock: (opened.append(1), add(self, sock))[1])
    with OpenAIDouble() as server:
        api = client(server.base_url)
        for _ in range(20):
            api.post("chat/completions", BODY)
    assert len(opened) == 1


def await_true(condition: Any) -> None:
    deadline = time.monotonic() + 3
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
