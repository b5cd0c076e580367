"""mixlocal bench --compare"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixlocal.cli.options import Command, Globals, run_options, settle
from mixlocal.cli.render import say, warn
from mixlocal.cli.report import Report
from mixlocal.cli.running import RunningLine

if TYPE_CHECKING:
    from mixlocal.app.bench_compare import CompareJob, CompareRow
    from mixlocal.app.bench_request import BenchRequest
    from mixlocal.app.quality.run import QualityRequest

FILE = click.Path(path_type=Path)
NO_REFERENCE = "none"


def compare_options(command: Command) -> Command:
    options = [
        click.option("--compare", metavar="MODEL,...", help="Measure these in turns; the first is the baseline."),
        click.option("--quality", is_flag=True, help="With --compare: also what their bits cost, as mixlocal quality."),
        click.option("--against", metavar="REF", help="With --quality: the reference, or none; by default the first."),
        click.option("--text", type=FILE, metavar="FILE", help="With --quality: read this, not mixlocal's own text."),
        click.option("--ctx", type=int, default=512, show_default=True, metavar="N",
                     help="With --quality: tokens of a chunk of the text."),
        click.option("--chunks", type=click.IntRange(1), metavar="N", help="With --quality: read no more of them."),
        click.option("--plot", type=FILE, metavar="FILE.png", help="With --quality: draw it against size and speed."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def bench_compare(options: Globals, tests: BenchRequest, given: dict[str, Any], output: str) -> None:
    """given: the options of `bench`."""
    from mixlocal.app.bench_compare import CompareRequest, prepare_compare
    from mixlocal.cli.compare_columns import compare_report

    models = tuple(name.strip() for name in given["compare"].split(","))
    request = CompareRequest(models, tests, _quality(models, given) if given["quality"] else None)
    plot: Path | None = given["plot"] if given["quality"] else None
    if plot is not None:
        from mixlocal.cli.figures import check_plot

        check_plot(plot)
    job = prepare_compare(request, run_options(given), options.folders())
    say(options, job.description)
    rows = list(_print_rows(options, job, compare_report(output, job.labels, request)))
    if plot is not None:
        from mixlocal.cli.compare_figure import draw
        from mixlocal.cli.figures import save

        save(draw(rows), plot)
        say(options, f"drawn: {plot}")


def _quality(models: tuple[str, ...], given: dict[str, Any]) -> QualityRequest:
    from mixlocal.app.quality.run import QualityRequest

    against = None if given["against"] == NO_REFERENCE else given["against"] or models[0]
    return QualityRequest(tuple(dict.fromkeys(models)), against, given["text"], given["ctx"], chunks=given["chunks"])


def _print_rows(options: Globals, job: CompareJob, rows: Report[CompareRow]) -> Iterator[CompareRow]:
    """As they come."""
    from mixlocal.app.measure import Running

    line = RunningLine(options)
    told = _tell(options, job, 0)
    try:
        for event in job.run(settle):
            told = _tell(options, job, told)
            if isinstance(event, Running):
                line.show(f"{event.what}, {event.done} of {event.total}" if event.total else event.what)
                continue
            line.clear()
            rows.add(event)
            yield event
    finally:
        line.clear()
    rows.end()


def _tell(options: Globals, job: CompareJob, told: int) -> int:
    """What the job has to say beyond its first `told` warnings; returns how many there are."""
    for warning in job.warnings[told:]:
        warn(options, warning)
    return len(job.warnings)
