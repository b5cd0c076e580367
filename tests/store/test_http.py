"""Answers and addresses of others, taken with care."""

from __future__ import annotations

import socket
import threading
import time
from email.utils import formatdate

import pytest

from mixlocal.errors import AccessError, NetworkError, NotFoundError, RefusedError
from mixlocal.store.digest import Digest
from mixlocal.store.http import Client, Endpoint, complaint, retry_after
from mixlocal.store.patience import Cancellation, CancelledError, Patience, RateLimit, TryAgainError
from mixlocal.store.repo_names import check_path, is_commit, is_repository, is_revision, is_wanted

EVIL = (
    "../x", "a/../b", "/etc/passwd", "a//b", "", ".", "./x", "C:/x", "a\\b", "\\\\host\\x", "a\0b", "a\nb", "a\x7fb",
    "x" * 300, "a/" + "y" * 256, None, 5, "..", "a/..", "con:",
)  # fmt: skip


@pytest.mark.parametrize("path", EVIL, ids=repr)
def test_a_path_that_leaves_its_folder_is_refused(path: object) -> None:
    with pytest.raises(RefusedError, match="lists a file named"):
        check_path("org/m", path)


@pytest.mark.parametrize("path", ["config.json", "a/b/c.txt", ".gitattributes", "a b", "ä.md"])
def test_other_paths_are_only_not_wanted(path: str) -> None:
    check_path("org/m", path)
    assert is_wanted(path) == (path == "config.json")


def test_names_of_the_hub() -> None:
    assert is_repository("mistralai/Mixtral-8x7B-v0.1")
    assert not any(map(is_repository, ("a", "a/b/c", "../b", "a/..", "a/b ", "/a/b", "a/-b", "~/b", "a/b@c", "a\n/b")))
    assert is_commit("0" * 40)
    assert not any(map(is_commit, ("main", "0" * 39, "0" * 41, "G" * 40, "A" * 40, "../" + "0" * 37)))
    assert all(map(is_revision, ("main", "refs/pr/1", "v1.0", "0" * 40)))
    assert not any(map(is_revision, ("", "../x", "a..b", "-x", "a b", "x" * 300, "a?b", "a#b")))
    wanted = ("model.safetensors", "model-00001-of-00019.safetensors", "tokenizer.model", "chat_template.jinja")
    assert all(map(is_wanted, wanted))
    unwanted = ("pytorch_model.bin", "x.py", "a/model.safetensors", "m.safetensors.zip", "c.00.pt", ".safetensors")
    assert not any(map(is_wanted, unwanted))


def test_a_digest_is_one_of_two_kinds() -> None:
    empty = Digest("e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")  # git's hash of an empty file
    assert empty.matches(b"")
    assert empty.sha256 is None
    assert Digest("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855").matches(b"")
    for value in ("", "abc", "../../x", "E" * 64, "0" * 63):
        with pytest.raises(ValueError, match="neither"):
            Digest(value)


@pytest.mark.parametrize(
    ("endpoint", "safe"),
    [
        ("https://huggingface.co", True), ("http://127.0.0.1:80", True), ("http://localhost", True),
        ("http://[::1]:8000", True), ("http://mirror.lan", False), ("http://10.0.0.1", False),
        ("http://127.0.0.1.evil.com", False),
    ],
)  # fmt: skip
def test_where_a_token_may_go(endpoint: str, safe: bool) -> None:
    hub = Endpoint(endpoint, "hf_secret")
    assert bool(hub.headers_for(f"{endpoint}/api/x")) == safe
    for other in (f"{endpoint}.evil.com/x", f"{endpoint}:81/x", "https://cdn.example/x", f"ftp{endpoint[4:]}/x"):
        assert hub.headers_for(other) == {}
    assert "hf_secret" not in repr(hub)


