"""Every setting with its value and where that comes from, and the file checked whole: both know all commands."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import click

from mixlocal.app.config import ConfigFile, dotted, nearest, shown
from mixlocal.cli.config_check import check_table, check_top, taken
from mixlocal.cli.flags import ONE_OFF, OTHER_VARIABLES, PREFIX, Setting, all_settings, own_settings
from mixlocal.cli.options import Globals
from mixlocal.cli.origins import BUILT_IN, Origin, from_environment
from mixlocal.errors import UsageError

# The fields of SamplingParams, whose module takes a second to import.
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed", "stop", "logprobs",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """name: "temperature", or "prompt.temperature" where that command differs."""

    name: str
    value: Any
    origin: Origin


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """Of the model in force. entry: what its authors recommend; built_in: where they say nothing."""

    name: str
    entry: dict[str, Any]
    built_in: dict[str, Any]


def commands(root: click.Group) -> Iterator[tuple[str, click.Command]]:
    ctx = click.Context(root)
    for name in root.list_commands(ctx):
        command = root.get_command(ctx, name)
        assert command is not None
        yield name, command


def every_setting(root: click.Group) -> list[Setting]:
    """Of all commands, each with the flags that stand before it; `config` itself is not worth setting."""
    found = own_settings(root, ())
    for name, command in commands(root):
        if name != "config":
            found += [*own_settings(root, (name,)), *all_settings(command, (name,))]
    return found


def check_file(file: ConfigFile, root: click.Group) -> None:
    """Raises `RefusedError` for the first key or value that would be refused in any command."""
    check_top(file, root, "")
    for name, command in commands(root):
        check_table(file, root, command, name)
    for setting in every_setting(root):
        for key in (key for key in setting.keys if key in file.values):
            value = taken(file, setting, key, file.values[key])
            if why := complaint(setting, value):
                raise file.refuse(key, f" = {shown(file.values[key])}: {why}")


def complaint(setting: Setting, value: Any) -> str:
    """What a command would say against `value`."""
    ctx = click.Context(click.Command("config"), obj=Globals(None, False, "auto", False, False))
    try:
        _try(setting, setting.parameter.process_value(ctx, value))
    except (click.UsageError, UsageError) as error:
        return error.message
    return ""


def _try(setting: Setting, value: Any) -> None:
    """Raises `UsageError` for what click takes and a command would not."""
    if setting.parameter.metavar == "SIZE":
        from mixlocal.app.sizes import parse_size

        parse_size(f"--{setting.name}", value, 1)
    elif setting.parameter.name in SAMPLING:
        from mixlocal.engine.params import SamplingParams

        SamplingParams(**{setting.parameter.name: value})


def table_of(settings: Iterable[Setting], file: ConfigFile, typed: dict[str, Any], model: ModelDefaults) -> list[Row]:
    """One row for each flag, and more for the commands in which it differs."""
    members: dict[str, list[tuple[Setting, Row]]] = {}
    for setting in settings:
        members.setdefault(setting.name, []).append((setting, _effective(setting, file, model)))
    rows: dict[str, Row] = {}
    for name, found in members.items():
        if name in typed:
            rows[name] = Row(name, typed[name], Origin("flag", f"--{name}"))
            continue
        plain = next((row for setting, row in found if not row.origin.specific), None)
        if plain:
            rows[name] = plain
        for setting, row in found:
            if plain is None or (row.value, row.origin) != (plain.value, plain.origin):
                label = dotted((*setting.path, name))
                rows.setdefault(label, Row(label, row.value, row.origin))
    return [rows[name] for name in sorted(rows)]


def effective_model(settings: Iterable[Setting], file: ConfigFile) -> str | None:
    """What -m is when nobody types it: of the environment or the file, for all commands."""
    general = next(setting for setting in settings if setting.name == "model")
    found = _given(general.for_all(), file)
    return str(found[0]) if found else None


def unknown_variables(settings: Iterable[Setting]) -> list[str]:
    """A line for each MIXLOCAL_* that sets nothing."""
    known = {*OTHER_VARIABLES, *(name for setting in settings for name in setting.variables)}
    lines = []
    for name in sorted(os.environ):
        if name.startswith(f"{PREFIX}_") and os.environ[name] and name not in known:
            flag = name.removeprefix(f"{PREFIX}_").lower().replace("_", "-")
            why = f"cannot be set: {ONE_OFF[flag]}" if flag in ONE_OFF else f"sets nothing; {nearest(name, known)}"
            lines.append(f"{name} {why}")
    return lines


def _effective(setting: Setting, file: ConfigFile, model: ModelDefaults) -> Row:
    found = _given(setting, file)
    if found:
        return Row(setting.name, *found)
    value, name = default_of(setting.parameter), setting.parameter.name
    if value in (None, ()) and name in model.entry:
        return Row(setting.name, model.entry[name], Origin("model entry", f"model entry: {model.name}"))
    if value in (None, ()) and name in model.built_in:
        value = model.built_in[name]
    return Row(setting.name, value, BUILT_IN)


def _given(setting: Setting, file: ConfigFile) -> tuple[Any, Origin] | None:
    """What the environment or the file says. Raises `UsageError` naming a variable whose value is refused."""
    if variable := from_environment(setting):
        setting.parameter.envvar = setting.variables
        value = setting.parameter.value_from_envvar(click.Context(click.Command("config")))
        if why := complaint(setting, value):
            raise UsageError(f"{variable}: {why}")
        return value, Origin("environment", variable, specific=variable not in setting.for_all().variables)
    if found := file.first(setting.keys):
        return found[1], Origin("file", f"{file.path.name}: {dotted(found[0])}", specific=len(found[0]) > 1)
    return None


def default_of(parameter: click.Parameter) -> Any:
    """What is built in, if that is a plain value."""
    if isinstance(parameter.default, str | int | float | tuple | list):
        return parameter.default
    is_off = isinstance(parameter, click.Option) and parameter.is_bool_flag and parameter.default is not None
    return False if is_off else None
