"""Flags > MIXLOCAL_<COMMAND>_<FLAG> > MIXLOCAL_<FLAG> > a command's table > the top of config.toml > what is built in.

For every flag that there is, in every command that has it. That the model's entry stands between the last two is shown
by `config show`.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from mixlocal.app import config as config_file
from mixlocal.cli import COMMANDS, cli
from mixlocal.cli.config_rows import SAMPLING, commands, every_setting
from mixlocal.cli.flags import ONE_OFF, SAYS_WHERE, Setting, all_settings, kind, own_settings
from mixlocal.engine.params import SamplingParams

Seen = dict[str, Any]

LEVELS = [
    # flag, its short form, five values from the weakest place to the strongest, what is built in
    ("temperature", "-T", [0.1, 0.2, 0.3, 0.4, 0.5], None),
    ("ram", "--ram", ["1G", "2G", "3G", "4G", "5G"], None),
    ("model", "-m", ["a", "b", "c", "d", "e"], "smolmix"),
    ("top-k", "--top-k", [1, 2, 3, 4, 5], None),
    ("stats", "", [False, True, False, True, False], True),
    ("quiet", "", [True, False, True, False, True], False),
    ("stop", "--stop", [["a b"], ["c", "d"], ["e f"], ["g"], ["h"]], ()),
]


@pytest.mark.parametrize("strongest", range(6))
@pytest.mark.parametrize(("name", "flag", "values", "built_in"), LEVELS, ids=[level[0] for level in LEVELS])
def test_the_stronger_place_wins(
    run, write, seen: Seen, monkeypatch: pytest.MonkeyPatch, name: str, flag: str, values: list[Any], built_in: Any,
    strongest: int,
) -> None:  # fmt: skip
    """Each place is filled up to the strongest; what comes out is the strongest one's."""
    top, table, general, specific, typed = values
    lines = [f"{name} = {config_file.literal(top)}"] * (strongest >= 1)
    lines += ["[prompt]", f"{name.replace('-', '_')} = {config_file.literal(table)}"] * (strongest >= 2)
    write("\n".join(lines))
    variable = name.upper().replace("-", "_")
    places = ((3, f"MIXLOCAL_{variable}", general), (4, f"MIXLOCAL_PROMPT_{variable}", specific))
    for level, place, value in places:
        if strongest >= level:
            monkeypatch.setenv(place, "\n".join(value) if isinstance(value, list) else str(value))
    before, after = [], []
    if strongest == 5:
        flags = {"stats": ["--no-stats"], "quiet": ["-q"]}.get(name, [flag, *([typed] if flag else [])])
        flags = [str(part[0] if isinstance(part, list) else part) for part in flags]
        before, after = (flags, []) if name == "quiet" else ([], flags)
    assert run(*before, "prompt", *after, "hello").code == 0
    expected = [built_in, *values][strongest]
    assert seen[name.replace("-", "_")] == (tuple(expected) if isinstance(expected, list) else expected)


