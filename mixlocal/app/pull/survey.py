"""What a pull will take, found out before it begins: files, hashes, shapes and disk, from listing and headers alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mixlocal.app.blueprint import Blueprint
from mixlocal.app.catalog import recipe_for
from mixlocal.app.reference import HubModel
from mixlocal.errors import CorruptError, NetworkError, NotFoundError, RefusedError
from mixlocal.store.checkpoint import (
    INDEX,
    MAX_INDEX_BYTES,
    SHARD_SUFFIX,
    TensorRef,
    add_tensors,
    check_index,
    data_start,
    read_weight_map,
    shard_names,
)
from mixlocal.store.checkpoint import tensor_refs as read_tensor_refs
from mixlocal.store.download import Event, Remote, fetch_bytes
from mixlocal.store.download_folder import DownloadFolder
from mixlocal.store.hf_cache import cached_copy, cached_listing
from mixlocal.store.http import Client
from mixlocal.store.hub import list_repository
from mixlocal.store.listing import Listing, RepoFile
from mixlocal.store.manifest import Recipe
from mixlocal.store.strict_json import parse_json_object

CONFIG = "config.json"
FIRST_BYTES = 1 << 14  # of a shard: holds the header of most
SMALL_LIMIT = 64 << 20
HEADER_READERS = 4


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file. header: its first bytes, up to the data; tensors: in the order of the file.
    copy: a file with these bytes that is here already, its hash unchecked."""

    file: RepoFile
    header: bytes
    tensors: tuple[TensorRef, ...]
    copy: Path | None


@dataclass(frozen=True, slots=True)
class Survey:
    """Everything that is known before the first shard. small: the files that are taken over as they are, by name."""

    model: HubModel
    recipe: Recipe
    listing: Listing
    small: dict[str, bytes]
    shards: tuple[Shard, ...]
    blueprint: Blueprint


@dataclass(frozen=True, slots=True)
class Reach:
    """Where a survey may look. client: None offline. cache: huggingface-hub's."""

    client: Client | None
    cache: Path
    downloads: Path

    def folder(self, model: HubModel) -> DownloadFolder:
        return DownloadFolder(self.downloads / model.name)


def survey(model: HubModel, reach: Reach, tell: Callable[[Event], None]) -> Survey:
    """Ask the Hub, or offline what is here. Nothing is written.

    Raises `NotFoundError`, `AccessError`, `NetworkError`, `CorruptError`, and `RefusedError` for a model that we cannot
    run.
    """
    listing = _find_listing(model, reach, tell)
    names = sorted(name for name in listing.files if not name.endswith(SHARD_SUFFIX))
    if CONFIG not in listing.files:
        raise NotFoundError(f"{model}: no {CONFIG}", "mixlocal needs a model in Hugging Face format")
    source = _Source(reach, reach.folder(model), listing, tell)
    small = {CONFIG: source.small(CONFIG)}
    config = parse_json_object(small[CONFIG], f"{model.repository}/{CONFIG}")
    recipe = recipe_for(model.variant)
    blueprint = Blueprint.of(config, f"{model.repository}/{CONFIG}", recipe)
    small |= {name: source.small(name) for name in names if name != CONFIG}
    weight_map = _weight_map(listing, small)
    shards = source.shards(shard_names(listing.repository, [*listing.files, *listing.others], weight_map))
    blueprint.check_tensors(model.repository, _tensors(model.repository, shards, weight_map))
    return Survey(model, recipe, listing, small, shards, blueprint)


def _find_listing(model: HubModel, reach: Reach, tell: Callable[[Event], None]) -> Listing:
    """What an earlier call wrote down, so that a branch which moved on meanwhile changes nothing; or the Hub's."""
    begun = reach.folder(model).listing(model.repository, model.revision)
    if begun is not None:
        return begun
    if reach.client is not None:
        return list_repository(reach.client, model.repository, model.revision, tell)
    found = cached_listing(reach.cache, model.repository, model.revision)
    if found is None:
        raise NetworkError(f"{model}: offline, and nothing of it is here", "go online, and run the same command again")
    return found


def _weight_map(listing: Listing, small: dict[str, bytes]) -> dict[str, str] | None:
    if INDEX not in small:
        return None
    where = f"{listing.repository}/{INDEX}"
    return read_weight_map(parse_json_object(small[INDEX], where), where)


def _tensors(repository: str, shards: tuple[Shard, ...], weight_map: dict[str, str] | None) -> dict[str, TensorRef]:
    tensors: dict[str, TensorRef] = {}
    for shard in shards:
        add_tensors(tensors, shard.tensors)
    if weight_map is not None:
        check_index(f"{repository}/{INDEX}", weight_map, tensors)
    return tensors


@dataclass(frozen=True, slots=True)
class _Source:
    """Reads what a survey needs of a repository's files: from a copy where there is one, else over the network."""

    reach: Reach
    folder: DownloadFolder
    listing: Listing
    tell: Callable[[Event], None]

    def small(self, name: str) -> bytes:
        file = self.listing.files[name]
        if file.nbytes > (MAX_INDEX_BYTES if name == INDEX else SMALL_LIMIT):
            raise RefusedError(f"{self.listing.repository}/{name}: {file.nbytes} bytes is too large for what it is")
        copy = self._copy(file)
        data = copy.read_bytes() if copy is not None else b""
        if copy is not None and file.digest.matches(data):
            return data
        return fetch_bytes(self._remote(name), file, self.tell)

    def shards(self, names: list[str]) -> tuple[Shard, ...]:
        pool = ThreadPoolExecutor(HEADER_READERS)
        try:
            return tuple(pool.map(self._shard, names))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _shard(self, name: str) -> Shard:
        file, path = self.listing.files[name], Path(name)
        copy = self._copy(file)
        first = self._first_bytes(file, copy, min(FIRST_BYTES, file.nbytes))
        start = data_start(path, first[:8], file.nbytes)
        header = first[:start] if start <= len(first) else self._first_bytes(file, copy, start)
        return Shard(file, header, tuple(read_tensor_refs(path, header[8:], file.nbytes)), copy)

    def _first_bytes(self, file: RepoFile, copy: Path | None, nbytes: int) -> bytes:
        if copy is None:
            return fetch_bytes(self._remote(file.path), file, self.tell, nbytes)
        with copy.open("rb") as opened:
            data = opened.read(nbytes)
        if len(data) < nbytes:
            raise CorruptError(f"{copy}: ends at byte {len(data)}", "remove that copy")
        return data

    def _copy(self, file: RepoFile) -> Path | None:
        listing = self.listing
        return self.folder.copy_of(file) or cached_copy(self.reach.cache, listing.repository, listing.commit, file)

    def _remote(self, name: str) -> Remote:
        if self.reach.client is None:
            raise NetworkError(
                f"{self.listing.repository}/{name}: offline, and this file is not here",
                "go online, and run the same command again",
            )
        return Remote(self.reach.client, self.listing.repository, self.listing.commit)
