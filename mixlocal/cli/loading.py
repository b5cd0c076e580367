"""Loads the model that a command is to run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from mixlocal.cli.options import Globals, settle
from mixlocal.cli.render import print_error, safe_text, show_progress, warn
from mixlocal.errors import MixlocalError, NotFoundError

if TYPE_CHECKING:
    from mixlocal.app.budgets import RunOptions
    from mixlocal.app.session import Session
    from mixlocal.store.paths import Home


WIPED = "\r\x1b[K"  # the line that the cursor is in


@contextmanager
def interrupts_end_it() -> Iterator[None]:
    """Ctrl-C in the block ends the program at once. While libraries are imported, the exception it would raise may be
    raised where it is dropped, as in a destructor; and there is nothing to save yet."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    former = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


@contextmanager
def _told(options: Globals, what: str) -> Iterator[None]:
    """A line on a terminal for as long as the block takes."""
    if options.quiet or not _wipes():
        yield
        return
    print(safe_text(what), end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(WIPED, end="", file=sys.stderr, flush=True)


def _wipes() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _end(number: int, frame: FrameType | None) -> NoReturn:
    if _wipes():
        print(WIPED, end="", file=sys.stderr)
    print_error("interrupted", "", as_json=False)
    os._exit(130)


def open_session(options: Globals, model: str, run: RunOptions, folders: Home) -> Session:
    """Load a model, and tell what its user should hear; smolmix is fetched and built at its first use."""
    install_default(options, model, folders)
    with _told(options, f"loading {model}"):
        from mixlocal.app.session import Session

        session = Session.load(model, run, folders)
        settle()
    for warning in session.warnings:
        warn(options, warning)
    return session


def close_session(options: Globals, session: Session) -> None:
    """What cannot be kept for the next start costs it some speed and this run nothing."""
    try:
        session.close()
    except MixlocalError as error:
        warn(options, f"what was learnt of the routing is not kept: {error.message}")


def install_default(options: Globals, model: str, folders: Home) -> None:
    """Fetch and build the default model if it is the one asked for and not there; others are pulled on purpose."""
    from mixlocal.app.catalog import DEFAULT_MODEL, split_variant
    from mixlocal.app.installed import find_store

    name, variant = split_variant(model)
    try:
        find_store(model, folders)
    except NotFoundError:
        if name != DEFAULT_MODEL:
            raise
        from mixlocal.app.install import pull

        show_progress(options, pull(name, variant, folders))
