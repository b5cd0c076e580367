"""TAB, in the shells themselves: what stands in the line afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete

from mixlocal.app import names
from mixlocal.app.catalog import VARIANTS, read_catalog
from mixlocal.cli import COMMANDS, cli
from mixlocal.store.paths import Home
from mixlocal.store.session_db import SessionDb

BIN = Path(sys.executable).parent
needs = {shell: pytest.mark.skipif(not shutil.which(shell), reason=f"no {shell}") for shell in ("bash", "zsh", "fish")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a model that the catalogue does not know, what is no model, and saved chats."""
    root = tmp_path_factory.mktemp("place")
    for store in ("mytiny/q4", "mytiny/bf16", "half/q4.building", "odd name/q4", "mytiny/.q8.1.removed"):
        (root / "models" / store).mkdir(parents=True)
        (root / "models" / store / "manifest.json").touch()
    (root / "models" / "unfinished" / "q4").mkdir(parents=True)
    with SessionDb(Home(root, root).sessions_db) as db:
        for name in ("why-is-the-sky-blue", "two words"):
            db.create(name, "tiny", "q4", "")
    return root


def environment(place: Path) -> dict[str, str]:
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "MIXLOCAL_HOME": str(place), "HOME": str(place), "TERM": "xterm"}


LINES = [
    ("prompt -m smol", "prompt -m smolmix"),
    ("prompt -m smolmix:b", "prompt -m smolmix:bf16"),
    ("prompt --model=smolmix:b", "prompt --model=smolmix:bf16"),
    ("plan my", "plan mytiny"),
    ("prompt --temp", "prompt --temperature"),
    ("quant", "quantize"),
]
START = {
    "bash": (["--norc", "--noprofile"], "bind 'set enable-bracketed-paste off'"),
    "zsh": (["-f"], "autoload -Uz compinit; compinit -D; bindkey -e"),
}


@contextlib.contextmanager
def terminal(shell: str, place: Path) -> Iterator[Any]:
    pexpect = pytest.importorskip("pexpect")
    arguments, first = START[shell]
    child = pexpect.spawn(
        shell, arguments, env=environment(place), encoding="utf-8", timeout=60, dimensions=(24, 200), cwd=str(place)
    )
    try:
        child.sendline(f"{first}; eval \"$(mixlocal completion {shell})\"; echo 'READ''Y'")
        child.expect("READY")
        yield child
    finally:
        child.close(force=True)


@pytest.mark.parametrize("shell", [pytest.param("bash", marks=needs["bash"]), pytest.param("zsh", marks=needs["zsh"])])
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # we exec at once
def test_tab(place: Path, shell: str) -> None:
    with terminal(shell, place) as child:
        for typed, completed in LINES:
            child.send(f"mixlocal {typed}\t")
            child.send("\x01echo '<<\x05>>'\r")  # the line, as an argument of echo
            child.expect("\n<<(.*?)>>\r")
            assert child.match[1].rstrip() == f"mixlocal {completed}"


@needs["fish"]
def test_tab_in_fish(place: Path) -> None:
    asked = "\n".join(f"echo '>'; complete -C 'mixlocal {typed}'" for typed, _ in LINES)
    script = f"mixlocal completion fish | source\n{asked}"
    command = ["fish", "--no-config", "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(place), cwd=place, check=True)
    assert result.stderr == ""
    for (_, completed), answer in zip(LINES, result.stdout.split(">\n")[1:], strict=True):
        assert [line.split("\t")[0] for line in answer.splitlines()] == [completed.split()[-1]]


@needs["bash"]
def test_bash_replaces_only_what_is_behind_a_colon(place: Path) -> None:
    """Its own cutting of words, as the function sees it; and a name with a space is quoted."""
    calls = [
        ("mixlocal show smolmix:", "", ["q4", "int4", "int4-32", "q8", "mix", "bf16"]),
        ("mixlocal show smolmix:q", "q", ["q4", "q8"]),
        ("mixlocal show smolmix:q", "smolmix:q", ["smolmix:q4", "smolmix:q8"]),  # with ":" out of COMP_WORDBREAKS
        ("mixlocal show nobody:", "", []),
    ]
    lines = [
        f'COMP_LINE="{line}" COMP_POINT={len(line)}; _mixlocal_completion mixlocal "{word}"; echo "${{COMPREPLY[*]}}"'
        for line, word, _ in calls
    ]
    script = "\n".join(['eval "$(mixlocal completion bash)"', *lines])
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment(place), check=True)
    assert result.stderr == ""
    assert [line.split() for line in result.stdout.splitlines()] == [expected for _, _, expected in calls]