def test_an_empty_variable_is_not_set(run, write, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    write("temperature = 0.3")
    for name in ("MIXLOCAL_TEMPERATURE", "MIXLOCAL_PROMPT_TEMPERATURE", "MIXLOCAL_CONFIG"):
        monkeypatch.setenv(name, "")
    assert run("prompt", "hello").code == 0
    assert seen["temperature"] == 0.3


def test_python_names_are_no_variables(run, own: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MIXLOCAL_CONTEXT", "MIXLOCAL_PROMPT_CONTEXT", "MIXLOCAL_AS_JSON"):
        monkeypatch.setenv(name, "77")
    assert run("prompt", "hello").code == 0
    assert seen["context"] is None
    monkeypatch.setenv("MIXLOCAL_CTX", "78")
    assert run("prompt", "hello").code == 0
    assert seen["context"] == 78


def test_a_model_answers_with_what_the_file_says(run, write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only parsed: used, by the model that the file names too."""
    write('model = "tiny:bf16"\nseed = 7\nmax-tokens = 3\ntemperature = 0.25\n[prompt]\njson = true\nquiet = true')
    monkeypatch.setenv("MIXLOCAL_SEED", "8")
    result = run("prompt", "--raw", "hello")
    assert result.code == 0, result.err
    answer = json.loads(result.out)
    assert (answer["model"], answer["variant"], answer["completion_tokens"]) == ("tiny", "bf16", 3)
    assert (answer["params"]["temperature"], answer["seed"]) == (0.25, 8)
    assert result.err == ""


def test_a_model_argument_that_may_be_left_out_is_the_configured_one(run, write) -> None:
    write('model = "tiny"')
    assert "tiny" in run("show").out.splitlines()[0]
    assert "Missing argument" in run("verify").err, "what must be named is named"


# --- every flag of every command


def leaves() -> list[tuple[tuple[str, ...], click.Command]]:
    def below(path: tuple[str, ...], command: click.Command) -> list[tuple[tuple[str, ...], click.Command]]:
        if not isinstance(command, click.Group):
            return [(path, command)]
        return [leaf for name, sub in command.commands.items() for leaf in below((*path, name), sub)]

    return [leaf for name, command in commands(cli) for leaf in below((name,), command)]


LEAVES = leaves()


def a_value(parameter: click.Parameter, folder: Path) -> Any:
    """One that is not the default."""
    wanted = kind(parameter)
    if wanted == "true or false":
        return parameter.default is not True
    if isinstance(parameter.type, click.Choice):
        return str(parameter.type.choices[-1])
    if isinstance(parameter.type, click.Path | click.File):
        (folder / "file").write_text("x")
        return str(
            folder if isinstance(parameter.type, click.Path) and not parameter.type.file_okay else folder / "file"
        )
    return {"a whole number": 3, "a number": 2.5}.get(wanted, "3")


def required(command: click.Command, without: list[click.Parameter], folder: Path) -> list[str]:
    """Arguments, and flags, that cannot be left out."""
    words: list[str] = []
    for parameter in command.params:
        if parameter.required and parameter not in without:
            flag = [] if isinstance(parameter, click.Argument) else [parameter.opts[0]]
            words += [*flag, str(a_value(parameter, folder))]
    return words


@pytest.mark.parametrize(("path", "command"), LEAVES, ids=[" ".join(path) for path, _ in LEAVES])
def test_every_flag_is_settable_everywhere(
    run, own: Path, write, monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...], command: click.Command
) -> None:
    """At the top of the file, in the command's table, by the general variable and by the command's own."""
    contexts: list[click.Context] = []
    monkeypatch.setattr(command, "callback", lambda *_, **__: contexts.append(click.get_current_context()))
    found = [*own_settings(command, path), *own_settings(cli, path[:1])]
    values = [(setting, a_value(setting.parameter, own)) for setting in found if setting.name not in SAYS_WHERE]
    for number, place in enumerate((at_the_top, in_tables, by_variables, by_own_variables)):
        text, variables = place(values)
        write(text)
        with monkeypatch.context() as patched:
            for name, content in variables.items():
                patched.setenv(name, content)
            result = run(*path, *required(command, [setting.parameter for setting, _ in values], own))
        assert result.code == 0, (text, variables, result.err)
        ctx = contexts.pop()
        for setting, value in values:
            check_taken(ctx, setting, value, number > 1)


Values = list[tuple[Setting, Any]]
Places = tuple[str, dict[str, str]]  # text of the file, variables


def at_the_top(values: Values) -> Places:
    lines = {setting.name: f"{setting.name} = {config_file.literal(value)}" for setting, value in values}
    return "\n".join(lines.values()), {}


def in_tables(values: Values) -> Places:
    """Keys as Python would write them; where a command has a flag of its own that stands before it too, that one's."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for setting, value in values:
        name = setting.name.replace("-", "_")
        lines.setdefault(setting.path, {})[name] = f"{name} = {config_file.literal(value)}"
    return "\n".join(f"[{'.'.join(path)}]\n" + "\n".join(table.values()) for path, table in lines.items()), {}


def by_variables(values: Values) -> Places:
    return "", {f"MIXLOCAL_{setting.name.upper().replace('-', '_')}": str(value) for setting, value in values}


def by_own_variables(values: Values) -> Places:
    names = ["_".join((*setting.path, setting.name)).upper().replace("-", "_") for setting, _ in values]
    return "", {f"MIXLOCAL_{name}": str(value) for name, (_, value) in zip(names, values, strict=True)}


def check_taken(ctx: click.Context, setting: Setting, value: Any, from_variable: bool) -> None:
    owner = ctx if setting.parameter in ctx.command.params else ctx.find_root()
    name = setting.parameter.name
    source = click.core.ParameterSource.ENVIRONMENT if from_variable else click.core.ParameterSource.DEFAULT_MAP
    assert owner.get_parameter_source(name) is source, setting
    if setting.parameter.expose_value and setting.parameter.callback is None:
        taken = owner.params[name]
        assert (taken[0] if isinstance(taken, tuple) else taken) in (value, Path(str(value))), setting


def test_no_flag_is_forgotten() -> None:
    """Every long flag is settable or a one-off act with a reason."""
    for command, path in [(cli, ()), *((command, (name,)) for name, command in commands(cli))]:
        settable = {name for setting in all_settings(command, path) for name in setting.names}
        flags = {
            option[2:] for parameter in command.params if isinstance(parameter, click.Option)
            for option in parameter.opts if option.startswith("--")
        }  # fmt: skip
        assert flags <= settable | set(ONE_OFF), path
        assert not settable & set(ONE_OFF), path


def test_a_variable_sets_one_flag_and_a_command_is_no_flag() -> None:
    """MIXLOCAL_SHOW_X of `show --x` must not be that of some `--show-x`."""
    meanings: dict[str, set[str]] = {}
    for setting in every_setting(cli):
        for variable in setting.variables:
            tail = next(name for name in setting.names if variable.endswith(name.upper().replace("-", "_")))
            meanings.setdefault(variable, set()).add(tail)
    assert {name: found for name, found in meanings.items() if len(found) > 1} == {}
    for parameter in cli.params:
        assert parameter.name not in COMMANDS, "click would take the command's defaults for this flag's"


def test_what_knows_sampling_by_heart_knows_all_of_it() -> None:
    assert sorted(SAMPLING) == sorted(field.name for field in fields(SamplingParams))
