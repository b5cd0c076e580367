"""KEY and VALUE of `mixlocal config set`, and the file that `mixlocal config edit` begins with."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from typing import Any

import click

from mixlocal.app.config import Key, dotted, literal, nearest, normal, shown
from mixlocal.cli.config_rows import complaint, default_of
from mixlocal.cli.flags import ONE_OFF, SAYS_WHERE, Setting, from_toml, is_list, kind, known_names
from mixlocal.errors import UsageError

_HEAD = """\
# mixlocal: what is set once for all runs. A key is a long flag, and holds for every command that has it. What stands in
# the table of a command, such as [prompt], holds for that command, and wins. Flags and MIXLOCAL_* win over both.
# `mixlocal config show` tells what is in force.
"""


def parse_key(text: str, settings: Iterable[Setting]) -> Key:
    """ "prompt.max_tokens" -> ("prompt", "max-tokens"). Raises `UsageError` for what no command has."""
    key = tuple(normal(name) for name in text.split("."))
    keys = {key for setting in settings for key in setting.keys}
    if key in keys:
        return key
    if key[-1] in ONE_OFF:
        raise UsageError(f"{text} cannot be set: {ONE_OFF[key[-1]]}", f"give --{key[-1]} on the command line")
    if key[-1] in SAYS_WHERE:
        raise UsageError(f"{text} cannot be set in the file: it says where the file lies", "set it in the environment")
    raise UsageError(f"{text}: no such key", nearest(dotted(key), sorted(map(dotted, keys))))


def parse_value(key: Key, text: str, settings: Iterable[Setting]) -> Any:
    """What TOML is to hold. Raises `UsageError` unless every command that would read it takes it."""
    holders = [setting for setting in settings if key in setting.keys]
    # a number where one of them wants a number: the others take it for a text
    holders.sort(key=lambda setting: kind(setting.parameter) == "a text")
    try:
        text.encode()
        value = _from_text(holders[0].parameter, text)
        for setting in holders:
            if why := complaint(setting, from_toml(setting.parameter, value)):
                raise UsageError(f"{dotted(key)} = {shown(value)}: {why}", _where(setting))
    except UnicodeEncodeError as error:
        raise UsageError(f"{dotted(key)}: not UTF-8") from error
    except ValueError as error:
        raise UsageError(f"{dotted(key)} = {text!r}: must be {error}") from None
    return value


def _where(setting: Setting) -> str:
    return f"so says: mixlocal {' '.join(setting.path)}" if setting.path else ""


def _from_text(parameter: click.Parameter, text: str) -> Any:
    """Raises `ValueError` saying what it must be."""
    wanted = kind(parameter)
    if is_list(parameter):
        if not text.lstrip().startswith("["):
            return [text]
        try:
            return tomllib.loads(f"x = {text}")["x"]
        except ValueError:
            raise ValueError(f"{wanted}, or several in brackets") from None
    types: dict[str, Any] = {"true or false": click.BOOL, "a whole number": click.INT, "a number": click.FLOAT}
    try:
        return types[wanted].convert(text, None, None) if wanted in types else text
    except click.BadParameter:
        raise ValueError(wanted) from None


def template(settings: Iterable[Setting]) -> str:
    """Every key with what it does and its default, all behind #; the ones that many commands have first."""
    members: dict[str, list[Setting]] = {}
    for setting in settings:
        if known_names([setting]):
            members.setdefault(setting.name, []).append(setting)
    lines = [_HEAD]
    for name in sorted(members, key=lambda name: (-len(members[name]), name)):
        parameter = members[name][0].parameter
        places = sorted({" ".join(setting.path) for setting in members[name]} - {""})
        only = f" ({places[0]})" if len(places) == 1 else ""
        help_text = parameter.help if isinstance(parameter, click.Option) and parameter.help else ""
        lines.append(f"\n# {' '.join(help_text.split())}{only}\n# {name} = {_example(parameter)}\n")
    return "".join(lines)


def _example(parameter: click.Parameter) -> str:
    value = default_of(parameter)
    if value not in (None, ()):
        return literal(value)
    wanted = kind(parameter)
    name = parameter.metavar or ("N" if "number" in wanted else "TEXT")
    return "NUMBER" if "number" in wanted else "true" if wanted == "true or false" else literal(name)
