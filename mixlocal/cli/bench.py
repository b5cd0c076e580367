"""mixlocal bench"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mixlocal.cli.bench_columns import kernel_columns, model_columns
from mixlocal.cli.bench_compare import bench_compare, compare_options
from mixlocal.cli.options import (
    Command,
    Globals,
    device_option,
    json_option,
    kv_dtype_option,
    lookahead_option,
    pass_globals,
    ram_option,
    run_options,
    settle,
    vram_option,
)
from mixlocal.cli.render import warn
from mixlocal.cli.report import Report, Row, report
from mixlocal.cli.running import RunningLine
from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from mixlocal.app.bench import BenchRow
    from mixlocal.app.bench_request import BenchRequest
    from mixlocal.app.hardware import Hardware
    from mixlocal.app.measure import Running

OF_A_MODEL = {
    "model": "-m", "compare": "--compare", "n_prompts": "-p", "n_gens": "-n", "n_depths": "-d", "repetitions": "-r",
    "warmup": "--warmup", "kv_dtype": "--kv-dtype", "ram": "--ram", "device": "--device", "vram": "--vram",
    "lookahead": "--lookahead", "vary": "--vary",
}  # fmt: skip
OF_ONE_MODEL = {"model": "-m", "vary": "--vary"}
NEEDS = {
    "quick": ("--quick", "kernels"), "quality": ("--quality", "compare"), "against": ("--against", "quality"),
    "text": ("--text", "quality"), "ctx": ("--ctx", "quality"), "chunks": ("--chunks", "quality"),
    "plot": ("--plot", "quality"),
}  # fmt: skip
PLAIN_COUNT = re.compile(r"[0-9]{1,9}")


def _counts(low: int) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, ...] | None]:
    """Reads whole numbers of at least `low` with commas between: "128,512"."""

    def read(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
        if text is None:
            return None
        parts = [part.strip() for part in text.split(",")]
        if not all(PLAIN_COUNT.fullmatch(part) and int(part) >= low for part in parts):
            wanted = f"a whole number of {low} or more, nor several with commas between"
            raise click.BadParameter(f"{text!r} is not {wanted}", ctx, parameter)
        return tuple(int(part) for part in parts)

    return read


def _tokens(short: str, long: str, name: str, default: str, text: str) -> Callable[[Command], Command]:
    return click.option(
        short, long, name, default=default, show_default=True, metavar="N,...", callback=_counts(0), help=text
    )


@click.command()
@click.option("-m", "--model", default="smolmix", show_default=True, help="Name, name:variant or folder.")
@_tokens("-p", "--n-prompt", "n_prompts", "512", "Tokens of a prompt to process; 0 for no such test.")
@_tokens("-n", "--n-gen", "n_gens", "128", "Tokens to generate one by one; 0 for no such test.")
@_tokens("-d", "--n-depth", "n_depths", "0", "Tokens that are in the KV cache already.")
@click.option("-r", "--repetitions", type=click.IntRange(1), default=5, show_default=True, help="Runs of every test.")
@click.option("--warmup/--no-warmup", default=True, help="First run each test once unmeasured: a prompt, or one token.")
@device_option
@vram_option
@ram_option
@kv_dtype_option
@lookahead_option
@click.option("--vary", metavar="NAME=V,...", help="Test with each value: ram=6G,8G,12G; lookahead=on,off; ...")
@compare_options
@click.option("--kernels", is_flag=True, help="Time the kernels alone, and the memory they read: needs no model.")
@click.option("--quick", is_flag=True, help="With --kernels: 1 and 512 tokens only, few samples.")
@click.option(
    "--threads",
    metavar="N,...",
    callback=_counts(1),
    help="All physical cores this process may use by default.",
)
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json"]), help="Format of the table; md by default.")
@json_option
@pass_globals
@click.pass_context
def bench(ctx: click.Context, options: Globals, /, **given: Any) -> None:
    """Measure how fast a model is, as llama-bench does, or with --kernels how fast its arithmetic is.

    Options with commas take several values, and every combination is one row. --compare measures several models in
    turns, so that all feel what else the machine does: each cell is the median of the rounds (lowest to highest).
    """
    _check_combination(ctx, options, given)
    output = "json" if options.as_json else given["output"] or "md"
    from mixlocal.app.hardware import probe

    hardware = probe(options.folders().models)
    threads = given["threads"] or (hardware.cores,)
    if given["kernels"]:
        _bench_kernels(options, threads, given["quick"], hardware, output)
    elif given["compare"] is not None:
        bench_compare(options, _tests(threads, given), given, output)
    else:
        _bench_model(options, threads, given, output)


def _check_combination(ctx: click.Context, options: Globals, given: dict[str, Any]) -> None:
    """Raises `UsageError` for options that say nothing about what is measured, rather than ignore them."""

    def check_none(flags: dict[str, str], says: str) -> None:
        for name, flag in flags.items():
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise UsageError(f"{flag} {says}")

    if given["kernels"]:
        check_none(OF_A_MODEL, "does not go with --kernels")
    elif given["compare"] is not None:
        check_none(OF_ONE_MODEL, "does not go with --compare")
    for name, (flag, needed) in NEEDS.items():
        if not given[needed]:
            check_none({name: flag}, f"needs --{needed}")
    if options.as_json and given["output"] in ("md", "csv"):
        raise UsageError(f"--json and -o {given['output']} contradict each other")


def _tests(threads: tuple[int, ...], given: dict[str, Any]) -> BenchRequest:
    from mixlocal.app.bench_request import BenchRequest

    return BenchRequest(
        given["n_prompts"], given["n_gens"], given["n_depths"], threads, given["repetitions"], given["warmup"]
    )


def _bench_model(options: Globals, threads: tuple[int, ...], given: dict[str, Any], output: str) -> None:
    from mixlocal.app.bench import describe_model, open_bench, prepare_bench, run_bench
    from mixlocal.app.bench_request import varied

    runs, request = varied(run_options(given), given["vary"]), _tests(threads, given)
    for _, run in runs:  # a value that cannot be is told before the first is measured
        prepare_bench(given["model"], request, run, options.folders())
    rows: Report[BenchRow] | None = None
    for label, run in runs:
        target = open_bench(given["model"], request, run, options.folders(), label)
        settle()
        for warning in target.run.warnings:
            warn(options, warning)
        rows = rows or report(output, model_columns(describe_model(target), request))
        _print_rows(options, run_bench(target, request), rows)
        target.model.experts.close()  # what random tokens choose is not worth learning
        del target  # its memory is the next one's
    assert rows is not None
    rows.end()


def _bench_kernels(options: Globals, threads: tuple[int, ...], quick: bool, hardware: Hardware, output: str) -> None:
    from mixlocal.app.bench_kernels import KernelRequest, check_memory, run_kernels

    check_memory(hardware)
    rows = report(output, kernel_columns())
    _print_rows(options, run_kernels(KernelRequest(threads, quick)), rows)
    rows.end()


def _print_rows(options: Globals, events: Iterable[Running | Row], rows: Report[Row]) -> None:
    from mixlocal.app.measure import Running

    progress = RunningLine(options)
    try:
        for event in events:
            if isinstance(event, Running):
                progress.show(f"{event.what}, {event.done} of {event.total}")
            else:
                progress.clear()
                rows.add(event)
    finally:
        progress.clear()
