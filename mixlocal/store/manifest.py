"""manifest.json: what a model store holds and how to know it is whole. Nothing is a model without it."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import msgspec

from mixlocal.errors import CorruptError, NotFoundError, RefusedError
from mixlocal.quant.format import ExpertLayouts, Kind, QuantSpec, ScaleBits
from mixlocal.store.durable import named_errors, write_file
from mixlocal.store.paths import is_plain_name

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST = "manifest.json"
UNDECODABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what msgspec raises for damaged JSON


class SourceFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file the store was made from; sha256 where it was known or cheap to know."""

    name: str
    nbytes: int
    sha256: str | None = None


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the weights came from: a catalogue name, a repository or a folder's name, and its files."""

    name: str
    revision: str | None
    files: tuple[SourceFile, ...]


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was done to the weights. Router and norms are always float32. Version 2 brought what follows `attention`."""

    experts: Kind
    scale_bits: ScaleBits
    attention: Kind
    search: bool = False  # for the scales that lose least
    calibrated_on: str | None = None  # the sha256 of the text that told which columns and matrices count
    fit: int | None = None  # the bytes that the store was to fit
    wide: tuple[int, ...] = ()  # which matrices of each record are therefore int8, see `ExpertLayouts`

    @property
    def expert_spec(self) -> QuantSpec:
        return QuantSpec(self.experts, self.scale_bits)

    @property
    def attention_spec(self) -> QuantSpec:
        return QuantSpec(self.attention)


@cache
def expert_layouts(dim: int, hidden: int, recipe: Recipe, n_records: int) -> ExpertLayouts:
    """Raises `RefusedError` for a recipe of another number of records."""
    if len(recipe.wide) not in (0, n_records):
        raise RefusedError(f"a recipe for {len(recipe.wide)} experts does not go with a model of {n_records}")
    return ExpertLayouts(dim, hidden, recipe.expert_spec, n_records, recipe.wide)


class StoredFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    nbytes: int
    xxh3: str


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One expert: xxh3-128 over identity and bytes, and the relative error of w1, w3, w2 against the source."""

    xxh3: str
    errors: tuple[float, float, float]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything needed to open a store; `records` is indexed by layer * n_experts + expert. stride: of the largest."""

    format_version: int
    name: str
    variant: str
    architecture: str
    source: Source
    recipe: Recipe
    dim: int
    hidden: int
    n_layers: int
    n_experts: int
    stride: int
    files: dict[str, StoredFile]
    attention_errors: dict[str, float]
    records: tuple[Record, ...]
    licence: str | None = None
    template: str | None = None

    @property
    def layouts(self) -> ExpertLayouts:
        return expert_layouts(self.dim, self.hidden, self.recipe, self.n_layers * self.n_experts)

    @property
    def experts_bytes(self) -> int:
        return self.layouts.nbytes

    @property
    def nbytes(self) -> int:
        return self.experts_bytes + sum(file.nbytes for file in self.files.values())


class _Version(msgspec.Struct, frozen=True):
    """What every version of the format has in common."""

    format_version: int


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's outer object: the manifest and the sha256 of its canonical bytes."""

    manifest: msgspec.Raw
    sha256: str


def write_manifest(folder: Path, manifest: Manifest) -> None:
    body = msgspec.json.encode(manifest)
    sealed = _Sealed(msgspec.Raw(body), hashlib.sha256(body).hexdigest())
    write_file(folder / MANIFEST, msgspec.json.encode(sealed) + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """Raises `NotFoundError`, `CorruptError` for any damaged byte, `RefusedError` for a newer format."""
    path = folder / MANIFEST
    if not path.is_file():
        raise NotFoundError(f"{folder}: not a model store (no {MANIFEST})")
    with named_errors(path):
        data = path.read_bytes()
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
    except UNDECODABLE as error:
        raise CorruptError(f"{path}: {error}", "remove the model and pull it again") from error
    body = bytes(sealed.manifest)
    if hashlib.sha256(body).hexdigest() != sealed.sha256 or data != msgspec.json.encode(sealed) + b"\n":
        raise CorruptError(f"{path}: checksum does not match", "remove the model and pull it again")
    return _decode(path, body)


def _decode(path: Path, body: bytes) -> Manifest:
    try:
        version = msgspec.json.decode(body, type=_Version).format_version
        manifest = msgspec.json.decode(body, type=Manifest) if version in READABLE_VERSIONS else None
    except UNDECODABLE as error:
        raise CorruptError(f"{path}: {error}") from error
    if manifest is None:
        raise RefusedError(
            f"{path}: format version {version}; this mixlocal reads up to {FORMAT_VERSION}", "upgrade mixlocal"
        )
    counts = (manifest.dim, manifest.hidden, manifest.n_layers, manifest.n_experts)
    n_records = manifest.n_layers * manifest.n_experts
    recipe, wide = manifest.recipe, manifest.recipe.wide
    fits = min(counts) >= 1 and len(wide) in (0, n_records) and all(0 <= mask < 8 for mask in wide)
    fits = fits and (recipe.expert_spec.four_bit or not any(wide))
    if not fits or manifest.stride != manifest.layouts.largest.stride or len(manifest.records) != n_records:
        raise CorruptError(f"{path}: its record layout contradicts itself")
    outside = next((name for name in manifest.files if not is_plain_name(name)), None)
    if outside is not None:
        raise RefusedError(f"{path}: names the file {outside!r} outside its folder")
    return manifest
