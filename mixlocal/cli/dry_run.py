"""mixlocal prompt --dry-run"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from mixlocal.cli.options import Globals
from mixlocal.cli.prompt_output import write, write_line
from mixlocal.cli.prompt_request import Request
from mixlocal.cli.render import console, warn
from mixlocal.cli.safe_text import safe_text
from mixlocal.errors import ContextOverflowError

if TYPE_CHECKING:
    from mixlocal.app.budgets import RunOptions
    from mixlocal.app.preview import Preview
    from mixlocal.engine.params import SamplingParams


def show_request(options: Globals, model: str, run: RunOptions, request: Request) -> None:
    """Print what would be sent. Raises what the real run would; a prompt that is too long is printed before."""
    from mixlocal.app.preview import Preview

    preview = Preview.open(model, run, options.folders())
    params = request.params(preview.defaults)
    ids, notes = request.encode(preview.encode, preview.context, params.max_tokens)
    for warning in [*preview.warnings, *notes]:
        warn(options, warning)
    if options.as_json:
        _print_json(preview, request, params, ids, notes)
    else:
        _print(options, preview, request, params, ids)
    if len(ids) > preview.context:
        raise ContextOverflowError(
            f"the prompt has {len(ids)} tokens and the context holds {preview.context}", "shorten it, or raise --ctx"
        )


def _print_json(preview: Preview, request: Request, params: SamplingParams, ids: list[int], notes: list[str]) -> None:
    from mixlocal.app.preview import render_ids

    write_line({
        "model": preview.name, "variant": preview.variant, "prompt_tokens": len(ids), "context": preview.context,
        "prompt": "".join(text for text, _ in render_ids(preview.tokenizer, ids)), "token_ids": ids,
        "seed": params.seed, "params": asdict(params), "schema": request.form.schema if request.form else None,
        "warnings": [*preview.warnings, *notes],
    })  # fmt: skip


def _print(options: Globals, preview: Preview, request: Request, params: SamplingParams, ids: list[int]) -> None:
    """On a terminal control tokens stand out from text that looks like one."""
    from rich.text import Text

    from mixlocal.app.preview import render_ids

    settings = ", ".join(f"{name} {value}" for name, value in asdict(params).items() if value not in ((), None))
    rows = [
        f"model   {preview.name}:{preview.variant}",
        f"prompt  {len(ids)} of {preview.context} tokens",
        f"answer  {settings}",
        *([f"schema  {request.form.schema}"] if request.form else []),
    ]
    parts = render_ids(preview.tokenizer, ids)
    write("\n".join([*rows, "", ""]))
    if sys.stdout.isatty():
        styled = Text.assemble(*((safe_text(text), "reverse" if is_control else "") for text, is_control in parts))
        console(options, sys.stdout).print(styled, soft_wrap=True)
    else:
        write("".join(text for text, _ in parts) + "\n")
