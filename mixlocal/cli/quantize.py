"""mixlocal quantize"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mixlocal.cli.options import Globals, json_option, pass_globals
from mixlocal.cli.render import print_json, say, show_progress, size
from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from mixlocal.app.catalog import Variant
    from mixlocal.app.quality.text import Text
    from mixlocal.store.manifest import Recipe

VARIANT_OF: dict[str, Variant] = {
    "nf4": "q4", "fp4": "q4", "int4": "int4", "int4-32": "int4-32", "int8": "q8", "bf16": "bf16"
}  # fmt: skip
BITS_OF = {"nf4": "4", "fp4": "4", "int4": "4", "int4-32": "4", "int8": "8", "bf16": "16"}
BY_BITS = {"4": "nf4", "8": "int8", "16": "bf16"}
OWN_TEXT = "-"  # no file's name


@click.command()
@click.argument("model")
@click.option("--bits", type=click.Choice(["4", "8", "16"]), help="4: nf4.  8: int8.  16: experts stay bfloat16.")
@click.option("--method", "--experts", type=click.Choice(list(VARIANT_OF)), help="The experts' format, by name.")
@click.option("--attention", type=click.Choice(["bf16", "int8"]), default="bf16", show_default=True,
              help="Attention, embeddings and output head.")  # fmt: skip
@click.option(
    "--scales", type=click.Choice(["16", "32"]), default="16", show_default=True, help="Bits of a 4-bit block's scale."
)
@click.option("--plain", is_flag=True, help="4 bits: scales that span each block, not those that lose least.")
@click.option(
    "--calibrate", is_flag=False, flag_value=OWN_TEXT, metavar="[FILE]",
    help="4 bits: let what a text asks of the experts decide which columns count. Without FILE, stand it behind MODEL: "
    "then it is mixlocal's own text.",
)  # fmt: skip
@click.option(
    "--fit", metavar="SIZE", help="As `--calibrate`, and 8 bits for the matrices that need them most, up to SIZE."
)
@click.option("--out", type=click.Path(), metavar="DIR", help="Write the store here and not among the models.")
@click.option("--fresh", is_flag=True, help="Start over, and replace a finished store.")
@click.option("--keep-source", is_flag=True, help="smolmix: keep the unquantized checkpoint.")
@click.option("--report", type=click.Path(), metavar="FILE", help="Write the error of every tensor as JSON.")
@json_option
@pass_globals
def quantize(
    options: Globals, model: str, bits: str | None, method: str | None, attention: str, scales: str,
    plain: bool, calibrate: str | None, fit: str | None, out: str | None, fresh: bool, keep_source: bool,
    report: str | None,
) -> None:  # fmt: skip
    """Quantize MODEL into a model store: a checkpoint folder in Hugging Face format, smolmix, or a bf16 store.

    Memory holds about one tensor, whatever the model's size. May be killed at any moment; the same command goes on
    behind the last tensor that was finished and gives the same bytes.
    """
    from mixlocal.app.install import QuantizeRequest, quantize_model
    from mixlocal.app.quantize import describe_errors
    from mixlocal.store.manifest import Recipe

    kind = _kind(bits, method)
    text = _text(calibrate, fit)
    recipe = Recipe(experts=kind, scale_bits=int(scales), attention=attention)  # type: ignore[arg-type]
    recipe = _refined(recipe, fit, text, plain=plain)
    variant = VARIANT_OF[kind] if fit is None else "mix"
    request = QuantizeRequest(
        model, variant, recipe, Path(out) if out else None, fresh=fresh, keep_source=keep_source, text=text
    )
    store = show_progress(options, quantize_model(request, options.folders()))
    errors = describe_errors(store.manifest)
    if report:
        _write_report(Path(report), errors)
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    say(options, f"{store.folder}: {size(store.manifest.nbytes)}, relative error {mean:.4f} on average, "
                 f"{errors[worst]:.4f} at worst ({worst})")  # fmt: skip
    if options.as_json:
        print_json({"folder": str(store.folder), "bytes": store.manifest.nbytes, "mean_error": mean, "errors": errors})


def _kind(bits: str | None, method: str | None) -> str:
    if bits and method and BITS_OF[method] != bits:
        raise UsageError(f"--bits {bits} and --method {method} contradict each other")
    return method or BY_BITS[bits or "4"]


def _text(calibrate: str | None, fit: str | None) -> Text | None:
    """What to calibrate on, if that is asked for; read once, for it may be a pipe."""
    from mixlocal.app.calibration import calibration_text

    if calibrate is None and fit is None:
        return None
    return calibration_text(None if calibrate in (None, OWN_TEXT) else Path(calibrate or ""))


def _refined(recipe: Recipe, fit: str | None, text: Text | None, *, plain: bool) -> Recipe:
    """With what goes beyond a format. Raises `UsageError` for what would change nothing."""
    import msgspec

    from mixlocal.app.catalog import is_searched

    searchable = is_searched(recipe.experts)
    if not searchable and (plain or text):
        hint = "--plain, --calibrate and --fit go with 4 bits"
        raise UsageError(f"{recipe.experts} has no scales of blocks to choose", hint)
    if text and plain and fit is None:
        raise UsageError("--plain leaves --calibrate nothing to do")
    return msgspec.structs.replace(
        recipe, search=searchable and not plain,
        calibrated_on=text.sha256 if text else None, fit=None if fit is None else _fit_bytes(fit),
    )  # fmt: skip


def _fit_bytes(fit: str) -> int:
    from mixlocal.app.sizes import parse_size

    if "%" in fit:  # of what?
        raise UsageError(f"--fit {fit!r} is no size", "for example 12G or 11GiB")
    return parse_size("--fit", fit, 0)


def _write_report(path: Path, errors: dict[str, float]) -> None:
    from mixlocal.store.durable import write_file

    write_file(path.absolute(), (json.dumps(errors, indent=1) + "\n").encode())
