"""mixlocal pull"""

from __future__ import annotations

import click

from mixlocal.cli.options import Globals, json_option, pass_globals
from mixlocal.cli.render import print_json, say, show_progress, size


@click.command()
@click.argument("model")
@click.option("--keep-source", is_flag=True, help="Keep the unquantized checkpoint.")
@json_option
@pass_globals
def pull(options: Globals, model: str, keep_source: bool) -> None:
    """Get MODEL (a name of the catalogue, with an optional :q4, :q8 or :bf16), ready to run.

    May be stopped at any moment; the same command goes on where it was.
    """
    from mixlocal.app.catalog import split_variant
    from mixlocal.app.install import pull as install

    name, variant = split_variant(model)
    store = show_progress(options, install(name, variant, options.folders(), keep_source=keep_source))
    manifest = store.manifest
    say(options, f"{manifest.name}:{manifest.variant} is ready, {size(manifest.nbytes)} in {store.folder}")
    if options.as_json:
        print_json(
            {"model": manifest.name, "variant": manifest.variant, "bytes": manifest.nbytes, "folder": str(store.folder)}
        )
