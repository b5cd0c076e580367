"""Options that several commands share, as values."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mixlocal.app.budgets import RunOptions
    from mixlocal.engine.params import SamplingParams
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
    config: str | None = None

    def folders(self) -> Home:
        from mixlocal.store.paths import home

        return home(Path(self.home) if self.home else None)

    def config_file(self) -> Path:
        return Path(self.config).expanduser() if self.config else self.folders().config_file


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


def runtime_options(command: Command) -> Command:
    """Where and with what a model runs; each is None when not given. `run_options` makes a value of them."""
    options = [
        click.option("--ctx", "context", type=int, metavar="N", help="Tokens of context; what fits by default."),
        click.option("--experts-per-token", type=int, metavar="K", help="Experts a token uses; as trained by default."),
        device_option,
        vram_option,
        ram_option,
        kv_dtype_option,
        lookahead_option,
        click.option("--threads", type=int, metavar="N", help="All physical cores this process may use by default."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


device_option = click.option(
    "--device", metavar="NAME", help="cpu, cuda or cuda:N; by default a GPU if there is one that is large enough."
)
vram_option = click.option("--vram", metavar="SIZE", help="As --ram, of the GPU's memory.")
ram_option = click.option(
    "--ram", metavar="SIZE", help="Memory the process may use: 12G, 11GiB, 80%; all that is free by default."
)
kv_dtype_option = click.option(
    "--kv-dtype", type=click.Choice(["f16", "f32"]), help="The KV cache's numbers; f16 by default, half the memory."
)
lookahead_option = click.option(
    "--lookahead/--no-lookahead",
    default=None,
    help="Read experts before they are chosen; by default where a trial shows that it pays.",
)


def run_options(given: dict[str, Any]) -> RunOptions:
    """What the user gave of `runtime_options`."""
    from mixlocal.app.budgets import RunOptions

    names = ("context", "experts_per_token", "threads", "kv_dtype", "ram", "device", "vram", "lookahead")
    return RunOptions(**{name: given[name] for name in names if given.get(name) is not None})


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
