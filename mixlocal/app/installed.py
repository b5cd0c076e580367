"""Where a model that the user names lies."""

from __future__ import annotations

from pathlib import Path

from mixlocal.app.catalog import VARIANTS, find_entry, is_folder, split_variant
from mixlocal.app.reference import known_repository, store_name
from mixlocal.errors import NotFoundError
from mixlocal.store.manifest import MANIFEST
from mixlocal.store.paths import Home
from mixlocal.store.repo_names import is_repository


def find_store(model: str, folders: Home) -> Path:
    """The store folder for a name, name:variant or folder; a bare name prefers the variant of the catalogue.

    Raises `NotFoundError` saying what to do.
    """
    name, variant = split_variant(model)
    if not is_folder(name) and is_repository(name):
        name = known_repository(name) or store_name(name)
    entry = find_entry(name)
    installed = not is_folder(name) or ("/" not in name and (folders.models / name).is_dir())
    if not installed:
        return _store_in(Path(name).expanduser(), variant)
    preferred = [entry.variant] if entry else []
    for candidate in [variant] if variant else [*preferred, *VARIANTS]:
        if (folders.store(name, candidate) / MANIFEST).is_file():
            return folders.store(name, candidate)
    if entry is None and not (folders.models / name).is_dir() and "/" not in model:
        raise NotFoundError(f"no model is called {name}", "see: mixlocal ls --all")
    raise NotFoundError(f"{model} is not installed", f"get it with: mixlocal pull {model}")


def _store_in(path: Path, variant: str | None) -> Path:
    for folder in (path, path / (variant or "")):
        if (folder / MANIFEST).is_file():
            return folder
    if (path / "config.json").is_file():
        raise NotFoundError(f"{path}: a checkpoint, not yet quantized", f"run: mixlocal quantize {path}")
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such folder")
    raise NotFoundError(f"{path}: neither a model store nor a checkpoint (no config.json)")
