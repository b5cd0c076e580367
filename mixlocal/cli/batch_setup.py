"""What the command line of `batch` says of its rows and of its engine; all that needs no model is checked here."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mixlocal.cli.options import Globals, run_options, sampling_params
from mixlocal.cli.prompt_input import read_file
from mixlocal.cli.prompt_request import read_answer_form
from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from mixlocal.app.batch.engines import EngineOptions
    from mixlocal.app.batch.row_template import RowTemplate
    from mixlocal.app.batch.source import Source
    from mixlocal.app.budgets import RunOptions
    from mixlocal.app.session import Session
    from mixlocal.store.batch_folder import BatchFolder

API_KEY = "OPENAI_API_KEY"
_HERE = ("local", "ray")
# The options that only some engines have.
_ENGINES_OF = {
    "base_url": ("openai",), "api_model": ("openai",), "ray_address": ("ray",), "workers": ("ray",),
    "model": _HERE, "context": _HERE, "experts_per_token": _HERE, "device": _HERE, "vram": _HERE, "ram": _HERE,
    "kv_dtype": _HERE, "lookahead": _HERE, "threads": _HERE,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Paths:
    """source: None for standard input; name: what the user calls it."""

    source: Path | None
    name: str
    out: Path


def check_options(ctx: click.Context, given: dict[str, Any]) -> Paths:
    """Raises `UsageError` for options that contradict each other or the engine, and what a missing input raises."""
    for name, engines in _ENGINES_OF.items():
        if given["engine"] not in engines and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = next(parameter.opts[-1] for parameter in ctx.command.params if parameter.name == name)
            raise UsageError(f"{flag} goes with --engine {' or '.join(engines)}")
    if given["schema"] is not None and given["json_object"]:
        raise UsageError("--schema and --json-object: give one of them")
    return _paths(given["source"], given["out"])


def _paths(source: str, out: str) -> Paths:
    from mixlocal.app.batch.source import check_input
    from mixlocal.store.durable import named_errors

    if out == "-":
        raise UsageError("-o needs a file: what is in it must outlive this run")
    target = Path(out)
    if not target.name:
        raise UsageError(f"-o {out!r} names no file")
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("IN is -, and nothing is piped in", "for example: mixlocal batch - -o OUT < IN")
        return Paths(None, "standard input", target)
    check_input(Path(source), source)
    with named_errors(target):
        if target.exists() and target.samefile(source):
            raise UsageError(f"{source} is the input and cannot be the output", "choose another output")
    return Paths(Path(source), source, target)


def read_source(folder: BatchFolder, paths: Paths, given: dict[str, Any]) -> Source:
    """What can be read only once is copied into the batch's folder first."""
    from mixlocal.app.batch.setup import Setup
    from mixlocal.app.batch.source import Source, detect_format

    template, sampling = read_template(given["template"]), sampling_of(given)
    form = read_answer_form(given)
    path = _readable(folder, paths)
    kind = detect_format(path, paths.name) if given["input_format"] == "auto" else given["input_format"]
    if template is not None and kind == "openai":
        raise UsageError("--template goes with jsonl and txt: OpenAI's lines say themselves what to ask")
    if template is not None and kind == "txt" and template.names != {"line"}:
        raise UsageError("--template: a line of text has one field, {line}")
    setup = Setup(kind, template, given["system"] or "", sampling, form)
    return Source(path, paths.name, setup, given["limit"])


def read_template(text: str | None) -> RowTemplate | None:
    """@FILE is a file's text, without the newline at its end."""
    if text is None:
        return None
    from mixlocal.app.batch.row_template import RowTemplate

    return RowTemplate(read_file(text[1:]).removesuffix("\n") if text.startswith("@") else text)


def sampling_of(given: dict[str, Any]) -> dict[str, Any]:
    """What was given of the sampling options but the seed. Raises `UsageError` naming a value out of range."""
    from mixlocal.engine.params import SamplingParams

    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "stop")
    said = {name: given[name] for name in names if given[name] not in (None, ())}
    sampling_params(SamplingParams(), said)
    said.pop("seed", None)
    return said


def engine_options(options: Globals, given: dict[str, Any]) -> EngineOptions:
    from mixlocal.app.batch.engines import AUTO_SEQUENCES, EngineOptions
    from mixlocal.cli.loading import open_session

    folders = options.folders()

    def run() -> RunOptions:
        return replace(run_options(given), sequences=given["concurrency"] or AUTO_SEQUENCES)

    def load() -> Session:
        return open_session(options, given["model"], run(), folders)

    return EngineOptions(
        given["model"], run, folders, load, given["concurrency"], given["base_url"],
        given["api_model"], os.environ.get(API_KEY) or None, given["ray_address"], given["workers"],
    )  # fmt: skip


def _readable(folder: BatchFolder, paths: Paths) -> Path:
    """A path that can be read again and again."""
    from mixlocal.store.durable import named_errors

    if paths.source is None:
        return folder.keep_input(sys.stdin.buffer)
    if stat.S_ISREG(paths.source.stat().st_mode):
        return paths.source
    with named_errors(paths.source), paths.source.open("rb") as pipe:
        return folder.keep_input(pipe)