def completions(place: Path, *words: str) -> list[str]:
    """What is offered for the last of `words`."""
    shell = ShellComplete(cli, {}, "mixlocal", "_MIXLOCAL_COMPLETE")
    return [item.value for item in shell.get_completions(["--home", str(place), *words[:-1]], words[-1])]


def test_models(place: Path) -> None:
    assert completions(place, "show", "") == ["mytiny", *read_catalog()]
    assert completions(place, "prompt", "-m", "mytiny:") == [
        f"mytiny:{variant}" for variant in ("q4", "int4", "int4-32", "q8", "mix", "bf16")
    ]
    assert completions(place, "rm", "my") == ["mytiny"]
    assert completions(place, "show", "./x") == ["./x"], "the shell is asked for folders"


def test_commands_and_flags(place: Path) -> None:
    assert completions(place, "") == list(COMMANDS)
    assert completions(place, "config", "") == ["edit", "path", "set", "show", "unset"]
    assert completions(place, "prompt", "--top") == ["--top-p", "--top-k"]
    assert completions(place, "prompt", "--kv-dtype", "") == ["f16", "f32"]


def test_saved_chats(place: Path, tmp_path: Path) -> None:
    assert sorted(names.session_names(Home(place, place))) == ["two words", "why-is-the-sky-blue"]
    assert names.session_names(Home(tmp_path, tmp_path)) == []
    assert not list(tmp_path.iterdir()), "to ask creates nothing"
    (tmp_path / "sessions.db").write_bytes(b"no database" * 100)
    assert names.session_names(Home(tmp_path, tmp_path)) == []
    with contextlib.closing(sqlite3.connect(tmp_path / "sessions.db.2")) as other:
        other.execute("CREATE TABLE session (name, updated)")
        other.execute("INSERT INTO session VALUES ('\x1b[2J', 1), (5, 2), ('fine', 3)")
        other.commit()
    (tmp_path / "sessions.db.2").rename(tmp_path / "sessions.db")
    assert names.session_names(Home(tmp_path, tmp_path)) == ["fine"]


def test_names_are_those_of_the_catalogue() -> None:
    assert tuple(VARIANTS) == names.VARIANTS
    assert names.catalogue_models() == {name: entry.description for name, entry in read_catalog().items()}


def ask(place: Path, line: str, **more: str) -> subprocess.CompletedProcess[str]:
    variables = {"COMP_WORDS": line, "COMP_CWORD": line.split()[-1], "_MIXLOCAL_COMPLETE": "bash_complete"}
    command = [sys.executable, "-m", "mixlocal"]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(place) | variables | more, check=False
    )


def test_nothing_heavy_is_imported_and_nothing_is_said(place: Path, tmp_path: Path) -> None:
    result = ask(place, "mixlocal prompt -m smol", PYTHONPROFILEIMPORTTIME="1")
    assert result.stdout == "plain,smolmix\n"
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "mixlocal.cli.completion" in imported
    assert not {"torch", "msgspec", "rich", "numpy"} & imported
    (tmp_path / "config.toml").write_text("= =")
    for line, more in (("mixlocal show smol", {"MIXLOCAL_HOME": str(tmp_path)}), ("mixlocal promt x", {})):
        result = ask(place, line, **more)
        assert (result.stderr, "plain,smolmix" in result.stdout) == ("", "show" in line)
    assert ask(place, "mixlocal x", _MIXLOCAL_COMPLETE="nonsense").returncode == 1


def test_help_and_version_stay_light() -> None:
    for flag in ("--help", "--version"):
        command = [sys.executable, "-X", "importtime", "-m", "mixlocal", flag]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        assert not {"torch", "msgspec", "rich", "numpy", "tomllib", "platformdirs"} & imported
        assert not {name for name in imported if name.startswith("mixlocal.cli.") and name[13:] in COMMANDS}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_printed(run, shell: str) -> None:
    result = run("completion", shell)
    assert (result.code, result.err) == (0, "")
    assert f"_MIXLOCAL_COMPLETE={shell}_complete" in result.out
    assert isinstance(cli.get_command(click.Context(cli), "completion"), click.Command)