@pytest.mark.parametrize(
    "endpoint", ["", "ftp://x", "huggingface.co", "https://", "https://me:word@x", "https://x?token=1"]
)
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(RefusedError, match="HF_ENDPOINT"):
        Endpoint(endpoint)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None), ({"Retry-After": "7"}, 7), ({"Retry-After": "999999"}, 999999), ({"Retry-After": "-1"}, None),
        ({"Retry-After": "soon"}, None), ({"Retry-After": "9" * 30}, None),
        ({"RateLimit": '"api";r=0;t=12'}, 13), ({"RateLimit": '"api";r=5;t=12'}, None),
        ({"RateLimit": "x" * 9000}, None),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, None),
    ],
)  # fmt: skip
def test_when_a_server_wants_to_be_asked_again(headers: dict[str, str], seconds: float | None) -> None:
    found = retry_after(headers)
    if "9999 23" in str(headers):
        assert found is not None
        assert found > 1e9
    else:
        assert found == seconds


def test_a_date_to_be_asked_again_at() -> None:
    found = retry_after({"Retry-After": formatdate(time.time() + 30, usegmt=True)})
    assert found is not None
    assert 28 < found <= 30
    assert retry_after({"Retry-After": formatdate(time.time() - 30, usegmt=True)}) == 0


@pytest.mark.parametrize(
    ("status", "code", "ours", "kind"),
    [
        (401, "GatedRepo", True, AccessError), (403, "GatedRepo", True, AccessError), (401, "", True, AccessError),
        (403, "", True, AccessError), (401, "RepoNotFound", True, NotFoundError), (404, "", True, NotFoundError),
        (404, "RevisionNotFound", True, NotFoundError), (429, "", True, TryAgainError), (503, "", False, TryAgainError),
        (403, "", False, TryAgainError), (418, "", True, TryAgainError),
    ],
)  # fmt: skip
def test_what_an_answer_means(status: int, code: str, ours: bool, kind: type[Exception]) -> None:
    """A refusal of the file's server may pass: the Hub gives another address."""
    assert isinstance(complaint(status, {"X-Error-Code": code}, "org/m", ours=ours), kind)


def test_what_a_server_says_is_cut_short() -> None:
    error = complaint(403, {"X-Error-Message": "a\r\n\tb" + "!" * 5000}, "org/m", ours=True)
    assert isinstance(error, AccessError)
    assert "a b!" in error.message
    assert len(error.message) < 300


def test_a_wait_is_woken() -> None:
    cancellation = Cancellation()
    stopped = []
    with cancellation.reading(lambda: stopped.append(1)):
        cancellation.cancel()
        with pytest.raises(CancelledError):
            cancellation.wait(60)
    assert stopped == [1]
    with pytest.raises(CancelledError), cancellation.reading(lambda: None):
        pytest.fail("began to read after the end")


def test_a_rate_holds_over_all_threads() -> None:
    limit = RateLimit(1000.0)
    waits = [limit.delay(100) for _ in range(5)]
    assert waits == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=0.02)
    assert RateLimit(None).delay(10**9) == 0


@pytest.mark.parametrize("token", ["hf secret", "hf_secret\n", "hf_s\x00", "hf_ä"])
def test_a_token_that_is_none_is_not_printed(token: str) -> None:
    with pytest.raises(RefusedError) as caught:
        Endpoint("https://huggingface.co", token)
    assert "secret" not in str(caught.value)


def test_proxies_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy is asked, for the whole address; a host that is to be reached without one is not asked of it."""
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked: list[bytes] = []

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            asked.append(connection.recv(4096).partition(b"\r\n")[0])
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        client = Client(Endpoint("http://hub.invalid"), Patience(read=2.0), Cancellation())
        with client.get("http://hub.invalid/org/m", "org/m", {}) as found:
            assert (found.read(10), found.start, found.total) == (b"{}", 0, 2)
        thread.join()
        assert asked == [b"GET http://hub.invalid/org/m HTTP/1.1"]
        monkeypatch.setenv("no_proxy", "hub.invalid")
        with pytest.raises(TryAgainError, match=r"cannot be resolved|no connection"), client.get(
            "http://hub.invalid/org/m", "org/m", {}
        ):
            pytest.fail("a host without a proxy answered")


def test_a_proxy_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    client = Client(Endpoint("http://hub.invalid"), Patience(), Cancellation())
    with pytest.raises(NetworkError, match="socks5 proxy"), client.get("http://hub.invalid/x", "x", {}):
        pytest.fail("went round the proxy")
