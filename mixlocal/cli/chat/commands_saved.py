"""The slash commands about saved chats."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mixlocal.cli.chat.paths import complete_path
from mixlocal.cli.chat.slash import Slash, matching
from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from mixlocal.cli.chat.repl import Repl


def _clear(repl: Repl, argument: str) -> None:
    former = repl.saved.name
    repl.leave_session()
    repl.begin(None, repl.chat.conversation.system)
    repl.tell(f"a clean sheet{f'; the former chat is kept: /load {former}' if former else ''}")


def _new(repl: Repl, argument: str) -> None:
    repl.leave_session()
    repl.chat.params = repl.start.params(repl.chat.session.defaults)
    repl.begin(argument or None, repl.start.system)
    repl.tell(f"a new chat{f' called {argument}' if argument else ''}")


def _save(repl: Repl, argument: str) -> None:
    if not argument:
        raise UsageError("under which name?", "/save NAME; every turn is saved in any case")
    repl.saved.call(argument)
    repl.tell(f"this chat is called {repl.saved.name} now")


def _load(repl: Repl, argument: str) -> None:
    if not argument:
        raise UsageError("which one?", "/load NAME; /sessions lists them")
    head = repl.saved.db.find(argument)
    repl.leave_session()
    repl.resume(head)


def _sessions(repl: Repl, argument: str) -> None:
    from mixlocal.cli.sessions import print_sessions

    print_sessions(repl.options, repl.saved.db.list(limit=20, search=argument))


def _export(repl: Repl, argument: str) -> None:
    from mixlocal.app.export import as_json, as_markdown
    from mixlocal.store.durable import write_file

    if repl.saved.head is None:
        raise UsageError("nothing has been said yet")
    path = Path(argument or f"{repl.saved.name}.md").expanduser()
    if path.exists():
        raise UsageError(f"{path} is there already", "/export another name")
    export = as_json if path.suffix == ".json" else as_markdown
    write_file(path, export(repl.saved.head, repl.chat.turns).encode())
    repl.tell(f"written to {path}")


def _names(repl: Repl, typed: str) -> Iterable[str]:
    return matching([saved.name for saved in repl.saved.db.list()], typed)


def _paths(repl: Repl, typed: str) -> Iterable[str]:
    return complete_path(typed)


SAVED = (
    Slash("clear", "", "begin anew with the same system text and settings", _clear),
    Slash("new", "[NAME]", "begin anew as the command line said", _new),
    Slash("save", "NAME", "give this chat a name", _save),
    Slash("load", "NAME", "go on with another chat", _load, _names),
    Slash("sessions", "[WORDS]", "the saved chats, or those with these words", _sessions, waits=True),
    Slash("export", "[FILE]", "this chat as Markdown, or JSON in a file that ends so", _export, _paths),
)
