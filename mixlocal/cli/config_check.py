"""Whether config.toml holds only keys that some command has, with values that it takes."""

from __future__ import annotations

from typing import Any

import click

from mixlocal.app.config import ConfigFile, Key, nearest, shown
from mixlocal.cli.flags import ONE_OFF, SAYS_WHERE, Setting, all_settings, from_toml, known_names, own_settings
from mixlocal.errors import RefusedError


def check_top(file: ConfigFile, group: click.Group, running: str) -> None:
    """Raises `RefusedError` for a key at the top that no command has, and for the table of none.

    Commands other than `running` are imported only for a key that it does not have itself.
    """
    ctx = click.Context(group)
    names = group.list_commands(ctx)
    for table in file.tables:
        if table[0] not in names:
            raise file.refuse(table, ": there is no such command", nearest(table[0], names))
    seen = own_settings(group, ())
    left = {key[0] for key in file.values if len(key) == 1} - known_names(seen)
    for name in sorted(names, key=lambda name: name != running):
        if not left:
            return
        command = group.get_command(ctx, name)
        assert command is not None
        seen += all_settings(command, (name,))
        left -= known_names(seen)
    if left:
        raise unknown(file, (min(left),), seen)


def check_table(file: ConfigFile, group: click.Group, command: click.Command, name: str) -> None:
    """Raises `RefusedError` for a key of [name] that this command does not have."""
    settings = [*all_settings(command, (name,)), *own_settings(group, (name,))]
    for table in (table for table in file.tables if table[0] == name):
        if not any(setting.path[: len(table)] == table for setting in settings):
            raise file.refuse(table, ": there is no such command")
    for key in (key for key in file.values if len(key) > 1 and key[0] == name):
        here = [setting for setting in settings if key[:-1] == setting.path[: len(key) - 1]]
        if key[-1] not in known_names(here):
            raise unknown(file, key, here)


def unknown(file: ConfigFile, key: Key, settings: list[Setting]) -> RefusedError:
    """What to say of a key that is none of `settings`."""
    name = key[-1]
    if name in ONE_OFF:
        return file.refuse(key, f" cannot be set: {ONE_OFF[name]}", f"give --{name} on the command line")
    if name in SAYS_WHERE:
        return file.refuse(key, " cannot be set here: it says where this file lies", f"set MIXLOCAL_{name.upper()}")
    for setting in settings:
        if f"--{name}" in setting.parameter.secondary_opts:
            return file.refuse(key, ": no such key", f"write {setting.name} = false")
    return file.refuse(key, ": no such key", nearest(name, known_names(settings)))


def taken(file: ConfigFile, setting: Setting, key: Key, value: Any) -> Any:
    """The file's value as click takes it."""
    try:
        return from_toml(setting.parameter, value)
    except ValueError as error:
        raise file.refuse(key, f" = {shown(value)}: must be {error}") from None
