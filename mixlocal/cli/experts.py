"""mixlocal experts"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mixlocal.cli.options import (
    Globals,
    device_option,
    json_option,
    pass_globals,
    ram_option,
    run_options,
    vram_option,
)
from mixlocal.cli.render import print_json, warn
from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from mixlocal.app.expert_reading import Reading

OWN_TEXT = Path(__file__).parent.parent / "data" / "evaluation.txt"
LAYERS = re.compile(r"[0-9]{1,6}(,[0-9]{1,6})*")


def _layers(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    if not LAYERS.fullmatch(text):
        raise click.BadParameter(f"{text!r} is not a layer's number, nor several with commas between", ctx, parameter)
    return tuple(dict.fromkeys(map(int, text.split(","))))


@click.command()
@click.argument("model", default="smolmix")
@click.option("--text", "file", metavar="FILE", help="Read this text; by default one that comes with mixlocal.")
@click.option("--prompt", "typed", metavar="TEXT", help="Read these words.")
@click.option("--ctx", "context", type=int, metavar="N", help="Tokens of a piece of the text; 512 by default.")
@click.option("--layer", "layers", metavar="N,...", callback=_layers, help="Only these layers; 0 is the first.")
@click.option("--colour", is_flag=True, help="The text instead of figures, coloured by first expert: of --layer, else "
              "of the middle layer.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw the figures of all layers.")
@click.option("--experts-per-token", type=int, metavar="K", help="Experts a token uses; as trained by default.")
@device_option
@vram_option
@ram_option
@click.option("--threads", type=int, metavar="N", help="All physical cores this process may use by default.")
@json_option
@pass_globals
def experts(options: Globals, /, model: str, **given: Any) -> None:
    """Show which experts of MODEL a text uses.

    \b
    Of each layer:
    LOAD          each expert's share of the choices, a bar each
    FIRST SAME    consecutive tokens with the same first choice
    SHARED        consecutive tokens of which one's first or second choice is
                  among the other's
    ROUTER BITS   entropy of the router's probabilities; 3 is none preferred of 8
    LOAD BITS     entropy of the load; 3 is all of 8 used alike
    FORESEEN      choices that the next router named when it was asked a layer
                  early, which is what experts are read ahead by

    Behind that, how often a cache of some experts of each layer would have held what was chosen.
    """
    if given["colour"]:
        from mixlocal.cli.experts_colour import check_colour

        check_colour(options)
    if given["plot"]:
        from mixlocal.cli.figures import check_plot

        check_plot(given["plot"])
    name, text = _text(given["file"], given["typed"])
    from mixlocal.app.expert_reading import Reading
    from mixlocal.cli.loading import install_default

    folders = options.folders()
    install_default(options, model, folders)
    reading = Reading(model, text, run_options(given), folders)
    layers = _known(given["layers"], reading)
    for warning in reading.run.warnings:
        warn(options, warning)
    _report(options, reading, name, layers, given["colour"], given["plot"])


def _report(
    options: Globals, reading: Reading, name: str, layers: tuple[int, ...], colour: bool, plot: Path | None
) -> None:
    from mixlocal.app.expert_reading import figures
    from mixlocal.cli.running import follow

    routing, n_layers = follow(options, reading.read()), reading.run.config.n_layers
    if colour:
        from mixlocal.cli.experts_colour import print_coloured

        for layer in layers or (n_layers // 2,):
            print_coloured(options, routing, layer)
        if plot is None:
            return
    found = figures(routing)
    if plot is not None:
        from mixlocal.cli.experts_figure import draw
        from mixlocal.cli.figures import save

        save(draw(found, f"{reading.name}, {name}"), plot)
    if not colour:
        from mixlocal.cli.experts_table import as_dict, print_figures

        shown = layers or tuple(range(n_layers))
        if options.as_json:
            print_json(as_dict(reading, name, found, shown))
        else:
            print_figures(options, reading, name, found, shown)


def _text(file: str | None, typed: str | None) -> tuple[str, str]:
    """What it is called, and the text. Raises `UsageError` if two are given, and as `read_file`."""
    from mixlocal.cli.prompt_input import read_file

    if file is not None and typed is not None:
        raise UsageError("--text and --prompt: give one of them")
    if typed is not None:
        return "--prompt", typed
    if file is not None:
        return Path(file).name, read_file(file)
    return OWN_TEXT.name, read_file(str(OWN_TEXT))


def _known(layers: tuple[int, ...], reading: Reading) -> tuple[int, ...]:
    last = reading.run.config.n_layers - 1
    for layer in layers:
        if layer > last:
            raise UsageError(f"--layer {layer}: {reading.name} has layers 0 to {last}")
    return layers
