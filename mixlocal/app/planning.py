"""What `plan` tells: what of a model lies where on this machine, how fast it will be, and what would change that."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixlocal.app.budgets import RunOptions, check_context, check_top_k, plan_run
from mixlocal.app.catalog import DEFAULT_VARIANT, Variant, find_entry, is_folder, recipe_for, split_variant
from mixlocal.app.footprint import model_bytes, stored_bytes, with_shorter_passes
from mixlocal.app.hardware import Hardware, probe
from mixlocal.app.installed import find_store
from mixlocal.app.model_run import kv_dtype, store_config
from mixlocal.app.rehearsal import rehearsal_bytes, rehearse
from mixlocal.errors import NotFoundError
from mixlocal.experts.forecast import Forecast, Speeds, forecast, look_up
from mixlocal.experts.plan import MemoryPlan, ModelBytes
from mixlocal.experts.profile import load_profile
from mixlocal.kernels.isa import set_threads
from mixlocal.model.arch import read_config
from mixlocal.model.config import ModelConfig
from mixlocal.model.tensors import EXPERT_PARTS, expert_shape
from mixlocal.store.disk_speed import record_seconds
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.manifest import MANIFEST, Recipe
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home
from mixlocal.store.strict_json import read_json_object

PAUSE = 0.001  # seconds of arithmetic between two reads


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is planned for; store: None where no more than its config.json is known."""

    name: str
    variant: str
    config: ModelConfig
    recipe: Recipe
    store: ModelStore | None

    def nbytes(self, dtype: torch.dtype) -> tuple[ModelBytes, ...]:
        """See `with_shorter_passes`."""
        if self.store is not None:
            needs = stored_bytes(self.store.manifest, self.config, dtype)
        else:
            needs = model_bytes(f"{self.name}:{self.variant}", self.config, self.recipe, dtype)
        return with_shorter_passes(needs, self.config, self.recipe)


@dataclass(frozen=True, slots=True)
class Outlook:
    """forecast: None where it was not measured; `unmeasured` says why. disk: where the disk's speed was measured."""

    subject: Subject
    hardware: Hardware
    plan: MemoryPlan
    forecast: Forecast | None
    disk: str
    unmeasured: str = ""


def find_subject(model: str, folders: Home) -> Subject:
    """An installed model, a folder with a config.json, or a catalogue name. Raises `NotFoundError`."""
    name, variant = split_variant(model)
    path = Path(name).expanduser()
    if is_folder(name) and path.is_dir() and not (path / MANIFEST).is_file() and (path / "config.json").is_file():
        config = read_config(read_json_object(path / "config.json"), str(path / "config.json"))
        return _bare(path.absolute().name, variant, config)
    try:
        store = ModelStore.open(find_store(model, folders))
    except NotFoundError:
        entry = find_entry(name)
        if entry is None or entry.config is None:
            raise
        return _bare(name, variant or entry.variant, read_config(entry.config, f"models.toml: {name}"))
    manifest = store.manifest
    return Subject(manifest.name, manifest.variant, store_config(store), manifest.recipe, store)


def look_into(subject: Subject, options: RunOptions, folders: Home) -> Outlook:
    """Plan and measure. Raises `MemoryBudgetError` if it cannot run, `UsageError` for an option it does not have."""
    config = subject.config
    check_context(config, options.context)
    check_top_k(config, options.experts_per_token)
    router = replace(config.router, top_k=options.experts_per_token or config.router.top_k)
    hardware = probe(folders.models)
    set_threads(hardware.cores if options.threads is None else options.threads)
    plan = plan_run(subject.nbytes(kv_dtype(options.kv_dtype)), hardware, options)
    look = look_up(plan, config.n_layers, router.top_k, _learnt_hits(subject, plan, folders))
    if plan.on_gpu:
        return Outlook(subject, hardware, plan, None, "", "with a GPU this version does not measure it")
    needed = rehearsal_bytes(config, subject.recipe)
    if needed > hardware.ram_free // 2:
        return Outlook(subject, hardware, plan, None, "", f"measuring takes {needed / 1e9:.1f} GB of memory")
    speeds, disk = measure_speeds(replace(subject, config=replace(config, router=router)), plan)
    found = forecast(look, speeds)
    return Outlook(subject, hardware, plan, found, disk, "" if found else "nothing to measure the disk's speed with")


def measure_speeds(subject: Subject, plan: MemoryPlan) -> tuple[Speeds, str]:
    """As they are now; and of what file the disk's speed is, for people."""
    times = rehearse(subject.config, subject.recipe, plan.sequences)
    record, disk = _record_time(subject, plan)
    return Speeds(plan.sequences, times.layer, times.rest, record), disk


def _bare(name: str, variant: Variant | None, config: ModelConfig) -> Subject:
    """Raises `RefusedError` for widths that the variant cannot be made of."""
    variant = variant or DEFAULT_VARIANT
    recipe = recipe_for(variant)
    for part in EXPERT_PARTS:
        recipe.expert_spec.check_shape(f"{name}:{variant}: {part}", expert_shape(config, part))
    return Subject(name, variant, config, recipe, None)


def _learnt_hits(subject: Subject, plan: MemoryPlan, folders: Home) -> float | None:
    """Share of look-ups found in memory; None where nothing was learnt, or the model is not here to learn of."""
    if subject.store is None:
        return None
    n_layers, n_experts = subject.config.n_layers, subject.config.router.n_experts
    profile = load_profile(folders.profile(subject.name, subject.variant), n_layers, n_experts)
    return profile.expected_hits(plan.share) if profile else None


def _record_time(subject: Subject, plan: MemoryPlan) -> tuple[float | None, str]:
    """Seconds of a record's read, as the runtime would read it; and of what file, for people."""
    if not plan.disk_records:
        return None, ""
    if subject.store is not None:
        how = "past the page cache" if plan.direct_io else "where the page cache may help"
        path = subject.store.folder / EXPERTS_FILE
        seconds = record_seconds(path, plan.record_bytes, direct=plan.direct_io, pause=PAUSE)
        return seconds, f"measured on the model itself, {how}"
    library = _large_file()
    if library is None:
        return None, ""
    piece = min(plan.record_bytes, library.stat().st_size // 4 // 4096 * 4096)
    seconds = record_seconds(library, piece, direct=True, pause=PAUSE)
    scaled = seconds * plan.record_bytes / piece if seconds else None
    return scaled, "measured on the disk that PyTorch lies on"


def _large_file() -> Path | None:
    """Something to read where no model is: PyTorch's largest library."""
    libraries = sorted((Path(torch.__file__).parent / "lib").glob("*"), key=lambda path: path.stat().st_size)
    return libraries[-1].resolve() if libraries and sys.platform != "win32" else None
