"""`pull` from the Hub's double, as a user types it: what it says, what it costs, what it leaves, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from hub_double import HubDouble, Repository
from hub_faults import Fault

from mixlocal.cli import main
from mixlocal.store.model_store import ModelStore

TOKEN = "hf_topsecret"
Pull = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("hub") / "m", shards=4)


@pytest.fixture
def hub(folder: Path) -> Iterator[HubDouble]:
    with HubDouble({"org/m": folder}, token=TOKEN) as double:
        yield double


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def environment(hub: HubDouble, home: Path, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept.pop("HF_TOKEN", None)
    return kept | {
        "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "MIXLOCAL_HOME": str(home), "HF_TOKEN": TOKEN
    }  # fmt: skip


@pytest.fixture
def pull(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pull:
    """In this process, which spares it most of its time."""

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
                patch.delenv(name)
            for name, value in (environment | changes).items():
                patch.setenv(name, value)
            patch.setattr(sys, "excepthook", sys.excepthook)
            with pytest.raises(SystemExit) as end:
                main(["pull", *arguments])
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, int(end.value.code or 0), captured.out, captured.err)

    return run


def store(home: Path, name: str = "org--m", variant: str = "q4") -> ModelStore:
    return ModelStore.open(home / "models" / name / variant)


def leftovers(home: Path) -> list[str]:
    """Files below the downloads that are no locks."""
    return sorted(path.name for path in (home / "cache" / "downloads").rglob("*") if not path.name.endswith(".lock"))


def test_a_model_of_the_hub(hub: HubDouble, home: Path, pull: Pull, environment: dict[str, str], folder: Path) -> None:
    """Told, fetched, quantized, freed; the same bytes as from a folder; and a second call asks nobody."""
    run = pull("org/m")
    assert run.returncode == 0, run.stderr
    commit = hub.commit("org/m")
    assert f"org/m at {commit[:12]} -> org--m:q4" in run.stderr
    for word in ("to fetch, of 4 files with weights", "in the end", "all 8 experts", "tokens/s", "is ready"):
        assert word in run.stderr
    assert run.stdout == ""
    manifest = store(home).manifest
    assert (manifest.source.name, manifest.source.revision) == ("org/m", commit)
    assert all(file.sha256 for file in manifest.source.files)
    assert list(store(home).verify())
    assert leftovers(home) == []
    quantize = [sys.executable, "-m", "mixlocal", "quantize", str(folder), "--out", str(home / "direct")]
    subprocess.run(quantize, env=environment, check=True, capture_output=True, timeout=60)
    for name in ("trunk.safetensors", "experts.bin"):
        assert (store(home).folder / name).read_bytes() == (home / "direct" / name).read_bytes()
    asked = len(hub.requests)
    again = pull("org/m")
    assert again.returncode == 0
    assert len(hub.requests) == asked
    prompt = [sys.executable, "-m", "mixlocal", "prompt", "-m", "org/m", "-n", "3", "hi"]
    assert subprocess.run(prompt, env=environment, capture_output=True, timeout=60, check=False).returncode == 0
    assert len(hub.requests) == asked


def test_only_what_is_wanted_is_fetched(tmp_path: Path, environment: dict[str, str], pull: Pull) -> None:
    """Code, pickles and archives of a repository never leave it."""
    folder = tiny.write_checkpoint(tmp_path / "m", shards=2)
    for name in ("modeling_evil.py", "pytorch_model.bin", "weights.zip", "README.md", "notes/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("import os")
    with HubDouble({"org/m": folder}, token=TOKEN) as hub:
        run = pull("org/m", HF_ENDPOINT=hub.endpoint)
        assert run.returncode == 0, run.stderr
        fetched = {request.file for request in hub.requests if request.where in ("resolve", "small", "cdn")}
    assert fetched == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip


def test_a_dry_run_writes_nothing(home: Path, hub: HubDouble, pull: Pull) -> None:
    run = pull("org/m:q8", "--dry-run")
    assert run.returncode == 0, run.stderr
    assert "org--m:q8" in run.stderr
    assert not home.exists()
    assert hub.sent("-of-") <= 4 * (1 << 14)


def test_events_as_json(pull: Pull, hub: HubDouble) -> None:
    hub.faults = [Fault("cut", at=1000, path="00002-of")]
    run = pull("org/m", "--json")
    events = [json.loads(line) for line in run.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "ready"
    assert {"plan", "progress", "notice", "ready"} <= set(kinds)
    plan = next(event for event in events if event["event"] == "plan")
    assert plan["revision"] == hub.commit("org/m")
    assert plan["disk"]["store"] > 0
    assert plan["memory"]["n_records"] == 8
    last = {event["stage"]: event for event in events if event["event"] == "progress"}
    for stage in ("download", "quantize"):
        assert last[stage]["done"] == last[stage]["total"]


def test_an_interrupt_ends_it_at_once_and_the_rerun_goes_on_at_the_byte(
    tmp_path: Path, environment: dict[str, str], pull: Pull
) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 1024}
    folder = tiny.write_checkpoint(tmp_path / "wide", **wide)
    total = (folder / "model.safetensors").stat().st_size
    with HubDouble({"org/wide": folder}, token=TOKEN, rate=4_000_000) as hub:
        environment["HF_ENDPOINT"] = hub.endpoint
        command = [sys.executable, "-m", "mixlocal", "pull", "org/wide"]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            _wait_for(lambda: hub.sent("safetensors") > total // 4)
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            complaint = process.communicate(timeout=10)[1]
            assert time.monotonic() - begun < 1
        assert process.returncode == 130
        assert "go on with: mixlocal pull org/wide" in complaint
        landed = sum(path.stat().st_size for path in tmp_path.rglob("*.part"))
        assert landed > total // 8
        hub.rate = 0
        assert pull("org/wide", HF_ENDPOINT=hub.endpoint).returncode == 0
        resumed = [r for r in hub.requests if r.where == "cdn" and r.start > 0]
        assert [request.start for request in resumed] == [landed]


def _python(environment: dict[str, str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def _wait_for(reached: Callable[[], bool], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        (Fault("repo_404", times=-1), 3, "no such repository"), (Fault("rev_404", times=-1), 3, "no such revision"),
        (Fault("gated_none", times=-1), 11, "its authors ask who you are"),
        (Fault("gated_403", times=-1), 11, "its authors ask who you are"),
        (Fault("bad_token", times=-1), 11, "check HF_TOKEN"),
        (Fault("disabled", times=-1), 11, "the Hub refuses (403)"),
        (Fault("html_200", times=-1), 5, "login page"), (Fault("json_truncated", times=-1), 5, "login page"),
        (Fault("json_deep", times=-1), 5, "login page"), (Fault("json_huge", times=-1), 4, "larger than 32 MiB"),
        (Fault("sha_traversal", times=-1), 4, "no 40-hex commit"), (Fault("link_foreign", times=-1), 4, "another host"),
        (Fault("tree_missing_keys", times=-1), 5, "not what the Hub says"),
        (Fault("tree_many", count=5000), 4, "more than 2000 files"),
        (Fault("path_evil", times=-1), 4, "no honest repository"),
        (Fault("path_evil", times=-1, value="C:\\x.safetensors"), 4, "no honest repository"),
        (Fault("redirect_loop", times=-1), 5, "more than 10 times"),
        (Fault("wrong_bytes", path="00003-of", times=-1, at=20_000), 8, "what came twice is not what the Hub lists"),
        (Fault("tree_wrong_sha", times=-1, path="00001-of"), 8, "what came twice is not what the Hub lists"),
        (Fault("status", times=-1, code=503, where="cdn", path="00001-of"), 5, "the server answered 503"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else None,
)  # fmt: skip
def test_what_cannot_be_had_is_one_clear_line(
    fault: Fault, code: int, says: str, hub: HubDouble, home: Path, pull: Pull
) -> None:
    hub.faults = [fault]
    run = pull("org/m", "--patience", "2")
    assert run.returncode == code, run.stderr
    last = [line for line in run.stderr.splitlines() if line.startswith("mixlocal: ")]
    assert len(last) == 1
    assert says in run.stderr
    assert "Traceback" not in run.stderr
    assert not list(home.rglob("manifest.json"))
    assert hub.leaks.total() == 0
    hub.faults = []
    assert pull("org/m").returncode == 0
    assert leftovers(home) == []


def test_a_branch_that_moves_on_changes_nothing(hub: HubDouble, home: Path, pull: Pull) -> None:
    """What main was at first holds until the model is finished, over several calls too."""
    first = hub.commit("org/m")
    hub.faults = [Fault("ref_moves"), Fault("status", times=-1, code=503, where="cdn", path="00004-of", nth=2)]
    assert pull("org/m", "--patience", "1").returncode == 5
    assert hub.commit("org/m") != first
    hub.faults = []
    assert pull("org/m").returncode == 0
    assert store(home).manifest.source.revision == first


def test_a_revision_may_be_asked_for(hub: HubDouble, home: Path, pull: Pull) -> None:
    old = hub.commit("org/m")
    hub.move("org/m")
    assert pull(f"org/m@{old}").returncode == 0
    assert store(home).manifest.source.revision == old
    other = pull("org/m", "--revision", hub.commit("org/m"))
    assert other.returncode == 4
    assert "remove it first: mixlocal rm org--m:q4" in other.stderr
    assert pull("org/m", "--revision", "../x").returncode == 2
    assert pull(f"org/m@{old}", "--revision", "main").returncode == 2


def test_the_token_goes_to_the_hub_alone(hub: HubDouble, tmp_path: Path, home: Path, pull: Pull) -> None:
    """Neither to another host, nor into what is printed or written."""
    hub.faults = [Fault("redirect_foreign", times=-1), Fault("cut", at=5000), Fault("bad_token", where="tree")]
    refused = pull("org/m", "--json")
    assert refused.returncode == 11
    hub.faults = [Fault("redirect_foreign", times=-1), Fault("cut", at=5000)]
    run = pull("org/m")
    assert run.returncode == 0, run.stderr
    assert {request.origin for request in hub.requests} >= {"hub", "foreign"}
    assert all(request.token is None for request in hub.requests if request.origin != "hub")
    assert any(request.token == TOKEN for request in hub.requests if request.origin == "hub")
    for text in (run.stderr, run.stdout, refused.stderr, refused.stdout):
        assert TOKEN not in text
    for path in (*home.rglob("*"), *(tmp_path / "hf").rglob("*")):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_no_token_over_a_plain_network(pull: Pull) -> None:
    run = pull("org/m", "--patience", "1", HF_ENDPOINT="http://mirror.invalid")
    assert run.returncode == 5
    assert "your token is not sent there" in run.stderr


@pytest.mark.parametrize("endpoint", ["ftp://x", "nonsense", "http://user:word@host"])
def test_an_endpoint_that_is_none(endpoint: str, pull: Pull) -> None:
    run = pull("org/m", HF_ENDPOINT=endpoint)
    assert run.returncode == 4
    assert "HF_ENDPOINT" in run.stderr


def test_gated_needs_the_token(folder: Path, pull: Pull) -> None:
    with HubDouble({"org/m": Repository(folder, gated="manual")}, token=TOKEN) as hub:
        assert pull("org/m", HF_ENDPOINT=hub.endpoint, HF_TOKEN="").returncode == 11
        assert pull("org/m", HF_ENDPOINT=hub.endpoint).returncode == 0


def test_offline(hub: HubDouble, pull: Pull, home: Path) -> None:
    """A finished store asks nobody; without one it says so, and asks nobody either."""
    alone = pull("org/m", HF_HUB_OFFLINE="1")
    assert alone.returncode == 5
    assert "offline" in alone.stderr
    assert hub.requests == []
    assert pull("org/m").returncode == 0
    asked = len(hub.requests)
    assert pull("org/m", "--offline").returncode == 0
    assert pull("org/m", HF_HUB_OFFLINE="1").returncode == 0
    assert len(hub.requests) == asked


def test_a_copy_in_the_cache_of_huggingface_hub_is_adopted(
    hub: HubDouble, folder: Path, tmp_path: Path, home: Path, pull: Pull
) -> None:
    """Read, checked, never changed; and it serves offline too."""
    blobs = _cache(tmp_path / "hf", folder, hub)
    before = {path: path.read_bytes() for path in blobs}
    run = pull("org/m", HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr
    assert hub.requests == []
    assert store(home).manifest.source.revision == hub.commit("org/m")
    shutil.rmtree(home)
    assert pull("org/m").returncode == 0
    assert hub.sent("safetensors") == 0
    assert {path: path.read_bytes() for path in blobs} == before


def test_a_damaged_copy_is_refused(hub: HubDouble, folder: Path, tmp_path: Path, home: Path, pull: Pull) -> None:
    largest = max(_cache(tmp_path / "hf", folder, hub), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-5] ^= 4
    largest.write_bytes(data)
    run = pull("org/m")
    assert run.returncode == 8
    assert "not what the Hub lists under this name" in run.stderr
    assert not list(home.rglob("manifest.json"))


def _cache(hf: Path, folder: Path, hub: HubDouble) -> list[Path]:
    """As huggingface-hub lays it out."""
    root, commit = hf / "hub" / "models--org--m", hub.commit("org/m")
    snapshot = root / "snapshots" / commit
    for part in (snapshot, root / "blobs", root / "refs"):
        part.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    blobs = []
    for entry in hub.repositories["org/m"].commits[commit].values():
        blob = root / "blobs" / (entry.sha256 or entry.oid)
        shutil.copy(folder / entry.path, blob)
        (snapshot / entry.path).symlink_to(f"../../blobs/{blob.name}")
        blobs.append(blob)
    return blobs


def test_other_variants_come_from_the_bf16_one(hub: HubDouble, home: Path, pull: Pull) -> None:
    """Nothing is fetched twice, and the bytes are those of a pull."""
    assert pull("org/m").returncode == 0
    expected = {path.name: path.read_bytes() for path in store(home).folder.iterdir()}
    shutil.rmtree(home)
    assert pull("org/m:bf16").returncode == 0
    asked = len(hub.requests)
    assert pull("org/m:q4").returncode == 0
    assert len(hub.requests) == asked
    assert {path.name: path.read_bytes() for path in store(home).folder.iterdir()} == expected


def test_the_source_may_be_kept(hub: HubDouble, folder: Path, home: Path, pull: Pull) -> None:
    """And serves the next variant without a byte of the network."""
    assert pull("org/m", "--keep-source").returncode == 0
    kept = home / "cache" / "downloads" / "org--m"
    for path in folder.iterdir():
        assert (kept / path.name).read_bytes() == path.read_bytes()
    sent = hub.sent("safetensors")
    assert pull("org/m:q8").returncode == 0
    assert hub.sent("safetensors") == sent


def test_the_rate_is_held(tmp_path: Path, pull: Pull) -> None:
    folder = tiny.write_checkpoint(tmp_path / "m", shards=2, hidden_size=256, intermediate_size=512)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with HubDouble({"org/m": folder}, token=TOKEN) as hub:
        fast = _seconds(lambda: pull("org/m:bf16", HF_ENDPOINT=hub.endpoint))
        other = {"HF_ENDPOINT": hub.endpoint, "MIXLOCAL_HOME": str(tmp_path / "2")}
        slow = _seconds(lambda: pull("org/m:q4", "--limit-rate", "2M", **other))
    assert slow - fast > 0.6 * total / 2e6
    assert pull("org/m", "--limit-rate", "0").returncode == 2


def _seconds(work: Callable[[], subprocess.CompletedProcess[str]]) -> float:
    begun = time.monotonic()
    assert work().returncode == 0
    return time.monotonic() - begun


def test_only_pickled_weights_are_refused(tmp_path: Path, pull: Pull) -> None:
    folder = tiny.write_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with HubDouble({"org/m": folder}, token=TOKEN) as hub:
        run = pull("org/m", HF_ENDPOINT=hub.endpoint)
        assert run.returncode == 4
        assert "only pickled weights (pytorch_model.bin)" in run.stderr
        assert not any(request.file.endswith(".bin") for request in hub.requests)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_local_experts": 10**9}, "num_local_experts"), ({"model_type": "gpt2"}, "model_type"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"), ({"hidden_size": 63}, "hidden_size"),
        ({"vocab_size": 261}, "tensors do not match config.json"),
    ],
)  # fmt: skip
def test_a_config_that_lies_is_refused_before_the_weights(
    changes: dict[str, object], says: str, tmp_path: Path, pull: Pull
) -> None:
    folder = tiny.write_checkpoint(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG | changes))
    with HubDouble({"org/m": folder}, token=TOKEN) as hub:
        run = pull("org/m", HF_ENDPOINT=hub.endpoint)
        assert run.returncode == 4, run.stderr
        assert says in run.stderr
        assert hub.sent("safetensors") <= 1 << 14


def test_a_disk_or_memory_that_is_too_small_is_told_first(
    environment: dict[str, str], hub: HubDouble
) -> None:
    """Through the use case itself: this machine's own disk and memory are what they are."""
    code = (
        "import shutil, sys\n"
        "from collections import namedtuple\n"
        "usage = namedtuple('usage', 'total used free')\n"
        "shutil.disk_usage = lambda path: usage(10, 10, 1000)\n"
        "from mixlocal.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    run = _python(environment, code, "pull", "org/m")
    assert run.returncode == 6
    assert "GB are needed at most" in run.stderr
    assert hub.sent("-of-") <= 4 * (1 << 14)


def test_a_read_only_home_is_told_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, hub: HubDouble, home: Path, pull: Pull
) -> None:
    home.write_text("a file")
    assert pull("org/m").returncode == 3
    home.unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    run = pull("org/m")
    assert run.returncode == 14
    assert "not writable" in run.stderr
    assert hub.requests == []


