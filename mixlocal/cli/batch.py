"""mixlocal batch"""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from mixlocal.cli.batch_progress import BatchMeter, span, speeds
from mixlocal.cli.batch_setup import check_options, engine_options, read_source
from mixlocal.cli.batch_signals import BatchSignals
from mixlocal.cli.loading import install_default, interrupts_end_it
from mixlocal.cli.options import Globals, json_option, pass_globals, runtime_options, sampling_options
from mixlocal.cli.render import print_json, say, warn
from mixlocal.errors import MixlocalError

if TYPE_CHECKING:
    from mixlocal.app.batch.engines import EngineChoice
    from mixlocal.app.batch.job import Batch
    from mixlocal.app.batch.ledger import Order
    from mixlocal.app.batch.source import Source, Survey
    from mixlocal.store.batch_folder import BatchFolder

FAILED_ROWS = 10  # exit code
DRAINING = "stopping: no more rows are begun, those in flight are finished; Ctrl-C again stops at once"


def _concurrency(ctx: click.Context, parameter: click.Parameter, text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:10]) <= 1 << 16:
        raise click.BadParameter(f"{text!r} is neither auto nor a whole number from 1 to {1 << 16}", ctx, parameter)
    return int(text)


def _print_sky_task(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from mixlocal.app.batch.sky_task import sky_task

        click.echo(sky_task(), nl=False)
        ctx.exit()


@click.command()
@click.argument("source", metavar="IN")
@click.option(
    "-o", "--out", required=True, metavar="OUT", help="The answers' file; what is needed to go on, OUT.batch."
)
@click.option("-m", "--model", default="smolmix", show_default=True, help="Name, name:variant or folder.")
@click.option(
    "--input-format",
    type=click.Choice(["auto", "openai", "jsonl", "txt"]),
    default="auto",
    show_default=True,
    help="OpenAI's batch lines; lines with prompt or messages; lines of text. By default IN tells.",
)
@click.option("--template", metavar="T", help="Make prompts of the rows' {field}s, of text of {line}: text or @FILE.")
@click.option("-s", "--system", metavar="TEXT", help="System prompt of rows without one.")
@click.option("--schema", metavar="FILE|JSON", help="Answer with JSON that satisfies this JSON schema.")
@click.option("--json-object", is_flag=True, help="Answer with any JSON object.")
@click.option("--fresh", is_flag=True, help="Throw away what an earlier run did, and replace OUT.")
@click.option("--retry-errors", is_flag=True, help="Ask rows that failed once more.")
@click.option(
    "--order",
    type=click.Choice(["input", "done"]),
    default="input",
    show_default=True,
    help="Of the lines in OUT: as in IN, or as they were done.",
)
@click.option("--max-failures", type=click.IntRange(1), metavar="N", help="Stop when N rows have failed.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N rows.")
@click.option(
    "--concurrency", default="auto", show_default=True, metavar="N|auto", callback=_concurrency,
    help="Rows in flight at once.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["local", "ray", "openai"]), default="local", show_default=True,
    help="Who answers: this machine, Ray's workers, or a server that speaks OpenAI's language.",
)  # fmt: skip
@click.option("--base-url", metavar="URL", help="Of the server, for example http://127.0.0.1:8000/v1.")
@click.option("--api-model", metavar="NAME", help="The server's name for the model; its only one by default.")
@click.option("--ray-address", metavar="ADDR", help="Of a Ray cluster; by default one is started here.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Ray workers, each with the model.")
@click.option(
    "--print-sky-task", is_flag=True, is_eager=True, expose_value=False, callback=_print_sky_task,
    help="Print a SkyPilot task that runs a batch on a rented GPU.",
)  # fmt: skip
@runtime_options
@sampling_options
@json_option
@pass_globals
@click.pass_context
def batch(ctx: click.Context, options: Globals, /, **given: Any) -> None:
    """Answer every row of the file IN; - is standard input.

    The same command goes on where it was stopped or killed. Rows that fail are in OUT too, with their errors. The key
    of a server is read from OPENAI_API_KEY.
    """
    from mixlocal.store.batch_folder import batch_folder

    paths = check_options(ctx, given)
    with batch_folder(paths.out) as folder:
        source = read_source(folder, paths, given)
        survey = source.survey()
        choice = _choose(options, given)
        try:
            job = _run(options, folder, source, survey, choice, given)
        finally:
            _close(options, choice)
    if job.progress.failed:
        ctx.exit(FAILED_ROWS)


def _run(
    options: Globals, folder: BatchFolder, source: Source, survey: Survey, choice: EngineChoice, given: dict[str, Any]
) -> Batch:
    """To the end, or until too many rows have failed."""
    from mixlocal.app.batch.job import Batch
    from mixlocal.app.batch.opening import Terms

    terms = Terms(
        choice.identity, choice.defaults, given["seed"], given["fresh"], given["retry_errors"], given["max_failures"]
    )
    with Batch(folder, source, survey, terms) as job:
        _tell_start(options, job)
        began_with = job.left
        if job.left and not job.stopped:
            _answer(options, job, choice, given["engine"])
        _finish(options, job, folder, given["order"], worked=bool(began_with))
    if options.as_json:
        print_json(_envelope(job, folder, choice))
    return job


def _choose(options: Globals, given: dict[str, Any]) -> EngineChoice:
    from mixlocal.app.batch.engines import ENGINES

    chosen = engine_options(options, given)
    if given["engine"] != "openai":
        install_default(options, given["model"], chosen.folders)
    return ENGINES[given["engine"]](chosen)


def _tell_start(options: Globals, job: Batch) -> None:
    done, bad = job.progress.done - job.unaskable, job.unaskable
    parts = [f"{job.progress.total} rows"]
    if bad:
        parts.append(f"{bad} cannot be asked (OUT tells why)")
    if done > 0:
        parts.append(f"{done} are done already")
    say(options, " · ".join([*parts, f"seed {job.seed}"]))
    for note in job.notes:
        warn(options, note)


def _answer(options: Globals, job: Batch, choice: EngineChoice, name: str) -> None:
    """Until no row is left, or to a signal. What is done by then is kept, and said."""
    meter = BatchMeter(options)
    with interrupts_end_it() if name == "local" else nullcontext():
        engine = choice.open()

    def drain() -> None:
        job.stop()
        meter.say_amid(DRAINING)

    try:
        with BatchSignals(drain) as signals:
            try:
                for progress in job.run(engine, signals.steps):
                    meter.show(progress)
            finally:
                meter.clear()
                _close(options, choice)  # within, so that a signal does not strike there
    except BaseException:
        _tell_rest(options, job)
        raise
    if job.left and signals.heard:
        _tell_rest(options, job)
        raise KeyboardInterrupt


def _close(options: Globals, choice: EngineChoice) -> None:
    """Twice does no harm."""
    try:
        choice.close()
    except MixlocalError as error:
        warn(options, error.message)


def _tell_rest(options: Globals, job: Batch) -> None:
    """How to go on; --fresh would begin anew."""
    words = [word for word in sys.argv[1:] if word != "--fresh"]
    total = job.progress.total
    say(options, f"{total - job.left} of {total} rows are done; go on with: mixlocal {shlex.join(words)}")


def _finish(options: Globals, job: Batch, folder: BatchFolder, order: Order, *, worked: bool) -> None:
    if job.left:
        say(options, f"stopped: too many rows have failed ({job.progress.failed})")
        _tell_rest(options, job)
        return
    written = job.publish(order)
    progress = job.progress
    if not worked:
        say(options, f"all rows were done; {folder.out} {'is written anew' if written else 'is as it should be'}")
    parts = [f"{progress.total - progress.failed} answers, {progress.failed} failed in {folder.out}"]
    if progress.answered:
        parts += [span(progress.seconds), *speeds(progress)]
    say(options, " · ".join(parts))
    if progress.failed > job.unaskable:
        say(options, "--retry-errors asks rows that failed once more")


def _envelope(job: Batch, folder: BatchFolder, choice: EngineChoice) -> dict[str, Any]:
    progress = job.progress
    return {
        "rows": progress.total, "answers": progress.done - progress.failed, "failed": progress.failed,
        "left": job.left, "answered_now": progress.answered, "prompt_tokens": progress.read,
        "completion_tokens": progress.generated, "seconds": round(progress.seconds, 3), "seed": job.seed,
        "engine": dict(choice.identity), "out": None if job.left else str(folder.out), "folder": str(folder.path),
    }  # fmt: skip
