"""models.toml: the models we know by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from mixlocal.engine.params import SamplingParams
from mixlocal.errors import NotFoundError, RefusedError, UsageError
from mixlocal.store.repo_names import is_repository

if TYPE_CHECKING:  # PyTorch is behind them, and a name can be looked up without
    from mixlocal.quant.format import Kind
    from mixlocal.store.manifest import Recipe

DEFAULT_MODEL = "smolmix"
Variant = Literal["q4", "int4", "int4-32", "q8", "mix", "bf16"]
DEFAULT_VARIANT: Variant = "q4"  # of a model that the catalogue does not know
VARIANTS: dict[str, Kind] = {  # mix: the matrices that are not in 8 bits
    "q4": "nf4", "int4": "int4", "int4-32": "int4-32", "q8": "int8", "mix": "nf4", "bf16": "bf16",
}  # fmt: skip
PACKAGE = Path(__file__).parent.parent


class HubSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hub", tag_field="kind"):
    """A repository of the Hugging Face Hub."""

    repository: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.revision is not None and not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError("revision must be a 40-hex commit")


class SmolmixSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="smolmix", tag_field="kind"):
    """A Python package that carries a dense GGUF model, to be upcycled here; build_nbytes: of disk meanwhile."""

    package: str
    file: str
    nbytes: int
    sha256: str
    build_nbytes: int


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    total: int
    active: int


class SamplingDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the model's authors recommend; anything else is SamplingParams' own default."""

    temperature: float | None = None
    top_p: float | None = None
    repeat_penalty: float | None = None


class CatalogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model we know. variant: the one taken when none is named. template: a name in `app.template.TEMPLATES`.
    config: what is in its config.json, where that is known, so that it can be planned for before anything is fetched.
    """

    description: str
    source: HubSource | SmolmixSource
    architecture: str
    licence: str
    variant: Variant
    parameters: Parameters
    template: str | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    config: dict[str, Any] | None = None
    note: str = ""


class _Catalog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: dict[str, CatalogEntry]


def catalog_path() -> Path:
    """Inside the installed package, or at the root of a checkout."""
    inside = PACKAGE / "models.toml"
    return inside if inside.is_file() else PACKAGE.parent / "models.toml"


def read_catalog(path: Path | None = None) -> dict[str, CatalogEntry]:
    """Raises `RefusedError` naming file and key for anything unknown, missing or of the wrong type."""
    path = path or catalog_path()
    try:
        return msgspec.toml.decode(path.read_bytes(), type=_Catalog).model
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path}: {error}") from error
    except OSError as error:
        raise NotFoundError(f"{path}: {error.strerror}") from error


def find_entry(name: str) -> CatalogEntry | None:
    return read_catalog().get(name)


def is_folder(reference: str) -> bool:
    """Whether a folder is meant and not a name; a catalogue name wins over a folder that happens to be called so.

    "org/repo" is a repository of the Hub unless such a folder is there.
    """
    if Path(reference).expanduser().is_dir():
        return "/" in reference or find_entry(reference) is None
    return "/" in reference and not is_repository(reference.partition("@")[0])


def split_variant(reference: str) -> tuple[str, Variant | None]:
    """ "smolmix:q8" -> ("smolmix", "q8"). Raises `UsageError` for a variant we do not make."""
    name, colon, variant = reference.rpartition(":")
    if not colon or "/" in variant:
        return reference, None
    if variant not in VARIANTS:
        raise UsageError(f"{reference}: no variant {variant!r}", f"choose one of {', '.join(VARIANTS)}")
    return name, msgspec.convert(variant, Variant)


def recipe_for(variant: Variant) -> Recipe:
    """Experts as the variant says, attention in bfloat16. Raises `UsageError` for one that needs more to be said."""
    from mixlocal.store.manifest import Recipe

    if variant == "mix":
        raise UsageError("a mix is made to fit a size", "use mixlocal quantize --fit SIZE")
    kind = VARIANTS[variant]
    return Recipe(experts=kind, scale_bits=16, attention="bf16", search=is_searched(kind))


def is_searched(kind: Kind) -> bool:
    """Whether scales are searched unless something else is asked for: wherever a block has one."""
    return kind not in ("int8", "bf16")


def sampling_defaults(entry: CatalogEntry | None) -> SamplingParams:
    given = msgspec.to_builtins(entry.sampling) if entry else {}
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
