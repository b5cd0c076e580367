"""mixlocal chat"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mixlocal.cli.chat.repl import Repl
from mixlocal.cli.loading import close_session, interrupts_end_it, open_session
from mixlocal.cli.options import Globals, pass_globals, run_options, runtime_options, sampling_options
from mixlocal.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from mixlocal.cli.chat.start import Start
    from mixlocal.store.session_db import SavedSession, SessionDb


@click.command()
@click.option("-m", "--model", default="smolmix", show_default=True, help="Name, name:variant or folder.")
@click.option("--session", metavar="NAME", help="Go on with the chat of this name, or begin it.")
@click.option("-c", "--continue", "latest", is_flag=True, help="Go on with the last chat.")
@click.option("--new", is_flag=True, help="Begin a new chat; with --session, under that name.")
@click.option("-s", "--system", metavar="TEXT", help="System text.")
@click.option("--system-file", metavar="FILE", help="A file with the system text.")
@click.option("-f", "--file", "files", multiple=True, metavar="FILE", help="Send this file with the first message.")
@click.option(
    "--on-overflow", type=click.Choice(["error", "drop-oldest"]), default="drop-oldest", show_default=True,
    help="What to do when the context is full.",
)  # fmt: skip
@click.option("--history/--no-history", default=True, help="Keep what is typed on disk, for the Up key and Ctrl-R.")
@click.option("--markdown/--no-markdown", default=True, help="On a terminal, render answers; or show them as written.")
@click.option("--stats/--no-stats", default=True, help="Speed and seed after each answer.")
@runtime_options
@sampling_options
@pass_globals
@click.pass_context
def chat(ctx: click.Context, options: Globals, /, **given: Any) -> None:
    """Talk with a model. Every turn is saved; /help lists what can be done."""
    named = ctx.get_parameter_source("model") in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    run_chat(options, given, model_is_named=named)


def run_chat(options: Globals, given: dict[str, Any], *, model_is_named: bool) -> None:
    """model_is_named: the user wants this model, whatever a saved chat was held with."""
    from mixlocal.store.session_db import SessionDb

    signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    with SessionDb(options.folders().sessions_db) as db:
        with interrupts_end_it():
            start, head = _start(options, given), _wanted(db, given)
            if head is not None and not model_is_named:
                start = _with_its_model(start, head)
            session = open_session(options, start.model, start.run, start.folders)
        _talk(Repl(options, start, session, db), head, given)


def _talk(repl: Repl, head: SavedSession | None, given: dict[str, Any]) -> None:
    """To its end; then the KV cache is kept for the next time. Raises KeyboardInterrupt if Ctrl-C was the end."""
    interrupted = False
    try:
        _begin(repl, head, given)
        try:
            repl.run()
        except KeyboardInterrupt:
            interrupted = True
        repl.leave_session()
    finally:
        close_session(repl.options, repl.chat.session)
    if interrupted:
        raise KeyboardInterrupt


def _start(options: Globals, given: dict[str, Any]) -> Start:
    from mixlocal.cli.chat.start import Start
    from mixlocal.cli.prompt_input import attach, read_system
    from mixlocal.engine.params import SamplingParams

    if given["latest"] and (given["session"] or given["new"]):
        raise UsageError("--continue goes on with the last chat: --session and --new say otherwise")
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "stop")
    system = read_system(given)
    start = Start(
        options.folders(), given["model"], run_options(given), system, {name: given[name] for name in names},
        given["on_overflow"], tuple(map(attach, given["files"])), given["stats"], given["markdown"], given["history"],
    )  # fmt: skip
    start.params(SamplingParams())  # a value out of range is not worth waiting for a model
    return start


def _wanted(db: SessionDb, given: dict[str, Any]) -> SavedSession | None:
    """The saved chat to go on with. Raises `UsageError` for a name that cannot be, before a model is loaded."""
    from mixlocal.app.saved_chat import free_name
    from mixlocal.store.session_names import check_chat_name

    if given["latest"]:
        latest = db.latest()
        if latest is None:
            raise UsageError("there is no chat to go on with yet", "begin one: mixlocal chat")
        return latest
    if not given["session"]:
        return None
    if given["new"]:
        free_name(db, given["session"])
        return None
    name = check_chat_name(given["session"])
    return next((saved for saved in db.list() if saved.name == name), None)


def _with_its_model(start: Start, head: SavedSession) -> Start:
    """Raises `NotFoundError` if the model that a chat was held with is not installed."""
    model = f"{head.model}:{head.variant}"
    try:
        start.check(model)
    except NotFoundError as error:
        hint = f"{head.name!r} was held with it; go on with another model, or its folder: -m MODEL"
        raise NotFoundError(error.message, hint) from error
    return start.with_model(model)


def _begin(repl: Repl, head: SavedSession | None, given: dict[str, Any]) -> None:
    if head is None:
        repl.saved.begin(given["session"])
        repl.greet()
        return
    repl.resume(head)
    if given["system"] or given["system_file"]:
        repl.chat.conversation.system = repl.start.system
    repl.chat.params = repl.start.params(repl.chat.params)
    repl.remember()
