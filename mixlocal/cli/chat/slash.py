"""The commands of a chat: a table, and how a line becomes one of them or a message."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from mixlocal.cli.chat.repl import Repl


class Leave(Exception):  # noqa: N818 - not an error
    """The chat is over."""


@dataclass(frozen=True, slots=True)
class Slash:
    """One command. arguments: as /help shows them. complete: what its argument may be, given what is typed of it.
    waits: it may take long, and can be left at any line by Ctrl-C."""

    name: str
    arguments: str
    help: str
    run: Callable[[Repl, str], None]
    complete: Callable[[Repl, str], Iterable[str]] | None = None
    waits: bool = False


def parse(line: str) -> tuple[str, str] | None:
    """(command, its argument), or None for a message: a slash begins a command, two slashes a message with one."""
    if not line.startswith("/") or line.startswith("//"):
        return None
    name, _, argument = line[1:].partition(" ")
    name, newline, rest = name.partition("\n")
    return name, (rest + argument if newline else argument).strip()


def message(line: str) -> str:
    return line[1:] if line.startswith("//") else line


def find(commands: dict[str, Slash], name: str) -> Slash:
    """By its name or an unambiguous beginning of it. Raises `UsageError` naming what is near."""
    if name in commands:
        return commands[name]
    begun = [command for command in commands.values() if name and command.name.startswith(name)]
    if len(begun) == 1:
        return begun[0]
    near = [command.name for command in begun] or difflib.get_close_matches(name, commands, 2)
    hint = f"did you mean /{' or /'.join(near)}?" if near else "/help lists the commands; //text sends a slash"
    raise UsageError(f"no command /{name}", hint)


def matching(names: Iterable[str], typed: str) -> list[str]:
    """Those that begin with what is typed; of a name with spaces, what is left of its last typed word on."""
    done = len(typed.rpartition(" ")[0]) + (" " in typed)
    return [name[done:] for name in names if name.startswith(typed)]
