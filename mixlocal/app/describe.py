"""What `show` tells of a model, in words: from a store, a catalogue entry, or a config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlocal.app.catalog import CatalogEntry, find_entry, is_folder, split_variant
from mixlocal.app.installed import find_store
from mixlocal.app.parameters import Part, count_parameters, one_expert_model, total_and_active
from mixlocal.app.templates import describe_template
from mixlocal.errors import NotFoundError
from mixlocal.model.arch import read_config
from mixlocal.model.config import ModelConfig
from mixlocal.store.manifest import MANIFEST, Manifest, read_manifest
from mixlocal.store.paths import Home
from mixlocal.store.strict_json import read_json_object


@dataclass(frozen=True, slots=True)
class Description:
    """Lines for people and the numbers behind them. parts is empty where only the catalogue is known."""

    name: str
    head: tuple[str, ...]
    total: int
    active: int
    parts: tuple[Part, ...] = ()
    explanation: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()
    template: str = ""

    def as_dict(self) -> dict[str, Any]:
        parts = {part.name: {"total": part.total, "active": part.active} for part in self.parts}
        return {"model": self.name, "total": self.total, "active": self.active, "parts": parts, "text": list(self.head)}


def describe(model: str, folders: Home) -> Description:
    """Raises `NotFoundError` if there is neither a store, nor a config.json, nor a catalogue entry."""
    name, variant = split_variant(model)
    path = Path(name).expanduser()
    entry = find_entry(name)
    if is_folder(name) and path.is_dir() and not (path / MANIFEST).is_file() and variant is None:
        if not (path / "config.json").is_file():
            raise NotFoundError(f"{path}: no config.json", "give a folder in Hugging Face format")
        return _from_config(path, path.absolute().name)
    try:
        folder = find_store(model, folders)
    except NotFoundError:
        if entry is None:
            raise
        return _from_entry(name, entry)
    return _from_store(folder, entry)


def explain(config: ModelConfig) -> tuple[str, ...]:
    """Why "8 x 7B" is neither 56 B parameters nor 56 B of work."""
    total, active = total_and_active(config)
    router, single = config.router, one_expert_model(config)
    if router.n_experts == 1:
        return ()
    return (
        f"Each of the {config.n_layers} layers has {router.n_experts} experts; a token passes through {router.top_k}.",
        f"With one expert a layer it would be a {_count(single)} model. {router.n_experts} x {_count(single)} is "
        f"{_count(router.n_experts * single)},",
        f"but only the experts, the feed-forward networks, exist {router.n_experts} times: attention and embeddings",
        f"are shared. So {_count(total)} are stored, and {_count(active)} take part in computing one token.",
    )


def _from_config(folder: Path, name: str) -> Description:
    path = folder / "config.json"
    config = read_config(read_json_object(path), str(path))
    total, active = total_and_active(config)
    head = (f"{name}: {_sizes(total, active)}", _shape(config))
    return Description(
        name, head, total, active, count_parameters(config), explain(config), template=describe_template(folder, None)
    )


def _from_entry(name: str, entry: CatalogEntry) -> Description:
    total, active = entry.parameters.total, entry.parameters.active
    head = [f"{name}: {entry.description}", _sizes(total, active), f"licence {entry.licence} · not installed"]
    head += [entry.note] if entry.note else []
    return Description(name, tuple(head), total, active, template=entry.template or "the repository's own")


def _from_store(folder: Path, entry: CatalogEntry | None) -> Description:
    manifest = read_manifest(folder)
    path = folder / "config.json"
    config = read_config(read_json_object(path), str(path))
    total, active = total_and_active(config)
    head = [
        f"{manifest.name}:{manifest.variant}: {_sizes(total, active)}",
        _shape(config),
        f"experts {_formats(manifest)}, attention {manifest.recipe.attention}, router float32 · "
        f"{_gigabytes(manifest.nbytes)} on disk, {8 * manifest.nbytes / total:.2f} bits per parameter",
        f"from {manifest.source.name} · licence {manifest.licence or 'unknown'} · {folder}",
    ]
    head += [entry.note] if entry and entry.note else []
    return Description(
        manifest.name, tuple(head), total, active, count_parameters(config), explain(config), _layout(manifest),
        describe_template(folder, manifest.template),
    )  # fmt: skip


def _formats(manifest: Manifest) -> str:
    """Of the experts."""
    recipe = manifest.recipe
    wide = sum(mask.bit_count() for mask in recipe.wide)
    return f"{recipe.experts} ({wide} of {3 * len(recipe.wide)} matrices int8)" if wide else recipe.experts


def _layout(manifest: Manifest) -> tuple[str, ...]:
    layout = manifest.layouts.largest
    lines = [f"{part.offset:>12} {part.nbytes:>12}  {part.name}" for part in layout.parts]
    return (
        "",
        f"{'the largest' if len(manifest.layouts.formats) > 1 else 'one'} expert: {layout.nbytes} bytes in a record of "
        f"{layout.stride}",
        "      offset        bytes  part",
        *lines,
    )


def _shape(config: ModelConfig) -> str:
    window = f", sliding window {config.sliding_window}" if config.sliding_window else ""
    return (
        f"{config.architecture}, {config.n_layers} layers, {config.router.top_k} of {config.router.n_experts} "
        f"experts a token, dim {config.dim}, hidden {config.expert_hidden}, "
        f"{config.n_heads} heads ({config.n_kv_heads} kv), "
        f"vocabulary {config.vocab_size}, context {config.max_context}{window}"
    )


def _sizes(total: int, active: int) -> str:
    return f"{_count(total)} parameters, {_count(active)} active per token"


def _count(number: int) -> str:
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