def test_two_at_once(hub: HubDouble, home: Path, environment: dict[str, str]) -> None:
    """Both end well, and nothing is fetched twice but headers."""
    command = [sys.executable, "-m", "mixlocal", "-q", "pull", "org/m"]
    runs = [subprocess.Popen(command, env=environment) for _ in range(2)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    assert list(store(home).verify())
    total = sum(entry.nbytes for entry in hub.repositories["org/m"].commits[hub.commit("org/m")].values())
    assert hub.sent("safetensors") <= total + 2 * 4 * (1 << 14)


def test_no_sockets_are_opened_for_a_finished_store(home: Path, pull: Pull, environment: dict[str, str]) -> None:
    assert pull("org/m").returncode == 0
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise SystemExit('a connection was tried')\n"
        "socket.socket.connect = refuse\n"
        "from mixlocal.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    for arguments in (["pull", "org/m"], ["prompt", "-m", "org/m", "-n", "2", "hi"]):
        run = _python(environment, code, *arguments)
        assert run.returncode == 0, run.stderr


def test_prune(home: Path, hub: HubDouble, pull: Pull, environment: dict[str, str]) -> None:
    """What a finished model left goes; an unfinished pull stays unless it is asked for."""
    assert pull("org/m", "--keep-source").returncode == 0
    hub.faults = [Fault("status", times=-1, code=503, path="00004-of", nth=2)]
    hub.repositories["org/n"] = hub.repositories["org/m"]
    assert pull("org/n", "--patience", "1").returncode == 5
    prune = [sys.executable, "-m", "mixlocal", "prune", "--yes"]
    run = subprocess.run(prune, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    downloads = home / "cache" / "downloads"
    assert not (downloads / "org--m").exists()
    assert (downloads / "org--n").exists()
    assert (home / "models" / "org--n" / "q4.building").exists()
    subprocess.run([*prune, "--unfinished"], env=environment, capture_output=True, timeout=60, check=True)
    assert not (downloads / "org--n").exists()
    assert not (home / "models" / "org--n" / "q4.building").exists()
    assert list(store(home).verify())


HOSTILE = (
    Fault("wrong_bytes", times=-1, at=20_000), Fault("redirect_foreign", times=-1),
    Fault("xet_advertised", times=-1), Fault("etag_traversal", times=-1),
)  # fmt: skip
AUDITED = """
import socket, sys
import huggingface_hub.hf_api, torch  # what importing does is not what is watched
from mixlocal.cli import main

def watch(event, arguments):
    if event.startswith(("pickle.", "subprocess.", "os.system", "os.exec", "os.spawn", "os.fork", "webbrowser.")):
        print("AUDIT", event, arguments, file=sys.stderr, flush=True)
    if event == "socket.connect" and not str(arguments[1][0]).startswith("127."):
        print("AUDIT", event, arguments, file=sys.stderr, flush=True)

sys.addaudithook(watch)
main(["pull", "org/evil", "--patience", "1"])
"""


def test_a_hostile_repository_runs_nothing(
    tmp_path: Path, home: Path, environment: dict[str, str]
) -> None:
    """Code and pickles beside the weights, custom code named by the config, and a Hub that lies."""
    folder = tiny.write_checkpoint(tmp_path / "evil", shards=2, auto_map={"AutoModel": "modeling_evil.Evil"})
    for name in ("modeling_evil.py", "pytorch_model.bin", "setup.py", "x.zip"):
        (folder / name).write_text("raise SystemExit('ran')")
    before = {path for path in tmp_path.rglob("*") if home not in path.parents}
    with HubDouble({"org/evil": folder}, token=TOKEN) as hub:
        environment["HF_ENDPOINT"] = hub.endpoint
        for faults in ([], HOSTILE[:1], HOSTILE[1:]):
            hub.faults = list(faults)
            run = _python(environment, AUDITED)
            assert "AUDIT" not in run.stderr, run.stderr
            assert "Traceback" not in run.stderr, run.stderr
            shutil.rmtree(home)
    assert hub.leaks.total() == 0
    after = {path for path in tmp_path.rglob("*") if home not in path.parents}
    assert {path for path in after - before if "hf" not in path.relative_to(tmp_path).parts} == set()


def test_what_a_server_says_reaches_no_terminal(hub: HubDouble, pull: Pull) -> None:
    """As control characters; what they are is shown."""
    message = {"X-Error-Message": "\x1b]0;evil\x07 \x9b31m \u202e".encode().decode("latin-1")}
    hub.faults = [Fault("status", where="revision", code=403, headers=message, times=-1)]
    run = pull("org/m")
    assert run.returncode == 11
    assert "evil" in run.stderr
    assert not set(run.stderr) & set("\x1b\x07\x9b\u202e")


@pytest.mark.parametrize("limit", [600, 40_000, 110_000])
def test_a_full_disk_at_any_size(
    limit: int, hub: HubDouble, home: Path, environment: dict[str, str], pull: Pull
) -> None:
    """One line and exit 6; what came before is gone on from when there is room."""
    code = (
        "import resource, sys\n"
        "from mixlocal.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "main(sys.argv[1:])\n"
    )
    run = _python(environment, code, "pull", "org/m")
    assert run.returncode == 6, run.stderr
    assert "file too large" in run.stderr
    assert "Traceback" not in run.stderr
    assert pull("org/m").returncode == 0
    assert list(store(home).verify())
    assert leftovers(home) == []


def test_tls_where_there_is_none(hub: HubDouble, pull: Pull) -> None:
    run = pull("org/m", "--patience", "1", HF_ENDPOINT=hub.endpoint.replace("http:", "https:"))
    assert run.returncode == 5
    assert "Traceback" not in run.stderr


def test_a_folder_is_quantized(folder: Path, home: Path, hub: HubDouble, pull: Pull, tmp_path: Path) -> None:
    assert pull(f"{folder}:q8").returncode == 0
    assert store(home, "m", "q8").manifest.source.name == "m"
    missing = pull(str(tmp_path / "nowhere"))
    assert missing.returncode == 3
    assert "no such folder" in missing.stderr
    assert hub.requests == []


def test_a_home_with_too_long_a_path(hub: HubDouble, pull: Pull) -> None:
    run = pull("org/m", MIXLOCAL_HOME="/tmp/" + "/".join(["x" * 200] * 25))
    assert run.returncode == 2
    assert "too long a path" in run.stderr
    assert hub.requests == []


def test_a_header_that_came_wrong_is_fetched_again(hub: HubDouble, home: Path, pull: Pull) -> None:
    """With its shard: what its first bytes were taken for is compared with what they are."""
    hub.faults = [Fault("wrong_bytes", path="00001-of", nth=2, at=20)]
    run = pull("org/m")
    assert run.returncode == 0, run.stderr
    assert "fetching it again" in run.stderr
    assert hub.fired["wrong_bytes"] == 1
    assert leftovers(home) == []
    assert list(store(home).verify())


def test_a_header_that_came_wrong_at_first_is_refused(hub: HubDouble, home: Path, pull: Pull) -> None:
    hub.faults = [Fault("wrong_bytes", path="00001-of", at=20)]
    assert pull("org/m").returncode in (4, 8)
    assert not list(home.rglob("manifest.json"))
    assert pull("org/m").returncode == 0


def test_a_model_with_numbers_that_are_none_is_refused(tmp_path: Path, home: Path, pull: Pull) -> None:
    """Only when the hash has shown that the numbers, and not the network, are bad."""
    folder = tmp_path / "m"
    weights = tiny.tensors(tiny.CONFIG)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    weights[name][3, 5] = float("nan")
    tiny.write_checkpoint(folder)
    tiny.write_shards(folder, weights)
    with HubDouble({"org/m": folder}, token=TOKEN) as hub:
        run = pull("org/m", HF_ENDPOINT=hub.endpoint)
    assert run.returncode == 4
    assert name in run.stderr
    assert not list(home.rglob("manifest.json"))
