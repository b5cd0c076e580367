"""mixlocal run"""

from __future__ import annotations

import sys

import click

from mixlocal.cli.chat import chat
from mixlocal.cli.prompt import prompt


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("model")
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[TEXT...]")
@click.pass_context
def run(ctx: click.Context, model: str, rest: tuple[str, ...]) -> None:
    """Answer TEXT, or talk if there is none; with the options of prompt or chat."""
    arguments = ["-m", model, *rest]
    command = prompt if _has_text(ctx, arguments) else chat
    with command.make_context(command.name, arguments, parent=ctx.parent) as context:
        command.invoke(context)


def _has_text(ctx: click.Context, arguments: list[str]) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        return True
    try:
        context = prompt.make_context("prompt", list(arguments), parent=ctx.parent)
    except click.NoSuchOption:
        return False  # one of chat's, then
    return bool(context.params["text"])
