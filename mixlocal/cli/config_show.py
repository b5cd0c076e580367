"""What `mixlocal config show` prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mixlocal.app.config import read_config, shown
from mixlocal.cli.config_rows import (
    ModelDefaults,
    Row,
    check_file,
    effective_model,
    every_setting,
    table_of,
    unknown_variables,
)
from mixlocal.cli.flags import own_settings
from mixlocal.cli.options import Globals
from mixlocal.cli.render import print_json, print_table, safe_text, warn

if TYPE_CHECKING:
    from rich.table import Table


def show_config(options: Globals, ctx: click.Context) -> None:
    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    file = read_config(options.config_file(), required=options.config is not None)
    check_file(file, root)
    settings, typed = every_setting(root), _typed(ctx)
    rows = table_of(settings, file, typed, _defaults(typed.get("model") or effective_model(settings, file)))
    warnings = unknown_variables(settings)
    if options.as_json:
        print_json({"folders": _folders(options), "settings": [_as_dict(row) for row in rows], "warnings": warnings})
        return
    for name, path in _folders(options).items():
        absent = "" if Path(path).exists() else " (not there)"
        print(safe_text(f"{name:<7} {path}{absent}"))
    print()
    print_table(options, _table(rows))
    for line in warnings:
        warn(options, line)


def _typed(ctx: click.Context | None) -> dict[str, Any]:
    """The flags of this very command line."""
    found: dict[str, Any] = {}
    while ctx is not None:
        for setting in own_settings(ctx.command, ()):
            name = setting.parameter.name or ""
            if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                found[setting.name] = ctx.params.get(name, True)  # --json is not kept there
        ctx = ctx.parent
    return found


def _defaults(model: str | None) -> ModelDefaults:
    """Raises `UsageError` for a variant that we do not make; a model nobody knows has no defaults of its own."""
    import msgspec

    from mixlocal.app.catalog import DEFAULT_MODEL, find_entry, split_variant
    from mixlocal.engine.params import SamplingParams

    name, _ = split_variant(model or DEFAULT_MODEL)
    entry = find_entry(name)
    given = msgspec.to_builtins(entry.sampling) if entry else {}
    recommended = {field: value for field, value in given.items() if value is not None}
    return ModelDefaults(name, recommended, asdict(SamplingParams()) | {"model": DEFAULT_MODEL})


def _folders(options: Globals) -> dict[str, str]:
    folders = options.folders()
    return {
        "config": str(options.config_file()), "data": str(folders.data),
        "cache": str(folders.cache), "state": str(folders.state),
    }  # fmt: skip


def _as_dict(row: Row) -> dict[str, Any]:
    return {"name": row.name, "value": row.value, "from": row.origin.kind, "origin": row.origin.text}


def _table(rows: list[Row]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("SETTING", "VALUE", "FROM"):
        table.add_column(heading)
    for row in rows:
        value = "-" if row.value in (None, (), []) else row.value if isinstance(row.value, str) else shown(row.value)
        cells = (row.name, " ".join(value.split()) or '""', row.origin.text)
        table.add_row(*(Text(safe_text(cell)) for cell in cells))
    return table
