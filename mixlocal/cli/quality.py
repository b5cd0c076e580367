"""mixlocal quality"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixlocal.cli.options import (
    Globals,
    device_option,
    json_option,
    kv_dtype_option,
    pass_globals,
    ram_option,
    run_options,
    vram_option,
)
from mixlocal.cli.render import say, warn
from mixlocal.cli.report import report
from mixlocal.cli.running import RunningLine
from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from mixlocal.app.quality.run import QualityJob, QualityRequest, QualityRow

FILE = click.Path(path_type=Path)
COUNTS = re.compile(r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*")


def _counts(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int | None, ...]:
    if text is None:
        return (None,)
    if not COUNTS.fullmatch(text):
        wanted = "a count of 1 or more, nor several with commas between"
        raise click.BadParameter(f"{text!r} is not {wanted}", ctx, parameter)
    return tuple(dict.fromkeys(map(int, text.split(","))))


@click.command()
@click.argument("model", nargs=-1, required=True)
@click.option("--against", metavar="REF", help="Also how far each model's predictions lie from this one's.")
@click.option("--text", type=FILE, metavar="FILE", help="Read this; by default a text that comes with mixlocal.")
@click.option("--ctx", "context", type=int, default=512, show_default=True, metavar="N", help="Tokens of a chunk.")
@click.option("--chunks", type=click.IntRange(1), metavar="N", help="Read no more than so many; by default all.")
@click.option("--experts-per-token", metavar="K,...", callback=_counts, help="Experts a token uses, a row each; as "
              "trained by default, and REF always.")  # fmt: skip
@click.option("--logits", type=FILE, metavar="FILE", help="Where REF's logits are kept, so that a run that was stopped "
              "goes on; by default in the cache.")  # fmt: skip
@click.option("--plot", type=FILE, metavar="FILE.png", help="Draw quality against size.")
@device_option
@vram_option
@ram_option
@kv_dtype_option
@click.option("--threads", type=click.IntRange(1), metavar="N", help="All physical cores by default.")
@click.option("-o", "--output", type=click.Choice(["md", "csv", "json"]), help="Format of the table; md by default.")
@json_option
@pass_globals
def quality(options: Globals, /, model: tuple[str, ...], plot: Path | None, **given: Any) -> None:
    """Measure what a model's bits cost: perplexity on a text, and with --against how far each MODEL is from REF.

    \b
    As llama-perplexity measures it: chunks of --ctx tokens, of which the second
    half is scored; ± is a standard error.
    PERPLEXITY    of the text; lower is better
    LN RATIO      ln(perplexity / REF's)
    KL            divergence from REF a token, in nats; 0 is the same model
    SAME TOP      tokens at which both find the same one likeliest
    RMS DP        change of the probability of the text's token; of REF's likeliest
    """
    if options.as_json and given["output"] in ("md", "csv"):
        raise UsageError(f"--json and -o {given['output']} contradict each other")
    if plot is not None:
        from mixlocal.cli.figures import check_plot

        check_plot(plot)
    from mixlocal.app.quality.run import QualityRequest, prepare_quality

    names = ("against", "text", "context", "experts_per_token", "logits", "chunks")
    request = QualityRequest(model, **{name: given[name] for name in names})
    run = run_options({name: given[name] for name in ("threads", "kv_dtype", "ram", "device", "vram")})
    job = prepare_quality(request, run, options.folders())
    say(options, job.description)
    rows = _print_rows(options, job, request, "json" if options.as_json else given["output"] or "md")
    if plot is not None:
        from mixlocal.cli.figures import save
        from mixlocal.cli.quality_figure import draw

        save(draw(rows), plot)
        say(options, f"drawn: {plot}")


def _print_rows(options: Globals, job: QualityJob, request: QualityRequest, output: str) -> list[QualityRow]:
    """As they come."""
    from mixlocal.app.measure import Running
    from mixlocal.cli.quality_columns import columns

    table, line = report(output, columns(job, request)), RunningLine(options)
    rows: list[QualityRow] = []
    told = _tell(options, job, 0)
    try:
        for event in job.run():
            if isinstance(event, Running):
                line.show(f"{event.what}, {event.done} of {event.total}")
                continue
            line.clear()
            told = _tell(options, job, told)
            table.add(event)
            rows.append(event)
    finally:
        line.clear()
    table.end()
    return rows


def _tell(options: Globals, job: QualityJob, told: int) -> int:
    """What the job has to say beyond its first `told` notes; returns how many there are."""
    for note in job.warnings[told:]:
        warn(options, note)
    return len(job.warnings)
