"""Every long flag as a setting: its MIXLOCAL_* variables, its keys in config.toml and the values it takes there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import click

from mixlocal.app.config import Key

PREFIX = "MIXLOCAL"
# One-off acts: only the command line can ask for them.
ONE_OFF = {
    "yes": "it answers one question, and the next one is another",
    "force": "it overrules one refusal",
    "fresh": "it throws away what one command has done so far",
    "dry-run": "it keeps one command from doing its work",
    "print-sky-task": "it is a question",
    "prompt": "it is one text, and a command of this name has settings",
    "compare": "it names the models of one run",
    "quality": "it is asked for with --compare, and a command of this name has settings",
    "help": "it is a question",
    "version": "it is a question",
}
SAYS_WHERE = ("home", "config")  # where the file lies, it cannot say; the environment can
# The program's variables that are no flags.
OTHER_VARIABLES = ("MIXLOCAL_ISA", "MIXLOCAL_PYTHON", "MIXLOCAL_TORCH_INDEX", "MIXLOCAL_VENV")


class _Lines(click.types.StringParamType):
    """Texts that a variable holds one a line: click would part them at every space."""

    envvar_list_splitter = "\n"


LINES = _Lines()


@dataclass(frozen=True, slots=True)
class Setting:
    """One flag of one command. names: long ones without their dashes; the first is the one we write."""

    path: Key
    names: tuple[str, ...]
    parameter: click.Parameter

    @property
    def name(self) -> str:
        return self.names[0]

    def for_all(self) -> Setting:
        """As if no command were meant."""
        return replace(self, path=())

    @property
    def variables(self) -> list[str]:
        """Most specific first: MIXLOCAL_PROMPT_MAX_TOKENS, MIXLOCAL_MAX_TOKENS."""
        return ["_".join((PREFIX, *key)).upper().replace("-", "_") for key in self._keys(self.name in SAYS_WHERE)]

    @property
    def keys(self) -> list[Key]:
        """Most specific first: prompt.max-tokens, max-tokens."""
        return [] if self.name in SAYS_WHERE else self._keys(general=False)

    def _keys(self, general: bool) -> list[Key]:
        depths = (0,) if general else range(len(self.path), -1, -1)
        return [(*self.path[:depth], name) for depth in depths for name in self.names]


def own_settings(command: click.Command, path: Key) -> list[Setting]:
    """Of `command` alone, not of its subcommands."""
    found = (Setting(path, _names(parameter), parameter) for parameter in command.params)
    return [setting for setting in found if setting.names and setting.name not in ONE_OFF]


def all_settings(command: click.Command, path: Key) -> list[Setting]:
    """Of `command` and its subcommands."""
    below = (all_settings(sub, (*path, name)) for name, sub in subcommands(command))
    return [*own_settings(command, path), *(setting for settings in below for setting in settings)]


def subcommands(command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        yield from command.commands.items()


def known_names(settings: Iterable[Setting]) -> set[str]:
    """What may be a key of the file."""
    return {name for setting in settings if setting.keys for name in setting.names}


def _names(parameter: click.Parameter) -> tuple[str, ...]:
    """None at all of what cannot be set: short flags, arguments. A MODEL that may be left out is as `--model`."""
    if isinstance(parameter, click.Argument):
        return ("model",) if parameter.name == "model" and not parameter.required else ()
    return tuple(option[2:] for option in parameter.opts if option.startswith("--"))


def kind(parameter: click.Parameter) -> str:
    """What a value of it must be in the file."""
    if isinstance(parameter, click.Option) and parameter.count:
        return "a whole number"
    if isinstance(parameter.type, click.types.BoolParamType):
        return "true or false"
    if isinstance(parameter.type, click.types.IntParamType):
        return "a whole number"
    if isinstance(parameter.type, click.types.FloatParamType):
        return "a number"
    if isinstance(parameter.type, click.Choice):
        return f"one of {', '.join(map(str, parameter.type.choices))}"
    return "a text"


def is_list(parameter: click.Parameter) -> bool:
    return parameter.nargs != 1 or bool(getattr(parameter, "multiple", False))


def from_toml(parameter: click.Parameter, value: Any) -> Any:
    """`value` for click, which would take true for 1 and 1.5 for 1. Raises `ValueError` saying what it must be."""
    wanted = kind(parameter)
    if is_list(parameter):
        values = value if isinstance(value, list) else [value]
        return [_checked(wanted, item, f"{wanted}, or several in brackets") for item in values]
    return _checked(wanted, value, wanted)


def _checked(wanted: str, value: Any, says: str) -> Any:
    if wanted == "true or false":
        right = isinstance(value, bool)
    elif isinstance(value, bool):
        right = False
    elif wanted == "a whole number":
        right = isinstance(value, int)
    elif wanted == "a number":
        right = isinstance(value, int | float)
    else:  # a number too: --threads is one here and a list of them there
        right = isinstance(value, int | float) or (isinstance(value, str) and "\0" not in value)
    if not right:
        raise ValueError(says)
    return str(value) if isinstance(value, int | float) and wanted not in _NUMBERS else value


_NUMBERS = ("true or false", "a whole number", "a number")
