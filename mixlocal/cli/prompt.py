"""mixlocal prompt"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mixlocal.cli.answer import Answer, PrefillMeter
from mixlocal.cli.loading import close_session, interrupts_end_it, open_session
from mixlocal.cli.options import (
    Globals,
    json_option,
    pass_globals,
    run_options,
    runtime_options,
    sampling_options,
)
from mixlocal.cli.prompt_output import Output, open_output
from mixlocal.cli.prompt_request import Request, read_request
from mixlocal.cli.render import say, warn
from mixlocal.errors import SchemaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mixlocal.app.session import Chunk


@click.command()
@click.argument("text", nargs=-1)
@click.option("-m", "--model", default="smolmix", show_default=True, help="Name, name:variant or folder.")
@click.option("-f", "--file", "files", multiple=True, metavar="FILE", help="Put a text file before TEXT; repeatable.")
@click.option("-s", "--system", metavar="TEXT", help="System prompt.")
@click.option("--system-file", metavar="FILE", help="System prompt, from a file.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat format.")
@click.option("--prefill", default="", metavar="TEXT", help="Begin the answer with this.")
@click.option("-x", "--extract", is_flag=True, help="Print the answer's first code block alone; all if it has none.")
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@click.option("--stream-json", is_flag=True, help="A JSON object a line as the answer comes, --json's the last.")
@click.option("--logprobs", type=int, default=0, metavar="K", help="In JSON: the K likeliest tokens at each position.")
@click.option("--schema", metavar="FILE|JSON", help="Answer with JSON that satisfies this JSON schema.")
@click.option("--json-object", is_flag=True, help="Answer with any JSON object.")
@click.option(
    "--on-overflow",
    type=click.Choice(["error", "drop-oldest"]),
    default="error",
    show_default=True,
    help="If the prompt is too long, drop-oldest leaves out the beginning of what is piped in and of files.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be sent, without loading the model.")
@runtime_options
@click.option("--stats/--no-stats", default=True, help="Speed and seed on stderr after the answer.")
@sampling_options
@json_option
@pass_globals
def prompt(options: Globals, /, text: tuple[str, ...], **given: Any) -> None:
    """Answer TEXT. What is piped in goes before it, then files."""
    request = read_request(options, text, given)
    if given["dry_run"]:
        from mixlocal.cli.dry_run import show_request

        show_request(options, given["model"], run_options(given), request)
        return
    answer = _answer(options, request, given)
    if answer.finish == "interrupted":
        raise KeyboardInterrupt
    _check_form(request, answer)


def _answer(options: Globals, request: Request, given: dict[str, Any]) -> Answer:
    """Load the model, print its answer, and return it."""
    with interrupts_end_it():
        session = open_session(options, given["model"], run_options(given), options.folders())
    params = request.params(session.defaults)
    ids, notes = request.encode(session.encode, session.context, params.max_tokens)
    if not request.raw:
        notes += filter(None, [session.template.system_note(request.messages())])
    for note in notes:
        warn(options, note)
    continues = request.raw or bool(request.prefill)
    chunks = session.stream_ids(ids, params, continuation=continues, constraint=request.constraint(session))
    answer = Answer(session, params, prefill=request.prefill, notes=notes)
    _print(options, chunks, answer, open_output(options, answer, given))
    say(options, answer.summary() if given["stats"] else f"seed {params.seed}")
    close_session(options, session)
    return answer


def _print(options: Globals, chunks: Iterator[Chunk], answer: Answer, output: Output) -> None:
    """To the answer's end or to Ctrl-C."""
    meter = PrefillMeter(options)
    try:
        for chunk in chunks:
            answer.add(chunk)
            if chunk.prefilled is not None:
                meter.show(chunk.prefilled)
            else:
                meter.clear()
            output.show(chunk)
    except KeyboardInterrupt:
        answer.finish = "interrupted"
    meter.clear()
    output.end()


def _check_form(request: Request, answer: Answer) -> None:
    """Raises `SchemaError` for an answer that ended too early."""
    if request.form is None or request.form.accepts(answer.text):
        return
    reason = " (a stop string)" if answer.finish == "stop" else ""
    raise SchemaError(
        f"the answer ended after {len(answer.choices)} tokens{reason}, before its JSON was complete",
        "raise --max-tokens or --ctx, or bound the schema: maxLength, maxItems, additionalProperties false",
    )
