"""Says of a wrong value where it stands, if that is not the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from mixlocal.app.config import EDIT
from mixlocal.cli.flags import Setting, own_settings
from mixlocal.cli.origins import INNERMOST, Origin, origin_of, path_of
from mixlocal.errors import MixlocalError, NotFoundError, RefusedError, UsageError


def explain(error: MixlocalError | click.ClickException, context: click.Context | None) -> MixlocalError:
    """`error`, naming the variable or the key if what is wrong stands there and not on the command line."""
    ctx = getattr(error, "ctx", None) or (context.meta.get(INNERMOST, context) if context else None)
    if isinstance(error, click.ClickException):
        known = _blamed(error, ctx)
        hint = f"see: {ctx.command_path} --help" if ctx else ""
        return known or UsageError(error.format_message(), hint)
    for setting, origin in _indirect(ctx) if ctx else ():
        if isinstance(error, UsageError) and _mentions(error.message, setting):
            return _renamed(origin, error.message, error.hint)
        if isinstance(error, NotFoundError) and setting.name == "model":
            error.hint = f"{error.hint}; the name is from {origin.text}".removeprefix("; ")
    return error


def _blamed(error: click.ClickException, ctx: click.Context | None) -> MixlocalError | None:
    parameter = getattr(error, "param", None)
    for setting, origin in _indirect(ctx) if ctx and parameter else ():
        if setting.parameter is parameter:
            return _renamed(origin, error.message, "")
    return None


def _renamed(origin: Origin, message: str, hint: str) -> MixlocalError:
    if origin.kind == "file":
        return RefusedError(f"{origin.text}: {message}", hint or EDIT)
    return UsageError(f"{origin.text}: {message}", hint)


def _indirect(ctx: click.Context) -> Iterator[tuple[Setting, Origin]]:
    """The flags of this run that the environment or the file has set."""
    while ctx:
        for setting in own_settings(ctx.command, path_of(ctx)):
            origin = origin_of(ctx, setting)
            if origin.kind in ("environment", "file"):
                yield setting, origin
        if ctx.parent is None:
            return
        ctx = ctx.parent


def _mentions(message: str, setting: Setting) -> bool:
    return any(re.search(rf"(^|\s)--{name}(?![\w-])|^{name}(?![\w-])", message) for name in setting.names)
