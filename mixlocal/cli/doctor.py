"""mixlocal doctor"""

from __future__ import annotations

from dataclasses import asdict

import click

from mixlocal.cli.options import Globals, json_option, pass_globals
from mixlocal.cli.render import print_json, print_table, safe_text


@click.command()
@json_option
@pass_globals
def doctor(options: Globals) -> None:
    """Check this machine and say what each lack costs."""
    from mixlocal.app.checkup import checkup

    findings = checkup(options.folders())
    if options.as_json:
        print_json([asdict(finding) for finding in findings])
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        mark = {"good": "[green]ok[/]", "lack": "[yellow]lack[/]", "bad": "[red]bad[/]"}[finding.verdict]
        cost = f"\n{finding.cost}" if finding.cost else ""
        table.add_row(mark, finding.what, safe_text(finding.found) + cost)
    print_table(options, table)
