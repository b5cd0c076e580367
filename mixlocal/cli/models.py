"""mixlocal ls, show, verify, rm: what is on this machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from mixlocal.cli.options import Globals, json_option, pass_globals
from mixlocal.cli.render import count, print_json, print_table, safe_text, say, show_progress, size, warn
from mixlocal.errors import MixlocalError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from mixlocal.app.describe import Description
    from mixlocal.app.progress import Progress
    from mixlocal.app.prune import Leftover
    from mixlocal.store.model_store import ModelStore


@click.command()
@click.option("--all", "everything", is_flag=True, help="Also the models that could be pulled.")
@json_option
@pass_globals
def ls(options: Globals, everything: bool) -> None:
    """List the models on this machine."""
    from mixlocal.app.catalog import read_catalog
    from mixlocal.store.model_store import find_stores

    rows: list[dict[str, Any]] = []
    for store in find_stores(options.folders().models):
        if isinstance(store, MixlocalError):
            warn(options, store.message)
        else:
            m = store.manifest
            rows.append(
                {"model": m.name, "variant": m.variant, "bytes": m.nbytes, "source": m.source.name, "installed": True}
            )
    if everything:
        known = {row["model"] for row in rows}
        rows += [
            {"model": name, "variant": entry.variant, "bytes": None, "source": entry.description, "installed": False}
            for name, entry in read_catalog().items() if name not in known
        ]  # fmt: skip
    if options.as_json:
        print_json(rows)
    elif rows:
        _print_models(options, rows)
    else:
        say(options, "no models yet; get one with: mixlocal pull smolmix")


@click.command()
@click.argument("model", default="smolmix")
@click.option("--layout", is_flag=True, help="Also the record of one expert, part by part.")
@click.option("--template", is_flag=True, help="Only the chat template.")
@json_option
@pass_globals
def show(options: Globals, model: str, layout: bool, template: bool) -> None:
    """Explain MODEL: its parameters, where they sit, what it takes.

    MODEL may be an installed model, a name of the catalogue, or a folder that holds no more than a config.json.
    """
    from mixlocal.app.describe import describe

    description = describe(model, options.folders())
    if options.as_json:
        print_json(description.as_dict())
    elif template:
        print(safe_text(description.template))
    else:
        _print_description(options, description, layout)


@click.command()
@click.argument("model")
@json_option
@pass_globals
def verify(options: Globals, model: str) -> None:
    """Read every byte of MODEL and check it."""
    store = _find(options, model)
    checked = show_progress(options, _verification(store))
    say(options, f"{store.manifest.name}:{store.manifest.variant} is whole: {size(checked)} checked")
    if options.as_json:
        print_json({"model": store.manifest.name, "variant": store.manifest.variant, "bytes": checked, "whole": True})


@click.command()
@click.argument("model")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@pass_globals
def rm(options: Globals, model: str, yes: bool) -> None:
    """Remove MODEL from this machine."""
    from mixlocal.app.install import remove
    from mixlocal.app.installed import find_store
    from mixlocal.store.durable import folder_bytes

    folder = find_store(model, options.folders())
    nbytes = folder_bytes(folder)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(f"removing {model} needs --yes when nobody can be asked")
        click.confirm(f"Remove {folder} ({size(nbytes)})?", abort=True, err=True)
    remove(folder)
    say(options, f"removed {folder}, {size(nbytes)}")


@click.command()
@click.option("--unfinished", is_flag=True, help="Also what an interrupted pull or quantize could go on from.")
@click.option("--dry-run", is_flag=True, help="Only tell.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_globals
def prune(options: Globals, unfinished: bool, dry_run: bool, yes: bool) -> None:
    """Free the disk of what no model needs: downloads of finished models, damaged files, remains of crashes."""
    from mixlocal.app.prune import find_leftovers
    from mixlocal.app.prune import prune as remove_leftover

    found = [(leftover, leftover.nbytes) for leftover in find_leftovers(options.folders())]
    chosen = [(leftover, nbytes) for leftover, nbytes in found if unfinished or not leftover.unfinished]
    for leftover, nbytes in found:
        kept = "" if (leftover, nbytes) in chosen else " (kept; --unfinished takes it too)"
        say(options, f"{size(nbytes)}  {leftover.what}{kept}")
    if chosen and not dry_run:
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("pruning needs --yes when nobody can be asked")
            click.confirm(f"Remove {size(sum(nbytes for _, nbytes in chosen))}?", abort=True, err=True)
        chosen = [(leftover, nbytes) for leftover, nbytes in chosen if _removed(options, leftover, remove_leftover)]
    freed = sum(nbytes for _, nbytes in chosen)
    say(options, f"{'would free' if dry_run else 'freed'} {size(freed)}")
    if options.as_json:
        print_json({"freed": 0 if dry_run else freed, "found": [{"what": lo.what, "bytes": n} for lo, n in found]})


def _removed(options: Globals, leftover: Leftover, remove: Callable[[Leftover], bool]) -> bool:
    if remove(leftover):
        return True
    warn(options, f"{leftover.what}: somebody is at work there, left alone")
    return False


def _find(options: Globals, model: str) -> ModelStore:
    from mixlocal.app.installed import find_store
    from mixlocal.store.manifest import read_manifest
    from mixlocal.store.model_store import ModelStore

    folder = find_store(model, options.folders())
    return ModelStore(folder, read_manifest(folder))


def _verification(store: ModelStore) -> Generator[Progress, None, int]:
    from mixlocal.app.progress import Progress

    total = 0
    for done, total in store.verify():
        yield Progress("verify", done, total)
    return total


def _print_models(options: Globals, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("MODEL", "VARIANT", "SIZE", "FROM"):
        table.add_column(heading, justify="right" if heading == "SIZE" else "left")
    for row in rows:
        stored = size(row["bytes"]) if row["installed"] else "-"
        table.add_row(*(safe_text(cell) for cell in (row["model"], row["variant"], stored, row["source"])))
    print_table(options, table)


def _print_description(options: Globals, description: Description, layout: bool) -> None:
    from rich.table import Table

    for line in description.head:
        print(safe_text(line))
    if description.parts:
        table = Table(box=None, pad_edge=False)
        for heading in ("PART", "PARAMETERS", "PER TOKEN"):
            table.add_column(heading, justify="left" if heading == "PART" else "right")
        for part in description.parts:
            table.add_row(part.name, count(part.total), count(part.active))
        table.add_row("all", count(description.total), count(description.active))
        print()
        print_table(options, table)
    for line in ("", *description.explanation, *(description.layout if layout else ())):
        print(safe_text(line))
