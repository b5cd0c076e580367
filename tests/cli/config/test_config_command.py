"""mixlocal config: show, path, edit, set, unset."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from mixlocal.app import config as config_file


def rows(run, *words: str) -> dict[str, tuple[Any, str]]:
    result = run("config", "show", "--json", *words)
    assert result.code == 0, result.err
    return {row["name"]: (row["value"], row["origin"]) for row in json.loads(result.out)["settings"]}


def test_show_says_where_each_value_comes_from(run, write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("ram = '4G'\ntemperature = 0.5\n[bench]\nram = '5G'\n[prompt]\nquiet = false")
    monkeypatch.setenv("MIXLOCAL_VRAM", "2G")
    monkeypatch.setenv("MIXLOCAL_PROMPT_SEED", "3")
    found = rows(run)
    assert found["ram"] == ("4G", "config.toml: ram")
    assert found["bench.ram"] == ("5G", "config.toml: bench.ram")
    assert found["vram"] == ("2G", "MIXLOCAL_VRAM")
    assert found["prompt.seed"] == ("3", "MIXLOCAL_PROMPT_SEED")
    assert found["prompt.quiet"] == (False, "config.toml: prompt.quiet")
    assert found["quiet"] == (False, "built-in")
    assert found["temperature"] == (0.5, "config.toml: temperature"), "before the entry of smolmix"
    assert found["top-p"] == (0.9, "model entry: smolmix")
    assert found["top-k"] == (0, "built-in")
    assert found["model"] == ("smolmix", "built-in")
    assert found["json"] == (True, "--json")


def test_show_with_a_model(run, write, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(run, "-m", "mixtral-8x7b")["temperature"] == (0.7, "built-in")
    write("model = 'mixtral-8x7b:q8'")
    found = rows(run)
    assert found["model"] == ("mixtral-8x7b:q8", "config.toml: model")
    assert found["temperature"] == (0.7, "built-in")
    found = rows(run, "-m", "smolmix:q4")
    assert found["model"] == ("smolmix:q4", "--model")
    assert found["temperature"] == (0.2, "model entry: smolmix")
    monkeypatch.setenv("MIXLOCAL_MODEL", "smolmix")
    assert rows(run)["temperature"] == (0.2, "model entry: smolmix")


def test_plain_config_is_show(run, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("config")
    assert result.out == run("config", "show").out
    assert f"config  {own / 'config.toml'} (not there)" in result.out
    assert f"state   {own / 'state'}" in result.out
    assert ["temperature", "0.2", "model", "entry:", "smolmix"] in [line.split() for line in result.out.splitlines()]
    assert json.loads(run("config", "--json").out)["folders"]["cache"] == str(own / "cache")


def test_variables_that_set_nothing_are_told(run, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIXLOCAL_TEMPRATURE", "MIXLOCAL_YES", "MIXLOCAL_ISA", "MIXLOCAL_PROMPT_SEED"):
        monkeypatch.setenv(name, "1")
    lines = run("config").err.splitlines()
    assert lines[0] == "warning: MIXLOCAL_TEMPRATURE sets nothing; did you mean MIXLOCAL_TEMPERATURE?"
    assert lines[1].startswith("warning: MIXLOCAL_YES cannot be set")
    assert len(lines) == 2


def test_path_even_if_the_file_is_wrong(run, write) -> None:
    path = write("= =")
    assert run("config", "path").out == f"{path}\n"
    assert run("config", "path", "--help").code == 0
    assert run("config", "show").code == 4


def test_set_and_unset_keep_the_rest(run, own: Path, write) -> None:
    path = write("# mine\ntemperature = 0.5  # warm\n\n[prompt]\nmax_tokens = 9 # few\n")
    for key, value in (("temperature", "0.7"), ("prompt.max-tokens", "10"), ("ram", "4G"), ("bench.warmup", "no")):
        result = run("config", "set", key, value)
        assert (result.code, result.out) == (0, ""), result.err
    assert path.read_text() == (
        '# mine\ntemperature = 0.7  # warm\nram = "4G"\n\n[prompt]\nmax_tokens = 10 # few\n\n[bench]\nwarmup = false\n'
    )
    assert run("config", "unset", "prompt.max-tokens").code == 0
    assert run("config", "unset", "ram").code == 0
    assert path.read_text() == "# mine\ntemperature = 0.7  # warm\n\n[prompt]\n\n[bench]\nwarmup = false\n"
    assert run("config", "unset", "ram").code == 3


def test_set_begins_a_file_and_follows_a_link(run, own: Path, tmp_path: Path) -> None:
    assert run("--home", str(own / "new"), "config", "set", "quiet", "true").code == 0
    assert (own / "new" / "config.toml").read_text() == "quiet = true\n"
    real = own / "dotfiles.toml"
    real.write_text("# mine\n")
    real.chmod(0o600)
    (own / "config.toml").symlink_to(real)
    assert run("config", "set", "model", "tiny").code == 0
    assert (own / "config.toml").is_symlink()
    assert real.read_text() == '# mine\nmodel = "tiny"\n'
    assert stat.S_IMODE(real.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("tempertaure", "1", "tempertaure: no such key"),
        ("promt.seed", "1", "did you mean prompt.seed?"),
        ("yes", "true", "yes cannot be set: it answers"),
        ("home", "/x", "it says where the file lies"),
        ("temperature", "warm", "must be a number"),
        ("temperature", "1e9", "outside 0 to 100"),
        ("threads", "1,2", "must be a whole number"),
        ("stats", "perhaps", "must be true or false"),
        ("ram", "8Q", "--ram '8Q' is no size"),
        ("kv-dtype", "f8", "'f8' is not one of"),
        ("pull.jobs", "99", "99 is not in the range"),
        ("stop", "[1, ", "or several in brackets"),
        ("model", "\udcff", "not UTF-8"),
    ],
)
def test_set_refuses_what_no_command_would_take(run, own: Path, key: str, value: str, says: str) -> None:
    result = run("config", "set", key, value)
    assert (result.code, says in result.err) == (2, True), result.err
    assert not (own / "config.toml").exists()


@pytest.mark.parametrize("value", ["1,2", "4"])
def test_set_of_a_number_that_may_be_several(run, own: Path, value: str) -> None:
    assert run("config", "set", "bench.threads", value).code == 0
    assert rows(run)["bench.threads"][0] == value
    assert run("config", "set", "stop", '["a", "b"]').code == 0
    assert run("config", "set", "prompt.stop", "c").code == 0
    found = rows(run)
    assert (found["stop"][0] if "stop" in found else ["a", "b"], found["prompt.stop"][0]) == (["a", "b"], ["c"])


def editor(folder: Path, script: str) -> str:
    path = folder / "an editor"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"'{path}' --wait"


def test_edit(run, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = own / "config.toml"
    monkeypatch.setenv("EDITOR", "false")
    monkeypatch.setenv("VISUAL", editor(own, f'cp "$2" "{own}/offered"; echo "quiet = true" >> "$2"'))
    assert run("config", "edit").code == 0
    assert "# temperature = NUMBER" in (own / "offered").read_text()
    assert "# Stop after so many tokens." in (own / "offered").read_text()
    assert config_file.read_config(file).values == {("quiet",): True}
    assert run("config", "set", "temperature", "0.5").code == 0
    assert "# temperature = NUMBER\ntemperature = 0.5\n" in file.read_text()
    monkeypatch.setenv("VISUAL", editor(own, 'echo "stats = 3" >> "$2"'))
    result = run("config", "edit")
    assert (result.code, "stats = 3: must be true or false" in result.err) == (4, True)
    monkeypatch.setenv("VISUAL", editor(own, "exit 3"))
    assert "ended with 3" in run("config", "edit").err
    monkeypatch.setenv("VISUAL", str(own / "absent"))
    assert run("config", "edit").code == 3
    monkeypatch.delenv("VISUAL")
    monkeypatch.delenv("EDITOR")
    assert run("config", "edit").code == 2, "no terminal, so no guess"


def test_every_commented_default_is_right(run, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the file offers can be taken as it is, but for the placeholders in capitals."""
    monkeypatch.setenv("EDITOR", "true")
    assert run("config", "edit").code == 0
    file = own / "config.toml"
    offered = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ") and " = " in line]
    lines = [line for line in offered if not line.split(" = ")[1].strip('"').replace(",...", "").isupper()]
    assert len(lines) > 25
    file.write_text("\n".join(lines))
    assert run("config", "show").code == 0, file.read_text()
