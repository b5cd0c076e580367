"""mixlocal sessions: the saved chats."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mixlocal.cli.options import Globals, json_option, pass_globals
from mixlocal.cli.render import print_json, print_table, safe_text, say
from mixlocal.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from mixlocal.store.session_db import SavedSession, SessionDb

Command = TypeVar("Command", bound=Callable[..., Any])
BEGIN = "begin one with: mixlocal chat"
OLD_DAYS = 30  # from then on a date says more than an age


def _list_options(command: Command) -> Command:
    search = click.option("--search", default="", metavar="WORDS", help="Those in which all of these words occur.")
    limit = click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The newest N; all by default.")
    return search(limit(json_option(command)))


@click.group(invoke_without_command=True)
@_list_options
@click.pass_context
def sessions(ctx: click.Context, search: str, limit: int | None) -> None:
    """List, show, export, rename and remove the saved chats. Go on with one by: mixlocal chat --session NAME

    Without a command: list. NAME may be the beginning of a name.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_sessions, search=search, limit=limit)
    elif search or limit:
        raise UsageError("--search and --limit are for listing", "put them behind: mixlocal sessions list")


@sessions.command("list")
@_list_options
@pass_globals
def list_sessions(options: Globals, search: str, limit: int | None) -> None:
    """List the chats, newest first."""
    from mixlocal.app.export import head_fields

    found: list[SavedSession] = []
    if options.folders().sessions_db.exists():  # to look is no reason to create it
        with _open(options) as db:
            found = db.list(limit, search)
    if options.as_json:
        print_json([head_fields(head) for head in found])
    elif found:
        print_sessions(options, found)
    else:
        say(options, f"no chat has all of these words: {search}" if search else f"no chats yet; {BEGIN}")


@sessions.command()
@click.argument("name")
@json_option
@pass_globals
def show(options: Globals, name: str) -> None:
    """Print the chat NAME."""
    from mixlocal.app.export import as_json, speaker

    with _open(options) as db:
        head = db.find(name)
        turns = db.turns(head.id)
    if options.as_json:
        print(as_json(head, turns), end="")
        return
    parts = [f"{head.name} ({head.model}:{head.variant}, {age(head.updated)})"]
    parts += [f"[System]\n{head.system}"] if head.system else []
    for turn in turns:
        end = " (interrupted)" if turn.interrupted else ""
        parts.append(f"[{speaker(turn, head)}]\n{turn.content}{end}")
    print(safe_text("\n\n".join(parts)))


@sessions.command()
@click.argument("name")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write there instead of on stdout.")
@click.option("--format", "form", type=click.Choice(["md", "json"]), help="By FILE's ending; md on stdout.")
@click.option("--ids", is_flag=True, help="With json: the tokens of the answers too.")
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@json_option
@pass_globals
def export(options: Globals, name: str, out: Path | None, form: str | None, ids: bool, force: bool) -> None:
    """Write the chat NAME as Markdown or JSON."""
    from mixlocal.app.export import as_json, as_markdown

    wants_json = form == "json" if form else options.as_json or (out is not None and out.suffix == ".json")
    with _open(options) as db:
        head = db.find(name)
        turns = db.turns(head.id)
    text = as_json(head, turns, ids=ids) if wants_json else as_markdown(head, turns)
    if out is None:
        sys.stdout.write(safe_text(text) if sys.stdout.isatty() else text)
    else:
        _write(out, text, force)
        say(options, f"wrote {out}")


@sessions.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@pass_globals
def rm(options: Globals, names: tuple[str, ...], yes: bool) -> None:
    """Remove the chats NAME... and what was kept to resume them."""
    from mixlocal.store.kv_file import remove_kv_file

    with _open(options) as db:
        heads = {head.id: head for head in map(db.find, names)}.values()
        listed = ", ".join(head.name for head in heads)
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError(f"removing {listed} needs --yes when nobody can be asked")
            click.confirm(safe_text(f"Remove {listed}?"), abort=True, err=True)
        for head in heads:
            remove_kv_file(options.folders().kv_snapshots, head.id)
            db.remove(head.id)
    say(options, f"removed {listed}")


@sessions.command()
@click.argument("old")
@click.argument("new")
@pass_globals
def rename(options: Globals, old: str, new: str) -> None:
    """Call the chat OLD by the name NEW."""
    with _open(options) as db:
        head = db.find(old)
        db.describe(head.id, name=new)
        say(options, f"{head.name} is called {db.get(head.id).name} now")


def print_sessions(options: Globals, heads: Sequence[SavedSession]) -> None:
    """A table of chats on stdout; of their first words as much as fits the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("NAME", "MODEL", "TURNS", "LAST"):
        table.add_column(heading, justify="right" if heading == "TURNS" else "left", no_wrap=True)
    table.add_column("FIRST WORDS")  # the only one that gives way
    for head in heads:
        cells = (head.name, f"{head.model}:{head.variant}", str(head.turns), age(head.updated))
        first = Text(safe_text(head.first), no_wrap=True, overflow="ellipsis")
        table.add_row(*(Text(safe_text(cell)) for cell in cells), first)
    print_table(options, table)


def age(then: float) -> str:
    """ "just now", "5 min ago", "3 h ago", "2 days ago", or the date."""
    minutes = int(time.time() - then) // 60
    if minutes < 1:
        return "just now"
    if minutes < 60:
        return f"{minutes} min ago"
    if minutes < 24 * 60:
        return f"{minutes // 60} h ago"
    days = minutes // (24 * 60)
    if days <= OLD_DAYS:
        return f"{days} day{'s' if days > 1 else ''} ago"
    return time.strftime("%Y-%m-%d", time.localtime(then))


def _open(options: Globals) -> SessionDb:
    from mixlocal.store.session_db import SessionDb

    path = options.folders().sessions_db
    if not path.exists() and not path.is_symlink():
        raise NotFoundError("there are no chats yet", BEGIN)
    return SessionDb(path)


def _write(path: Path, text: str, force: bool) -> None:
    from mixlocal.store.durable import write_file

    if path.is_dir():
        raise UsageError(f"{path} is a folder", "name a file in it")
    if path.exists() and not force:
        raise UsageError(f"{path} is there already", "--force replaces it")
    write_file(path, text.encode())
