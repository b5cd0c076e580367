"""Options that several commands share, as values."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mixlocal.engine.sampling import SamplingParams
    from mixlocal.store.paths import Home

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Globals:
    """The options before the command."""

    home: str | None
    quiet: bool
    color: str
    as_json: bool
    debug: bool

    def folders(self) -> Home:
        from mixlocal.store.paths import home

        return home(Path(self.home) if self.home else None)


pass_globals = click.make_pass_decorator(Globals)


def json_option(command: Command) -> Command:
    """`--json` after the command as well as before it."""
    option = click.option(
        "--json", is_flag=True, expose_value=False, callback=_remember_json, help="One JSON object on stdout."
    )
    return option(command)


def _remember_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.obj = replace(ctx.find_object(Globals) or ctx.obj, as_json=True)


def kv_dtype_option(command: Command) -> Command:
    """`--kv-dtype`; None when not given."""
    option = click.option(
        "--kv-dtype",
        type=click.Choice(["f16", "f32"]),
        help="The KV cache's numbers; f16 by default, half the memory.",
    )
    return option(command)


def ram_option(command: Command) -> Command:
    """`--ram`; None when not given."""
    option = click.option(
        "--ram", metavar="SIZE", help="Memory the process may use: 12G, 11GiB, 80%; all that is free by default."
    )
    return option(command)


def ram_budget(text: str | None) -> int | None:
    """Bytes of `--ram`. Raises `UsageError` for what is no size."""
    if text is None:
        return None
    from mixlocal.app.hardware import probe
    from mixlocal.app.sizes import parse_size

    return parse_size("--ram", text, probe(Path.cwd()).ram_total)


def settle() -> None:
    """Take what is loaded by now out of the garbage collector's rounds, which took 3 % of decoding.

    For a program that loads one model and ends with it; a library may not decide this for its user.
    """
    gc.collect()
    gc.freeze()


def sampling_options(command: Command) -> Command:
    """The generation flags; each is None when not given, so that the model's own default can hold."""
    options = [
        click.option("-n", "--max-tokens", type=int, help="Stop after so many tokens."),
        click.option("-T", "--temperature", type=float, help="0 always takes the likeliest token."),
        click.option("--top-p", type=float, help="Keep the likeliest tokens that reach this probability."),
        click.option("--top-k", type=int, help="Keep so many of the likeliest tokens; 0 keeps all."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest one's probability."),
        click.option("--repeat-penalty", type=float, help="Above 1: make tokens already seen less likely."),
        click.option("--seed", type=int, help="Replay a run: the same seed gives the same answer."),
        click.option("--stop", multiple=True, metavar="STR", help="End the answer before this text; may be repeated."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def sampling_params(defaults: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    """`defaults` with what the user gave."""
    return replace(defaults, **{name: value for name, value in given.items() if value not in (None, ())})
