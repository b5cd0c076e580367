"""mixlocal config: what is set once for all runs, and where each value comes from."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click

from mixlocal.app.config import dotted
from mixlocal.cli.config_key import parse_key, parse_value, template
from mixlocal.cli.config_rows import check_file, every_setting
from mixlocal.cli.config_show import show_config
from mixlocal.cli.options import Globals, json_option, pass_globals
from mixlocal.cli.render import safe_text, say
from mixlocal.errors import NotFoundError, UsageError

EDITORS = ("nano", "vim", "vi")  # if neither $VISUAL nor $EDITOR says


@click.group(invoke_without_command=True)
@click.option("-m", "--model", metavar="MODEL", help="As for `show`.")
@json_option
@click.pass_context
def config(ctx: click.Context, /, **_: object) -> None:
    """Show and change what is set once for all runs, in config.toml.

    A flag beats MIXLOCAL_PROMPT_FLAG, that beats MIXLOCAL_FLAG, that beats config.toml (first its table [prompt], then
    its top), that beats the model's own defaults. Without a command: show.
    """
    if ctx.invoked_subcommand is None:
        show_config(ctx.find_object(Globals) or ctx.obj, ctx)


@config.command()
@click.option("-m", "--model", metavar="MODEL", help="With the defaults of this model's entry.")
@json_option
@pass_globals
@click.pass_context
def show(ctx: click.Context, options: Globals, /, **_: object) -> None:
    """Show every setting, its value, and where that comes from."""
    show_config(options, ctx)


@config.command()
@pass_globals
def path(options: Globals) -> None:
    """Print where config.toml lies."""
    print(safe_text(str(options.config_file())))


@config.command()
@pass_globals
def edit(options: Globals) -> None:
    """Open config.toml in $VISUAL or $EDITOR, then check it."""
    from mixlocal.app.config import read_config

    file = options.config_file()
    if not file.exists():
        _create(file)
    command = [*_editor(), str(file)]
    try:
        code = subprocess.call(command)
    except OSError as error:
        raise NotFoundError(f"{command[0]}: {(error.strerror or str(error)).lower()}", "set EDITOR") from error
    if code:
        raise UsageError(f"{command[0]} ended with {code}", f"the file is {file}")
    check_file(read_config(file), _root())


@config.command("set")
@click.argument("key")
@click.argument("value")
@pass_globals
def set_(options: Globals, key: str, value: str) -> None:
    """Set KEY, a long flag, to VALUE for all commands that have it; prompt.KEY: for one."""
    from mixlocal.app.config_edit import with_value

    settings = every_setting(_root())
    wanted = parse_key(key, settings)
    parsed = parse_value(wanted, value, settings)
    _change(options, lambda file, text: with_value(file, text, wanted, parsed))
    say(options, f"{options.config_file()}: {dotted(wanted)} is set")


@config.command()
@click.argument("key")
@pass_globals
def unset(options: Globals, key: str) -> None:
    """Remove KEY from config.toml."""
    from mixlocal.app.config import normal
    from mixlocal.app.config_edit import without

    wanted = tuple(normal(name) for name in key.split("."))  # one that no command has, too
    _change(options, lambda file, text: without(file, text, wanted))
    say(options, f"{options.config_file()}: {dotted(wanted)} is not set any more")


def _change(options: Globals, change: Callable[[Path, str], str]) -> None:
    """Replace the file by its changed text; where a link leads elsewhere, the file there."""
    from mixlocal.app.config import read_text
    from mixlocal.store.durable import make_folder, replacing
    from mixlocal.store.lock import locked

    file = options.config_file().resolve()
    with locked(options.folders().state / "config"):
        text = change(options.config_file(), read_text(file))
        make_folder(file.parent)
        mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o644
        with replacing(file, mode) as new:
            new.write(0, text.encode())


def _create(file: Path) -> None:
    from mixlocal.store.durable import make_folder, write_file

    make_folder(file.parent)
    write_file(file, template(every_setting(_root())).encode())


def _editor() -> list[str]:
    """Raises `UsageError` if there is none."""
    named = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if named:
        return shlex.split(named)
    found = next((name for name in EDITORS if shutil.which(name)), None)
    if found is None or not sys.stdin.isatty():
        raise UsageError("no editor to open", "set EDITOR")
    return [found]


def _root() -> click.Group:
    root = click.get_current_context().find_root().command
    assert isinstance(root, click.Group)
    return root
