"""mixlocal pull"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mixlocal.cli.options import Globals, json_option, pass_globals
from mixlocal.cli.render import pace, print_json, say, show_progress, size, warn
from mixlocal.errors import MixlocalError, UsageError

if TYPE_CHECKING:
    from mixlocal.app.pull.carry_out import PullOptions
    from mixlocal.app.pull.job import PullPlan
    from mixlocal.app.reference import HubModel
    from mixlocal.store.model_store import ModelStore


@click.command()
@click.argument("model")
@click.option("--revision", metavar="REV", help="A branch, a tag or a commit; as MODEL@REV.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be fetched, and whether it would fit and run.")
@click.option("--jobs", type=click.IntRange(1, 16), default=4, show_default=True, help="Files fetched at once.")
@click.option("--limit-rate", metavar="SIZE", help="Bytes per second over all of them: 10M.")
@click.option("--keep-source", is_flag=True, help="Keep the unquantized checkpoint too.")
@click.option("--force", is_flag=True, help="Begin even if disk or memory look too small.")
@click.option("--offline", is_flag=True, help="Use what is here and ask nobody.")
@click.option("--patience", metavar="SECONDS", type=click.FloatRange(1), default=600.0, show_default=True,
              help="Give up after so long without a new byte.")  # fmt: skip
@json_option
@pass_globals
def pull(
    options: Globals, model: str, revision: str | None, dry_run: bool, jobs: int, limit_rate: str | None,
    keep_source: bool, force: bool, offline: bool, patience: float,
) -> None:  # fmt: skip
    """Get MODEL ready to run: a name of the catalogue, org/repo[@revision] of the Hub, or a checkpoint folder, with an
    optional :q4, :q8 or :bf16.

    First tells what it takes. Experts are quantized as they land, and each finished shard is freed. May be stopped at
    any moment; the same command goes on at the byte where it was.
    """
    from mixlocal.app.catalog import is_folder, split_variant
    from mixlocal.app.reference import hub_model

    try:
        name, _ = split_variant(model)
        wanted = None if is_folder(name) else hub_model(model, revision)
        if wanted is None:
            if dry_run:
                raise UsageError(f"--dry-run is for models of the Hub; see: mixlocal plan {model}")
            store = _pull_local(options, model, keep_source)
        else:
            found = _pull_hub(
                options, wanted, _pull_options(jobs, limit_rate, keep_source), dry_run, force, offline, patience
            )
            if found is None:
                return
            store = found
    except KeyboardInterrupt:
        say(options, f"stopped; go on with: mixlocal {shlex.join(sys.argv[1:])}")
        raise
    manifest = store.manifest
    say(options, f"{manifest.name}:{manifest.variant} is ready, {size(manifest.nbytes)} in {store.folder}")
    if options.as_json:
        print_json(
            {"event": "ready", "model": manifest.name, "variant": manifest.variant, "bytes": manifest.nbytes,
             "revision": manifest.source.revision, "folder": str(store.folder)}
        )  # fmt: skip


def _pull_options(jobs: int, limit_rate: str | None, keep_source: bool) -> PullOptions:
    from mixlocal.app.pull.carry_out import PullOptions
    from mixlocal.app.sizes import parse_size

    rate = parse_size("--limit-rate", limit_rate, 0) if limit_rate else None
    if rate is not None and rate < 1:
        raise UsageError(f"--limit-rate {limit_rate}: not a number of bytes per second", "such as 10M")
    return PullOptions(jobs, rate, keep_source)


def _pull_local(options: Globals, model: str, keep_source: bool) -> ModelStore:
    from mixlocal.app.catalog import DEFAULT_VARIANT, is_folder, recipe_for, split_variant
    from mixlocal.app.install import QuantizeRequest, quantize_model
    from mixlocal.app.install import pull as install

    name, variant = split_variant(model)
    if is_folder(name):
        variant = variant or DEFAULT_VARIANT
        request = QuantizeRequest(name, variant, recipe_for(variant))
        return show_progress(options, quantize_model(request, options.folders()))
    return show_progress(options, install(name, variant, options.folders(), keep_source=keep_source))


def _pull_hub(
    options: Globals, model: HubModel, pull_options: PullOptions, dry_run: bool, force: bool, offline: bool,
    patience: float,
) -> ModelStore | None:  # fmt: skip
    """None after --dry-run."""
    from mixlocal.app.pull.job import PullJob

    job = PullJob.begin(model, options.folders(), pull_options, offline=offline, patience=patience)
    for text in job.warnings:
        warn(options, text)
    store = job.installed()
    if store is not None and not dry_run:
        return store
    ready = job.from_bf16()
    if ready is not None and not dry_run:
        say(options, f"{model.name}: made from its bf16 variant, which is here")
        return show_progress(options, ready, events=True)
    if not dry_run:
        job.check_writable()
    say(options, f"asking {job.host} about {model}" if job.host else f"looking for {model} on this machine")
    plan = show_progress(options, job.plan(), events=True)
    _tell_plan(options, plan)
    if dry_run:
        return None
    trouble = plan.trouble()
    if trouble is not None and not force:
        raise type(trouble)(trouble.message, f"{trouble.hint}; --force begins all the same".removeprefix("; "))
    return show_progress(options, job.run(plan.survey, plan.needs), events=True)


def _tell_plan(options: Globals, plan: PullPlan) -> None:
    if options.as_json:
        print_json({"event": "plan"} | _as_dict(plan))
        return
    for line in (_headline(plan), _network(plan), _disk(plan), *_running(plan)):
        say(options, line)


def _headline(plan: PullPlan) -> str:
    model, listing = plan.survey.model, plan.survey.listing
    return f"{listing.repository} at {listing.commit[:12]} -> {model.name}:{model.variant}"


def _network(plan: PullPlan) -> str:
    count = len(plan.survey.shards)
    return f"  network  {size(plan.needs.fetch)} to fetch, of {count} file{'s' if count != 1 else ''} with weights"


def _disk(plan: PullPlan) -> str:
    needs = plan.needs
    at_once = f"{needs.jobs} shard{'s' if needs.jobs != 1 else ''} at once"
    room = f"{size(needs.missing)} too little" if needs.missing else f"{size(needs.free)} free"
    return f"  disk     {size(needs.store)} in the end, {size(needs.peak)} at most with {at_once}; {room}"


def _running(plan: PullPlan) -> tuple[str, ...]:
    if plan.outlook is None:
        assert plan.outlook_error is not None
        return (f"  memory   it would not run here: {plan.outlook_error.message}",)
    memory, forecast = plan.outlook.plan, plan.outlook.forecast
    at_hand = memory.gpu_slots + memory.ram_slots
    experts = f"{at_hand} of {memory.n_records} experts, the others are read from disk when they are chosen"
    if not memory.disk_records:
        experts = f"all {memory.n_records} experts"
    speed = f"about {pace(forecast.tokens_per_s)}" if forecast else f"not known: {plan.outlook.unmeasured}"
    return f"  memory   {size(memory.ram_bytes)}: {experts}", f"  speed    {speed}"


def _as_dict(plan: PullPlan) -> dict[str, Any]:
    outlook, listing = plan.outlook, plan.survey.listing
    error = plan.outlook_error
    return {
        "model": plan.survey.model.name, "variant": plan.survey.model.variant,
        "repository": listing.repository, "revision": listing.commit, "files": len(plan.survey.shards),
        "disk": _needs(plan) | {"missing": plan.needs.missing},
        "memory": asdict(outlook.plan) if outlook else None,
        "tokens_per_s": outlook.forecast.tokens_per_s if outlook and outlook.forecast else None,
        "trouble": _trouble(plan.trouble()), "memory_trouble": _trouble(error),
    }  # fmt: skip


def _needs(plan: PullPlan) -> dict[str, Any]:
    return asdict(plan.needs) | {"where": str(plan.needs.where)}


def _trouble(error: MixlocalError | None) -> dict[str, Any] | None:
    return {"code": error.code, "message": error.message, "exit": error.exit_code} if error else None
