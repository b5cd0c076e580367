"""The Hub double: the real huggingface-hub finds in it what it finds in the Hub, and each fault is seen on the wire.

HUB_DOUBLE_CLIENT_PYTHON names another Python, whose huggingface-hub is then the client.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import tiny
from hub_client import HubClient
from hub_double import Fault, HubDouble, Repository
from hub_faults import CATALOGUE

TOKEN = "hf_secret"
SHARD = "model-00001-of-00002.safetensors"
TREE = "/api/models/org/tiny/tree/main?recursive=true"
SETTLED = 5.0  # seconds until a thread must have ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", shards=2)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "other"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "er" / "a file.txt").write_text("spaced")
    return folder


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    client = HubClient(tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def hub(folder: Path, other: Path) -> Iterator[HubDouble]:
    repositories: dict[str, Path | Repository] = {
        "org/tiny": Repository(folder, refs={"v1": other, "refs/pr/1": other}),
        "org/gated": Repository(folder, gated="auto"),
        "org/private": Repository(folder, private=True),
        "org/disabled": Repository(folder, disabled=True),
    }
    with HubDouble(repositories, token=TOKEN, others=["hf_stranger"], page_size=3) as hub:
        yield hub
        assert not hub.leaks


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(url: str, method: str = "GET", **headers: str) -> Reply:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=2)
    try:
        connection.request(
            method, f"{parts.path}?{parts.query}", headers={k.replace("_", "-"): headers[k] for k in headers}
        )
        with connection.getresponse() as response:
            return Reply(response.status, dict(response.headers), response.read())
    finally:
        connection.close()


def signed(hub: HubDouble, file: str = SHARD) -> str:
    """Where the CDN has it."""
    return ask(f"{hub.endpoint}/org/tiny/resolve/main/{file}").headers["Location"]


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The real client


def test_a_snapshot_has_the_same_bytes(hub: HubDouble, client: HubClient, folder: Path, tmp_path: Path) -> None:
    got = client.call(hub.endpoint, "snapshot_download", repo_id="org/tiny", cache_dir=str(tmp_path), token=TOKEN)
    assert digests(Path(got)) == digests(folder)
    assert Path(got).name == hub.commit("org/tiny")
    assert [r.path for r in hub.requests[:2]] == [
        "/api/models/org/tiny/revision/main",
        f"/api/models/org/tiny/tree/{hub.commit('org/tiny')}?recursive=true&expand=false",
    ]
    assert all(r.token == TOKEN for r in hub.requests if r.origin == "hub")
    assert {r.file for r in hub.requests if r.origin == "cdn"} == {path.name for path in folder.glob("*.safetensors")}
    assert hub.sent() == sum(path.stat().st_size for path in folder.iterdir())


def test_a_snapshot_of_a_branch_with_folders(hub: HubDouble, client: HubClient, other: Path, tmp_path: Path) -> None:
    arguments = {"repo_id": "org/tiny", "revision": "refs/pr/1", "cache_dir": str(tmp_path)}
    assert digests(Path(client.call(hub.endpoint, "snapshot_download", **arguments))) == digests(other)
    assert hub.requests[0].path == "/api/models/org/tiny/revision/refs%2Fpr%2F1"


def test_model_info(hub: HubDouble, client: HubClient, folder: Path) -> None:
    info = client.call(hub.endpoint, "model_info", repo_id="org/tiny", files_metadata=True)
    shard = next(told for told in info["siblings"] if told["rfilename"] == SHARD)
    assert (info["sha"], info["gated"], info["config"]["model_type"]) == (hub.commit("org/tiny"), False, "mixtral")
    assert shard["lfs"]["sha256"] == digests(folder)[SHARD]
    assert client.call(hub.endpoint, "model_info", repo_id="org/gated")["gated"] == "auto"


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", None])
def test_revisions(hub: HubDouble, client: HubClient, revision: str | None) -> None:
    sha = hub.commit("org/tiny", revision or "main")
    for asked in (revision, sha):
        assert client.call(hub.endpoint, "model_info", repo_id="org/tiny", revision=asked)["sha"] == sha


def test_a_tree_in_pages(hub: HubDouble, client: HubClient, folder: Path) -> None:
    entries = client.call(hub.endpoint, "list_repo_tree", repo_id="org/tiny", recursive=True)
    assert [entry["path"] for entry in entries] == sorted(digests(folder))
    assert [entry["lfs"]["sha256"] for entry in entries if entry["lfs"]] == [
        sha256 for name, sha256 in sorted(digests(folder).items()) if name.endswith(".safetensors")
    ]
    assert len(hub.requests) == -(-len(entries) // 3)


def test_a_tree_of_folders(hub: HubDouble, client: HubClient) -> None:
    def paths(**arguments: Any) -> list[str]:
        told = client.call(hub.endpoint, "list_repo_tree", repo_id="org/tiny", revision="v1", **arguments)
        return [entry["path"] for entry in told]

    assert paths() == ["config.json", "deep"]
    assert paths(recursive=True) == ["config.json", "deep", "deep/er", "deep/er/a file.txt"]
    assert paths(path_in_repo="deep") == ["deep/er"]


def test_the_small_calls(hub: HubDouble, client: HubClient, folder: Path) -> None:
    def call(method: str, **arguments: Any) -> Any:
        return client.call(hub.endpoint, method, **arguments)

    sha = hub.commit("org/tiny")
    info = call("get_paths_info", repo_id="org/tiny", paths=["config.json", SHARD, "absent"])
    assert {entry["path"] for entry in info} == {"config.json", SHARD}
    assert call("list_repo_refs", repo_id="org/tiny")["branches"][0]["target_commit"] == sha
    assert call("list_repo_commits", repo_id="org/tiny")[0]["commit_id"] == sha
    assert call("auth_check", repo_id="org/tiny") is None
    assert call("whoami", token=TOKEN)["name"] == "u"
    assert call("file_exists", repo_id="org/tiny", filename="config.json") is True
    assert call("file_exists", repo_id="org/tiny", filename="absent.json") is False
    assert call("get_safetensors_metadata", repo_id="org/tiny")["sharded"] is True
    metadata = call("get_hf_file_metadata", url=f"{hub.endpoint}/org/tiny/resolve/main/{SHARD}")
    assert (metadata["commit_hash"], metadata["etag"], metadata["size"]) == (
        sha, digests(folder)[SHARD], (folder / SHARD).stat().st_size,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "repository", "token", "expected"),
    [
        ("auth_check", "org/gated", False, "GatedRepoError"),
        ("auth_check", "org/gated", "hf_stranger", "GatedRepoError"),
        ("auth_check", "org/gated", TOKEN, None),
        ("auth_check", "org/tiny", "hf_wrong", "HfHubHTTPError"),
        ("auth_check", "org/private", False, "RepositoryNotFoundError"),
        ("auth_check", "org/private", "hf_stranger", "RepositoryNotFoundError"),
        ("auth_check", "org/private", TOKEN, None),
        ("model_info", "org/absent", False, "RepositoryNotFoundError"),
        ("model_info", "org/absent", TOKEN, "RepositoryNotFoundError"),
        ("auth_check", "org/disabled", False, "DisabledRepoError"),
    ],
)
def test_refusals(
    hub: HubDouble, client: HubClient, method: str, repository: str, token: str | bool, expected: str | None
) -> None:
    assert client.call(hub.endpoint, method, repo_id=repository, token=token) == expected


def test_refusals_of_files(hub: HubDouble, client: HubClient, tmp_path: Path) -> None:
    def download(repository: str, filename: str = "config.json", token: str | bool = False, **more: Any) -> Any:
        arguments = {"repo_id": repository, "filename": filename, "cache_dir": str(tmp_path), "token": token, **more}
        return client.call(hub.endpoint, "hf_hub_download", **arguments)

    assert download("org/tiny", "absent.json") == "RemoteEntryNotFoundError"
    assert download("org/tiny", revision="absent") == "RevisionNotFoundError"
    assert download("org/gated") == "GatedRepoError"
    assert Path(download("org/gated", token=TOKEN)).is_file()
    assert Path(download("org/gated", SHARD, token=TOKEN)).is_file()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gated_none", "GatedRepoError"),
        ("gated_403", "GatedRepoError"),
        ("bad_token", "HfHubHTTPError"),
        ("repo_401", "RepositoryNotFoundError"),
        ("repo_404", "RepositoryNotFoundError"),
        ("rev_404", "RevisionNotFoundError"),
        ("disabled", "DisabledRepoError"),
        ("sha_traversal", None),
        ("html_200", "JSONDecodeError"),
    ],
)
def test_faults_of_model_info(hub: HubDouble, client: HubClient, kind: str, expected: str | None) -> None:
    hub.faults = [Fault(kind, "revision")]
    got = client.call(hub.endpoint, "model_info", repo_id="org/tiny")
    assert got == expected if expected else got["sha"] == "../../x"
    assert hub.fired == {kind: 1}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault("json_truncated"), "JSONDecodeError"),
        (Fault("json_deep"), "RecursionError"),
        (Fault("tree_missing_keys"), "KeyError"),
        (Fault("tree_missing_keys", value="size", path=SHARD), "KeyError"),
    ],
)
def test_faults_of_the_tree(hub: HubDouble, client: HubClient, fault: Fault, expected: str) -> None:
    hub.page_size, hub.faults = 1000, [fault]
    assert client.call(hub.endpoint, "list_repo_tree", repo_id="org/tiny", recursive=True) == expected


def test_the_client_gets_over_a_cut_body(hub: HubDouble, client: HubClient, folder: Path, tmp_path: Path) -> None:
    hub.faults = [Fault("cut", at=1000)]
    got = client.call(hub.endpoint, "snapshot_download", repo_id="org/tiny", cache_dir=str(tmp_path))
    assert hub.fired == {"cut": 1}
    assert digests(Path(got)) == digests(folder)


def test_the_client_sees_a_listing_refused(hub: HubDouble, client: HubClient) -> None:
    hub.faults = [Fault("status", "revision", code=500)]
    assert client.call(hub.endpoint, "model_info", repo_id="org/tiny") == "HfHubHTTPError"


# Plain HTTP


def test_ranges(hub: HubDouble, folder: Path) -> None:
    url, content = signed(hub), (folder / SHARD).read_bytes()
    etag = f'"{digests(folder)[SHARD]}"'
    whole = ask(url)
    assert (whole.status, whole.headers["ETag"], whole.headers["Accept-Ranges"]) == (200, etag, "bytes")
    assert whole.body == content
    for asked, start, stop in (
        ("5-", 5, len(content)),
        ("5-9", 5, 10),
        ("5-999999999", 5, len(content)),
        ("-7", -7, None),
    ):
        part = ask(url, Range=f"bytes={asked}", If_Range=etag)
        assert (part.status, part.body) == (206, content[start:stop])
        first = start % len(content)
        assert part.headers["Content-Range"] == f"bytes {first}-{first + len(part.body) - 1}/{len(content)}"
    changed = ask(url, Range="bytes=5-", If_Range='"other"')
    assert (changed.status, changed.body) == (200, content)
    beyond = ask(url, Range=f"bytes={len(content)}-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{len(content)}")
    assert ask(url.replace("Signature=", "Signature=0")).status == 403


def test_a_small_file_takes_the_detour(hub: HubDouble, folder: Path) -> None:
    content = (folder / "config.json").read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    sent_on = ask(f"{hub.endpoint}/org/tiny/resolve/main/config.json", "HEAD")
    assert (sent_on.status, sent_on.headers["X-Repo-Commit"]) == (307, hub.commit("org/tiny"))
    there = hub.endpoint + sent_on.headers["Location"]
    assert there.startswith(f"{hub.endpoint}/api/resolve-cache/models/org/tiny/{hub.commit('org/tiny')}/config.json?")
    head = ask(there, "HEAD")
    assert (head.headers["ETag"], head.headers["Content-Length"]) == (f'"{oid}"', str(len(content)))
    assert ask(there).body == content
    hub.direct = True
    assert ask(f"{hub.endpoint}/org/tiny/resolve/main/config.json").body == content


def test_a_connection_is_kept(hub: HubDouble) -> None:
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=2)
    for _ in range(3):
        connection.request("GET", TREE)
        local = connection.sock.getsockname() if connection.sock else None
        with connection.getresponse() as response:
            assert len(json.loads(response.read())) == 3
        assert connection.sock is not None
        assert connection.sock.getsockname() == local
    connection.close()


def test_a_token_at_another_origin_is_a_leak(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with HubDouble({"org/tiny": folder}) as hub:
        assert ask(signed(hub), Authorization="Bearer hf_x").status == 400
        assert hub.leaks == {"cdn": 1}
        assert "LEAK" in capfd.readouterr().err
        assert ask(signed(hub).replace(hub.cdn, hub.foreign)).status == 200


def test_the_same_content_is_the_same_commit(folder: Path, other: Path) -> None:
    hub = HubDouble({"org/a": folder, "org/b": folder, "org/c": other})
    assert hub.commit("org/a") == hub.commit("org/b") != hub.commit("org/c")
    assert re.fullmatch("[0-9a-f]{40}", hub.commit("org/a"))


def test_digests_may_be_handed_in(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x")
    (tmp_path / "sha256sums").write_text(f"{'ab' * 32}  a.safetensors\n")
    with HubDouble({"org/a": tmp_path}) as hub:
        entries = json.loads(ask(f"{hub.endpoint}/api/models/org/a/tree/main?recursive=true").body)
    assert [entry["path"] for entry in entries] == ["a.safetensors"]
    assert entries[0]["lfs"]["oid"] == "ab" * 32


def test_a_rate(hub: HubDouble, folder: Path) -> None:
    url, nbytes = signed(hub), (folder / SHARD).stat().st_size
    hub.rate = 4 * nbytes
    start = time.monotonic()
    assert len(ask(url).body) == nbytes
    assert 0.2 <= time.monotonic() - start < 2


# Faults of a body


@pytest.mark.parametrize("how", ["fin", "rst", "stall"])
@pytest.mark.parametrize("start", [0, 100])
def test_a_cut_body_ends_at_the_byte(hub: HubDouble, folder: Path, how: str, start: int) -> None:
    url = urlsplit(signed(hub))
    hub.faults = [Fault("cut", "cdn", nth=2, at=1000, how=how)]
    endings = {"fin": (b"", None), "rst": (None, ConnectionResetError), "stall": (None, TimeoutError)}
    for _ in range(2):
        with socket.create_connection((url.hostname, url.port), timeout=2) as connection:
            target = f"{url.path}?{url.query}"
            connection.sendall(f"GET {target} HTTP/1.1\r\nRange: bytes={start}-\r\nConnection: close\r\n\r\n".encode())
            connection.settimeout(0.3)
            received, ending = drain(connection)
    body = received.partition(b"\r\n\r\n")[2]
    assert body == (folder / SHARD).read_bytes()[start : start + 1000]
    assert ending == endings[how][1]
    assert (hub.fired, hub.requests[-1].sent, hub.requests[-1].start) == ({"cut": 1}, 1000, start)


def drain(connection: socket.socket) -> tuple[bytes, type[BaseException] | None]:
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except OSError as error:
        return received, type(error)
    return received, None


def test_wrong_bodies(hub: HubDouble, folder: Path) -> None:
    url, content = signed(hub), (folder / SHARD).read_bytes()

    def struck(kind: str, **options: Any) -> Reply:
        hub.faults = [Fault(kind, **options)]
        return ask(url)

    flipped = struck("wrong_bytes", at=7)
    assert [i for i, (a, b) in enumerate(zip(flipped.body, content, strict=True)) if a != b] == [7]
    assert struck("short", count=3).body == content[:-3]
    assert struck("long", count=3).body == content + bytes(3)
    assert struck("declare", count=-3).body == content[:-3]
    with pytest.raises(http.client.IncompleteRead):
        struck("declare", count=3)
    for how in ("", "close"):
        reply = struck("chunked", how=how)
        assert (reply.body, "Content-Length" in reply.headers) == (content, False)
    packed = struck("gzip")
    assert (packed.headers["Content-Encoding"], gzip.decompress(packed.body)) == ("gzip", content)
    hub.faults = [Fault("drip", step=len(content) // 4 + 1, seconds=0.05)]
    start = time.monotonic()
    assert ask(url).body == content
    assert time.monotonic() - start >= 0.14  # the last of four waits comes after the last byte


def test_wrong_ranges(hub: HubDouble, folder: Path) -> None:
    url, content = signed(hub), (folder / SHARD).read_bytes()
    total = len(content)

    def struck(kind: str, **options: Any) -> tuple[int, str | None, bytes]:
        hub.faults = [Fault(kind, **options)]
        assert ask(url).body == content  # nothing to strike, and so it does not count
        reply = ask(url, Range="bytes=10-19")
        return reply.status, reply.headers.get("Content-Range"), reply.body

    right = content[10:20]
    assert struck("ignore_range") == (200, None, content)
    assert struck("shift", count=2) == (206, f"bytes 12-19/{total}", content[12:20])
    assert struck("shift", count=-2, how="hidden") == (206, f"bytes 10-19/{total}", content[8:18])
    assert struck("bad_content_range") == (206, "bytes some/all", right)
    assert struck("bad_content_range", how="missing") == (206, None, right)
    assert struck("wrong_total", count=5) == (206, f"bytes 10-19/{total + 5}", right)
    assert struck("range_416")[:2] == (416, f"bytes */{total}")


def test_a_changed_etag_voids_a_range(hub: HubDouble, folder: Path) -> None:
    url, etag = signed(hub), f'"{digests(folder)[SHARD]}"'
    hub.faults = [Fault("etag_changes", times=-1)]
    assert ask(url, Range="bytes=1-").status == 206
    reply = ask(url, Range="bytes=1-", If_Range=etag)
    assert (reply.status, len(reply.body)) == (200, (folder / SHARD).stat().st_size)
    assert reply.headers["ETag"] != etag


# Faults of headers, hosts and documents


@pytest.mark.parametrize(
    ("fault", "header", "expected"),
    [
        (Fault("etag_traversal"), "X-Linked-Etag", '"../../x"'),
        (Fault("etag_missing"), "X-Linked-Etag", None),
        (Fault("commit_missing"), "X-Repo-Commit", None),
        (Fault("commit_changes", value="f" * 40), "X-Repo-Commit", "f" * 40),
    ],
)
def test_faults_of_headers(hub: HubDouble, fault: Fault, header: str, expected: str | None) -> None:
    hub.faults = [fault]
    assert ask(f"{hub.endpoint}/org/tiny/resolve/main/{SHARD}", "HEAD").headers.get(header) == expected
    assert ask(f"{hub.endpoint}/org/tiny/resolve/main/{SHARD}", "HEAD").headers.get(header, "") not in ("", expected)


def test_statuses(hub: HubDouble) -> None:
    url = signed(hub)
    hub.faults = [
        Fault("status", code=500, headers={"X-Note": "n"}),
        Fault("retry_after", nth=2, seconds=7),
        Fault("retry_after", nth=3, how="date"),
        Fault("retry_after", nth=4, how="huge", code=503),
        Fault("retry_after", nth=5, how="ratelimit", seconds=7),
    ]
    replies = [ask(url) for _ in range(6)]
    assert [reply.status for reply in replies] == [500, 429, 429, 503, 429, 200]
    assert replies[0].headers["X-Note"] == "n"
    assert [reply.headers.get("Retry-After") for reply in replies[1:5]][::2] == ["7", "999999"]
    assert "GMT" in replies[2].headers["Retry-After"]
    assert replies[4].headers["RateLimit"] == '"api";r=0;t=7'


def test_other_hosts(hub: HubDouble, folder: Path) -> None:
    resolve = f"{hub.endpoint}/org/tiny/resolve/main/"
    hub.faults = [Fault("redirect_foreign", times=2), Fault("link_foreign", times=2)]
    for name in (SHARD, "config.json"):
        there = ask(resolve + name).headers["Location"]
        assert there.startswith(hub.foreign)
        assert ask(there).body == (folder / name).read_bytes()
    link = ask(hub.endpoint + TREE).headers["Link"]
    assert link.startswith(f"<{hub.foreign}/")
    assert json.loads(ask(link[1 : link.index(">")]).body)
    hub.faults = [Fault("redirect_loop")]
    url = resolve + SHARD
    seen = set()
    for _ in range(12):
        seen.add(url := hub.endpoint + urlsplit(ask(url).headers["Location"]).path)
    assert len(seen) == 12


def test_faults_of_entries(hub: HubDouble) -> None:
    hub.page_size = 1000

    def entries(kind: str, **options: Any) -> dict[str, Any]:
        hub.faults = [Fault(kind, **options)]
        return {entry["path"]: entry for entry in json.loads(ask(hub.endpoint + TREE).body)}

    right = {entry["path"]: entry for entry in json.loads(ask(hub.endpoint + TREE).body)}
    wrong = entries("tree_wrong_size", path=SHARD, count=9)
    assert [path for path in right if wrong[path] != right[path]] == [SHARD]
    assert wrong[SHARD]["lfs"]["size"] == wrong[SHARD]["size"] == right[SHARD]["size"] + 9
    assert entries("tree_wrong_size", value="-1")["config.json"]["size"] == -1
    assert entries("tree_wrong_sha", path=SHARD, value="../x")[SHARD]["lfs"]["oid"] == "../x"
    assert entries("path_evil").keys() - right.keys() == {"../evil.safetensors"}
    assert len(entries("xet_advertised")[SHARD]["xetHash"]) == 64
    assert entries("json_huge", count=1 << 20) == right
    assert hub.requests[-1].sent > 1 << 20


def test_a_listing_without_end(hub: HubDouble) -> None:
    hub.page_size = 1000
    hub.faults = [Fault("tree_many", count=2500)]
    url, counts = hub.endpoint + TREE, []
    while url:
        reply = ask(url)
        counts.append(len(json.loads(reply.body)))
        url = reply.headers.get("Link", "<>").partition(">")[0][1:]
    assert counts[1:] == [1000, 1000, 500]


def test_xet_is_advertised_and_not_to_be_had(hub: HubDouble) -> None:
    hub.faults = [Fault("xet_advertised")]
    headers = ask(f"{hub.endpoint}/org/tiny/resolve/main/{SHARD}", "HEAD").headers
    assert len(headers["X-Xet-Hash"]) == 64
    assert ask(headers["Link"][1 : headers["Link"].index(">")]).status == 500


def test_main_moves_after_the_answer(hub: HubDouble, other: Path) -> None:
    hub.faults = [Fault("ref_moves", value=str(other)), Fault("ref_moves", nth=2)]
    url = f"{hub.endpoint}/api/models/org/tiny/revision/main"
    first, second, third = (json.loads(ask(url).body)["sha"] for _ in range(3))
    assert len({first, second, third}) == 3
    assert second == hub.commit("org/tiny", "v1")
    assert ask(f"{hub.endpoint}/org/tiny/resolve/{first}/{SHARD}").status == 302
    assert ask(f"{hub.endpoint}/org/tiny/resolve/main/{SHARD}").status == 404


def test_no_http(hub: HubDouble) -> None:
    url = signed(hub)
    hub.faults = [Fault("close_before_headers")]
    with pytest.raises(http.client.RemoteDisconnected):
        ask(url)
    hub.faults = [Fault("close_before_headers", how="rst")]
    with pytest.raises(ConnectionResetError):
        ask(url)
    hub.faults = [Fault("tls_garbage")]
    with pytest.raises(http.client.BadStatusLine):
        ask(url)
    hub.faults = [Fault("slow_headers", seconds=0.1)]
    start = time.monotonic()
    assert ask(url).status == 200
    assert time.monotonic() - start >= 0.1


# How faults are counted


def test_when_a_fault_strikes(hub: HubDouble) -> None:
    resolve = f"{hub.endpoint}/org/tiny/resolve/main/"
    hub.faults = [Fault("status", "resolve", path="config", nth=2, times=2, method="HEAD")]
    asked = [("config.json", "HEAD"), ("config.json", "GET"), (SHARD, "HEAD"), *[("config.json", "HEAD")] * 3]
    assert [ask(resolve + name, method).status for name, method in asked] == [307, 307, 302, 503, 503, 307]
    assert hub.fired == {"status": 2}
    assert [request.faults for request in hub.requests][2:] == [[], ["status"], ["status"], []]


@pytest.mark.parametrize("wrong", [{"kind": "cutt"}, {"kind": "cut", "how": "soft"}, {"kind": "cut", "where": "cnd"}])
def test_a_misspelt_fault_is_an_error(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"no fault|no how|knows no|no place"):
        Fault(**wrong)


def test_every_kind_strikes(hub: HubDouble) -> None:
    """Each at its own place, by an ordinary request or one with a range."""
    url = signed(hub)
    asked = [(url, {}), (url, {"Range": "bytes=10-"}), (hub.endpoint + TREE, {})]
    asked += [(f"{hub.endpoint}/{path}", {}) for path in ("api/models/org/tiny", f"org/tiny/resolve/main/{SHARD}")]
    for kind in CATALOGUE:
        hub.faults = [Fault(kind, seconds=0.01, step=1 << 20, count=1000 if kind.startswith("json") else 0)]
        for address, headers in asked:
            if not hub.fired[kind]:
                try:
                    ask(address, **headers)
                except (OSError, http.client.HTTPException):
                    assert hub.fired[kind]
        assert hub.fired[kind] == 1, kind


# As a process, and its end


def test_nothing_is_left_behind(folder: Path) -> None:
    before = set(threading.enumerate())
    with HubDouble(
        {"org/tiny": folder}, faults=[Fault("cut", how="stall"), Fault("slow_headers", nth=2, seconds=60)]
    ) as hub:
        parts = urlsplit(signed(hub))
        connections = [http.client.HTTPConnection(parts.netloc) for _ in range(3)]
        for connection in connections:
            connection.request("GET", f"{parts.path}?{parts.query}")
        while len(hub.requests) < 4:
            time.sleep(0.01)
        start = time.monotonic()
    assert time.monotonic() - start < SETTLED
    assert set(threading.enumerate()) == before
    for connection in connections:
        connection.close()


def test_the_command(folder: Path) -> None:
    command = [sys.executable, Path(__file__).parent / "hub_double.py", folder, "--fault", "status,where=tree,code=418"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        endpoint = process.stdout.readline().strip().removeprefix("HF_ENDPOINT=")
        name, commit = process.stdout.readline().split()
        assert json.loads(ask(f"{endpoint}/api/models/{name}").body)["sha"] == commit
        assert ask(endpoint + TREE).status == 418
        process.send_signal(signal.SIGINT)
        assert process.wait(SETTLED) == 0
