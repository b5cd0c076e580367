"""mixlocal plan"""

from __future__ import annotations

from dataclasses import asdict, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import click

from mixlocal.cli.options import Globals, json_option, pass_globals, run_options, runtime_options
from mixlocal.cli.render import pace, print_json, print_table, safe_text, size

if TYPE_CHECKING:
    from rich.table import Table

    from mixlocal.app.planning import Outlook
    from mixlocal.experts.forecast import Forecast


@click.command()
@click.argument("model", default="smolmix")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences decoded at once.")
@runtime_options
@json_option
@pass_globals
def plan(options: Globals, /, model: str, batch: int, **given: Any) -> None:
    """Tell what of MODEL would lie where on this machine, and how fast it would answer.

    MODEL may be installed, a name of the catalogue, or a folder that holds no more than a config.json: nothing is
    fetched and nothing is loaded.
    """
    from mixlocal.app.planning import find_subject, look_into

    folders = options.folders()
    outlook = look_into(find_subject(model, folders), replace(run_options(given), sequences=batch), folders)
    if options.as_json:
        print_json(_as_dict(outlook))
    else:
        _print(options, outlook)


def _print(options: Globals, outlook: Outlook) -> None:
    plan, hardware = outlook.plan, outlook.hardware
    gpus = ", ".join(f"{gpu.name} with {size(gpu.free)} free" for gpu in hardware.gpus) or "no GPU"
    print(safe_text(f"{plan.name} on {hardware.cores} cores, {size(hardware.ram_free)} of memory free, {gpus}"))
    print()
    print_table(options, _table(outlook))
    print()
    for line in (_verdict(outlook), *_speed(outlook)):
        print(safe_text(line))


def _table(outlook: Outlook) -> Table:
    from rich.table import Table

    plan = outlook.plan
    rows: list[tuple[str, str, int]] = []
    here = "GPU" if plan.on_gpu else "memory"
    several = f" that {plan.sequences} sequences of at most {plan.context} share" if plan.sequences > 1 else ""
    cache = f"{plan.kv_tokens} tokens{several}"
    if plan.on_gpu:
        rows += [(f"{here}: experts", str(plan.gpu_slots), (plan.gpu_slots + plan.staging_slots) * plan.record_bytes)]
    rows += [
        (f"{here}: attention, router, embeddings", "", plan.trunk_bytes),
        (f"{here}: KV cache, {cache}", "", plan.kv_bytes),
        (f"{here}: temporaries of {plan.chunk} tokens at once", "", plan.scratch_bytes),
        ("memory: interpreter and libraries", "", plan.base_bytes),
        ("memory: experts", str(plan.ram_slots), plan.ram_expert_bytes),
        ("memory in all", "", plan.ram_bytes),
        ("disk: the other experts", str(plan.disk_records), plan.disk_records * plan.record_bytes),
    ]
    table = Table(box=None, pad_edge=False)
    for heading in ("WHERE", "EXPERTS", "BYTES"):
        table.add_column(heading, justify="left" if heading == "WHERE" else "right")
    for where, experts, nbytes in rows:
        table.add_row(where, experts, size(nbytes) if nbytes else "-")
    return table


def _verdict(outlook: Outlook) -> str:
    plan = outlook.plan
    if not plan.disk_records:
        return f"It fits: all {plan.n_records} experts stay in memory."
    whole = ceil(plan.ram_for_all / 1e6)
    return (
        f"It runs with {plan.ram_slots + plan.gpu_slots} of {plan.n_records} experts at hand and reads the others "
        f"when they are chosen; --ram {whole}M --ctx {plan.context} would hold them all."
    )


def _speed(outlook: Outlook) -> tuple[str, ...]:
    found = outlook.forecast
    if found is None:
        return (f"How fast is not known: {outlook.unmeasured}.",)
    speeds, look = found.speeds, found.look
    lines = [
        f"Expected: {pace(found.tokens_per_s)}"
        + (f" of {speeds.sequences} sequences together" if speeds.sequences > 1 else ""),
        f"  arithmetic {found.compute_s * 1e3:.1f} ms: {look.n_layers} layers x {speeds.layer * 1e3:.2f} ms "
        f"+ {speeds.rest * 1e3:.2f} ms, measured here on random weights of these widths",
    ]
    if found.disk_s:
        lines.append(_disk_line(outlook, found))
    return tuple(lines)


def _disk_line(outlook: Outlook, found: Forecast) -> str:
    look, record = found.look, found.speeds.record or 0.0
    source = "as earlier runs found" if look.learnt else "as if all were equally likely"
    return (
        f"  disk {found.disk_s * 1e3:.0f} ms: {look.experts:.0f} experts x {100 * (1 - look.found):.0f} % not at hand "
        f"({source}) x {record * 1e3:.2f} ms for {size(outlook.plan.record_bytes)}, "
        f"{size(outlook.plan.record_bytes / record)}/s, {outlook.disk}"
    )


def _as_dict(outlook: Outlook) -> dict[str, Any]:
    plan = outlook.plan
    return {
        "model": outlook.subject.name, "variant": outlook.subject.variant,
        "installed": outlook.subject.store is not None,
        "hardware": asdict(outlook.hardware),
        "plan": asdict(plan)
        | {"disk_records": plan.disk_records, "ram_bytes": plan.ram_bytes, "vram_bytes": plan.vram_bytes},
        "forecast": asdict(outlook.forecast) if outlook.forecast else None,
        "unmeasured": outlook.unmeasured or None,
    }  # fmt: skip
