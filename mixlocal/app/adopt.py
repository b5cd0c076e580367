"""A finished store of unquantized weights as the source of a quantized one: nothing is downloaded twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mixlocal.app.blueprint import Blueprint
from mixlocal.app.catalog import SmolmixSource, find_entry, is_folder, split_variant
from mixlocal.app.installed import find_store
from mixlocal.errors import CorruptError, NotFoundError, RefusedError, UsageError
from mixlocal.store.checkpoint import TensorRef, read_header
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.manifest import MANIFEST
from mixlocal.store.model_store import TRUNK_FILE, ModelStore
from mixlocal.store.paths import Home
from mixlocal.store.pieces import expert_piece
from mixlocal.store.strict_json import read_json_object


@dataclass(frozen=True, slots=True)
class AdoptedStore:
    """What `Checkpoint` tells of a checkpoint folder; the tensors have the names that a checkpoint gives them."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorRef]


def find_unquantized(target: str, folders: Home) -> ModelStore | None:
    """The store that `target` names, if it names one: by folder, by name:variant, or by the name of a bf16 variant that
    is installed. None: a checkpoint folder, or a model that is made from elsewhere.

    Raises `NotFoundError`; `RefusedError` if its weights are quantized already, for what is lost does not come back.
    """
    folder = _store_folder(target, folders)
    if folder is None:
        return None
    store = ModelStore.open(folder)
    if not _is_unquantized(store):
        raise RefusedError(
            f"{folder}: its weights are quantized already", "only a bf16 store or a checkpoint can be quantized"
        )
    return store


def store_as_checkpoint(store: ModelStore) -> AdoptedStore:
    """The weights an unquantized store was made of; it must have been verified. Raises `CorruptError`."""
    assert _is_unquantized(store)
    path = store.folder / "config.json"
    config = read_json_object(path)
    blueprint = Blueprint.of(config, str(path), store.manifest.recipe)
    found = {ref.name: ref for ref in (*read_header(store.folder / TRUNK_FILE), *_expert_refs(store, blueprint))}
    missing = next((name for name in blueprint.sources.values() if name not in found), None)
    if missing is not None:
        raise CorruptError(f"{store.folder}: {missing} is missing", "remove the model and pull it again")
    tensors = {source: replace(found[name], name=source) for source, name in blueprint.sources.items()}
    return AdoptedStore(store.folder, config, tensors)


def _store_folder(target: str, folders: Home) -> Path | None:
    path = Path(target).expanduser()
    if path.is_dir() and is_folder(target):
        return path if (path / MANIFEST).is_file() else None
    name, variant = split_variant(target)
    if variant is not None:
        return find_store(target, folders)
    entry = find_entry(name)
    if entry is not None and isinstance(entry.source, SmolmixSource):
        return None
    try:
        return find_store(f"{target}:bf16", folders)
    except (NotFoundError, UsageError):
        return None


def _is_unquantized(store: ModelStore) -> bool:
    return (store.manifest.recipe.experts, store.manifest.recipe.attention) == ("bf16", "bf16")


def _expert_refs(store: ModelStore, blueprint: Blueprint) -> Iterator[TensorRef]:
    layouts, path = blueprint.layouts, store.folder / EXPERTS_FILE
    layout = layouts[0]  # nothing is written otherwise in a store of unquantized weights
    places = {part.name.removesuffix(".codes"): part for part in layout.parts if part.nbytes}
    for index in range(len(store.manifest.records)):
        layer, expert = divmod(index, store.manifest.n_experts)
        for part, shape in layout.shapes.items():
            offset = layouts.offsets[index] + places[part].offset
            name = expert_piece(layer, expert, part)
            yield TensorRef(name, path, torch.bfloat16, shape, offset, places[part].nbytes)
