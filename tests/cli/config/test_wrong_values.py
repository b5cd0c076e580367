"""A value that cannot be names where it stands: a variable (exit 2), or file and key (exit 4)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixlocal.cli import main
from mixlocal.errors import NotFoundError

Seen = dict[str, Any]


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("MIXLOCAL_TEMPERATURE", "warm", "MIXLOCAL_TEMPERATURE: 'warm' is not a valid float"),
        ("MIXLOCAL_PROMPT_TOP_K", "1.5", "MIXLOCAL_PROMPT_TOP_K: '1.5' is not a valid integer"),
        ("MIXLOCAL_STATS", "perhaps", "MIXLOCAL_STATS: 'perhaps' is not a valid boolean"),
        ("MIXLOCAL_QUIET", "perhaps", "MIXLOCAL_QUIET: 'perhaps' is not a valid boolean"),
        ("MIXLOCAL_COLOR", "red", "MIXLOCAL_COLOR: 'red' is not one of"),
        ("MIXLOCAL_KV_DTYPE", "f8", "MIXLOCAL_KV_DTYPE: 'f8' is not one of 'f16', 'f32'"),
        ("MIXLOCAL_RAM", "8Q", "MIXLOCAL_RAM: --ram '8Q' is no size"),
        ("MIXLOCAL_TEMPERATURE", "1e9", "MIXLOCAL_TEMPERATURE: temperature = 1000000000.0 is outside 0 to 100"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_named(
    run, own, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    for words in (("prompt", "-m", "tiny", "hello"), ("config", "show")):
        result = run(*words)
        assert (result.code, result.out) == (2, "")
        assert variable in result.err
        assert says in result.err or words[0] == "config"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("temperature = 'warm'", "config.toml: temperature = \"warm\": must be a number"),
        ("temperature = true", "temperature = true: must be a number"),
        ("top-k = 1.5", "top-k = 1.5: must be a whole number"),
        ("stats = 1", "stats = 1: must be true or false"),
        ("[prompt]\nstats = 'yes'", "prompt.stats = \"yes\": must be true or false"),
        ("quiet = 'yes'", "quiet = \"yes\": must be true or false"),
        ("kv-dtype = ['f16']", "kv-dtype = [\"f16\"]: must be one of f16, f32"),
        ("kv-dtype = 'f8'", "config.toml: kv-dtype: 'f8' is not one of 'f16', 'f32'"),
        ("model = 1979-05-27", "model = 1979-05-27: must be a text"),
        ('model = "a\\u0000b"', "must be a text"),
        ("stop = ['a', 1979-05-27]", "must be a text, or several in brackets"),
        ("ram = '8Q'", "config.toml: ram: --ram '8Q' is no size"),
        ("temperature = 1e9", "temperature = 1000000000.0 is outside 0 to 100"),
        ("temperature = nan", "temperature = nan is outside 0 to 100"),
        ("seed = 99999999999999999999", "seed: a whole number of more than 64 bits"),
        ("tempertaure = 1", "tempertaure: no such key"),
        ("[prompt]\nlimit-rate = '1M'", "prompt.limit-rate: no such key"),
        ("[promt]\nseed = 1", "promt: there is no such command"),
        ("[promt]", "promt: there is no such command"),
        ("[prompt.more]\nseed = 1", "prompt.more: there is no such command"),
        ("no-stats = true", "no-stats: no such key"),
        ("yes = true", "yes cannot be set: it answers one question"),
        ("[prompt]\nforce = true", "prompt.force cannot be set"),
        ("home = '/x'", "home cannot be set here"),
        ("max-tokens = 1\nmax_tokens = 2", "max-tokens is there twice"),
        ("a = 1\nb = = 2", "(at line 2, column 5)"),
        ("temperature = 'warm", "(at end of document)"),
        ("x = " + "[" * 5000, "nested too deeply"),
        ("[a.b.c.d.e.f]", "nested too deeply"),
        ("a = 1\n" * 200_000, "larger than 1 MB"),
    ],
    ids=lambda text: text[:24],
)  # fmt: skip
def test_a_wrong_file_is_refused_and_named(run, write, text: str, says: str) -> None:
    path = write(text)
    for words in (("prompt", "-m", "tiny", "hello"), ("config", "show")):
        result = run(*words)
        assert (result.code, result.out) == (4, "")
        assert f"mixlocal: {path}: " in result.err
        assert says in result.err or words[0] == "config"
        assert len(result.err.splitlines()) == 2 or "larger" in says
        assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("tempertaure = 1", "did you mean temperature?"),
        ("[promt]\nseed = 1", "did you mean prompt?"),
        ("no-stats = true", "write stats = false"),
        ("qqqq = 1", "see all of them with: mixlocal config show"),
    ],
)
def test_the_nearest_is_suggested(run, write, text: str, hint: str) -> None:
    write(text)
    assert hint in run("ls").err


def test_a_key_of_another_command_is_no_error_and_costs_no_import(run, write) -> None:
    write("limit-rate = '1M'\nrepetitions = 3\n[bench]\nwarmup = false\n[show]\nnonsense = 1")
    assert run("ls").code == 0
    result = run("config", "show")
    assert result.code == 4
    assert "show.nonsense: no such key" in result.err
    write("quiet = true\n[bench]\nwarmup = false")
    probe = (
        "import sys, mixlocal.cli as c\ntry: c.main(['config', 'path'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    modules = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.split()
    assert "mixlocal.cli.config" in modules
    assert not {"mixlocal.cli.bench", "mixlocal.cli.pull", "torch", "msgspec"} & set(modules)


def test_the_file_itself(run, own: Path, tmp_path: Path) -> None:
    file = own / "config.toml"
    file.mkdir()
    result = run("ls")
    assert (result.code, "is a folder and no file" in result.err) == (4, True)
    file.rmdir()
    file.symlink_to(file)  # nobody can open it, not even root
    assert run("ls").code == 14
    file.unlink()
    file.write_bytes(b"model = '\xff'")
    result = run("ls")
    assert (result.code, "not UTF-8: byte 9 is 0xff" in result.err) == (4, True)
    file.write_text("quiet = true")
    file.chmod(0o777)
    assert run("ls").code == 0


def test_another_file(run, own: Path, write, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    write("seed = 1")
    (own / "other.toml").write_text("seed = 2")
    (own / "third.toml").write_text("seed = 3")
    monkeypatch.setenv("MIXLOCAL_CONFIG", str(own / "other.toml"))
    assert run("prompt", "x").code == 0
    assert seen["seed"] == 2
    assert run("--config", str(own / "third.toml"), "prompt", "x").code == 0
    assert seen["seed"] == 3
    assert run("--config", os.devnull, "prompt", "x").code == 0
    assert seen["seed"] is None
    result = run("--config", str(own / "absent.toml"), "ls")
    assert (result.code, "absent.toml: no such file" in result.err) == (3, True)


def test_help_comes_even_if_the_file_is_wrong(run, write) -> None:
    write("temperature = = 1")
    assert run("--help").err == ""
    result = run("prompt", "--help")
    assert (result.code, "--temperature" in result.out) == (0, True)
    assert "warning:" in result.err
    assert "line 1, column 15" in result.err
    assert run("--version").code == 0


def test_json_of_the_file_makes_errors_json_too(run, write) -> None:
    write("json = true")
    result = run("show", "nobody")
    assert (result.code, json.loads(result.err)["error"]["exit"]) == (3, 3)


def test_debug_of_the_environment(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLOCAL_DEBUG", "1")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(NotFoundError):
        main(["show", "nobody"])
    assert sys.excepthook is sys.__excepthook__


def test_a_model_nobody_knows_says_who_named_it(run, write) -> None:
    path = write("model = 'nobody'")
    result = run("plan")
    assert result.code == 3
    assert f"the name is from {path}: model" in result.err
    assert "the name is from" not in run("plan", "somebody").err


def test_what_a_file_says_reaches_the_terminal_neutralised(run, write) -> None:
    write('model = "\\u001b]0;owned\\u0007"\nsystem = "[red]x\\n\\u001b[2J"')
    for result in (run("plan"), run("config", "show"), run("config", "show", "--json")):
        assert "\x1b" not in result.out + result.err
    assert "[red]x ^[[2J" in run("config", "show").out
