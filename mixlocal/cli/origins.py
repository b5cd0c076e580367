"""Where values come from: flags > MIXLOCAL_* > config.toml > the model's entry > what is built in.

click resolves them; here it is told the variables and what the file says.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
from click.core import ParameterSource

from mixlocal.app.config import ConfigFile, Key, dotted, read_config
from mixlocal.cli.config_check import check_table, check_top, taken
from mixlocal.cli.flags import LINES, Setting, is_list, own_settings, subcommands
from mixlocal.cli.render import safe_text
from mixlocal.errors import MixlocalError, RefusedError

SOURCES, INNERMOST = "mixlocal.sources", "mixlocal.context"  # keys of a context's meta


class TrackedContext(click.Context):
    """Can be found when its command has failed, to ask it where a value came from."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.meta[INNERMOST] = self


Lenient = Literal["no", "warns", "silent"]  # what an error in the file does


@dataclass(frozen=True, slots=True)
class Origin:
    """specific: said of one command alone."""

    kind: Literal["flag", "environment", "file", "model entry", "built-in"]
    text: str
    specific: bool = False


BUILT_IN = Origin("built-in", "built-in")


@dataclass(frozen=True, slots=True)
class Sources:
    """What the file says in this run. arguments: the command that is run, and all behind it."""

    file: ConfigFile
    group: click.Group
    arguments: tuple[str, ...]
    lenient: Lenient

    @property
    def command(self) -> str:
        return self.arguments[0]

    def globals(self) -> dict[str, Any]:
        """The default_map of what stands before the command. Raises `RefusedError` naming file and key."""
        settings = own_settings(self.group, (self.command,))
        for setting in settings:
            setting.parameter.envvar = setting.variables
        try:
            check_top(self.file, self.group, self.command)
            return self._values(settings)
        except RefusedError as error:
            return tolerate(error, self.lenient)

    def defaults(self, command: click.Command, name: str) -> dict[str, Any]:
        """The default_map of `command`. Raises `RefusedError` naming file and key."""
        try:
            check_table(self.file, self.group, command, name)
            return self._defaults(command, (name,))
        except RefusedError as error:
            return tolerate(error, self.lenient)

    def _defaults(self, command: click.Command, path: Key) -> dict[str, Any]:
        below = {name: self._defaults(sub, (*path, name)) for name, sub in subcommands(command)}
        if set(below) & set(self.arguments[1:]):  # what is set once is meant for the subcommand, which has it too
            for setting in own_settings(command, path):
                setting.parameter.envvar = None
            return below
        return below | self._values(own_settings(command, path))

    def _values(self, settings: list[Setting]) -> dict[str, Any]:
        return {
            setting.parameter.name: taken(self.file, setting, *found)
            for setting in settings
            if setting.parameter.name and (found := self.file.first(setting.keys))
        }


def begin(ctx: click.Context, typed: dict[str, Any], rest: list[str]) -> None:
    """Read the file before any option before the command looks into it."""
    group = ctx.command
    assert isinstance(group, click.Group)
    lenient = _lenient(ctx, rest)
    named = typed.get("config_file") or os.environ.get("MIXLOCAL_CONFIG")
    file = ConfigFile(Path(), {})
    try:
        file = read_config(config_path(typed.get("home"), named), required=bool(named))
    except MixlocalError as error:
        tolerate(error, lenient)
    sources = ctx.meta[SOURCES] = Sources(file, group, tuple(rest), lenient)
    ctx.default_map = sources.globals()


def _lenient(ctx: click.Context, rest: list[str]) -> Lenient:
    """Completion has nobody to tell, `config` is there to mend the file, and help helps with that."""
    if ctx.resilient_parsing or rest[0] == "config":
        return "silent"
    return "warns" if {"-h", "--help"} & set(rest) else "no"


def tolerate(error: MixlocalError, lenient: Lenient) -> dict[str, Any]:
    """No defaults at all, or the error."""
    if lenient == "no":
        raise error
    if lenient == "warns":
        print(safe_text(f"warning: {error.message}"), file=sys.stderr)
    return {}


def config_path(home: str | None, config: str | None) -> Path:
    from mixlocal.store.paths import home as find_home

    return Path(config).expanduser() if config else find_home(Path(home) if home else None).config_file


def attach(command: click.Command, path: Key) -> None:
    """Give `command`'s flags their variables and its context a memory."""
    command.context_class = TrackedContext
    for setting in own_settings(command, path):
        setting.parameter.envvar = setting.variables
        if is_list(setting.parameter) and setting.parameter.type is click.STRING:
            setting.parameter.type = LINES
    for name, sub in subcommands(command):
        attach(sub, (*path, name))


def attach_completion(command: click.Command, path: Key) -> None:
    """Let models and saved chats be completed; only when a shell asks."""
    from mixlocal.cli.completion import ModelName, SessionName

    for parameter in command.params:
        is_chat = path[0] == "sessions" and parameter.name in ("name", "names", "old")
        if parameter.type is click.STRING and parameter.name == "model":
            parameter.type = ModelName()
        elif parameter.type is click.STRING and (parameter.name == "session" or is_chat):
            parameter.type = SessionName()
    for name, sub in subcommands(command):
        attach_completion(sub, (*path, name))


def add_defaults(ctx: click.Context, command: click.Command, name: str) -> None:
    sources = ctx.meta.get(SOURCES)
    if sources is not None and ctx.default_map is not None:
        ctx.default_map[name] = sources.defaults(command, name)


def from_environment(setting: Setting) -> str | None:
    """The variable that sets it; an empty one does not."""
    return next((name for name in setting.variables if os.environ.get(name)), None)


def origin_of(ctx: click.Context, setting: Setting) -> Origin:
    """Where the value of a flag of this run came from."""
    source = ctx.get_parameter_source(setting.parameter.name or "")
    if source is ParameterSource.COMMANDLINE:
        return Origin("flag", f"--{setting.name}")
    if source is ParameterSource.ENVIRONMENT and (variable := from_environment(setting)):
        return Origin("environment", variable)
    if source is ParameterSource.DEFAULT_MAP and (found := _file_of(ctx).first(setting.keys)):
        return Origin("file", f"{_file_of(ctx).path}: {dotted(found[0])}")
    return BUILT_IN


def path_of(ctx: click.Context) -> Key:
    """The command's names; of what stands before the command, that command's."""
    names: list[str] = []
    while ctx.parent is not None:
        names.insert(0, ctx.info_name or "")
        ctx = ctx.parent
    sources = ctx.meta.get(SOURCES)
    return tuple(names) or ((sources.command,) if sources else ())


def _file_of(ctx: click.Context) -> ConfigFile:
    sources = ctx.meta.get(SOURCES)
    return sources.file if sources else ConfigFile(Path(), {})
