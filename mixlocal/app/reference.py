"""What a user may call a model that is to be fetched: a name of the catalogue, or org/repo[@revision]."""

from __future__ import annotations

from dataclasses import dataclass

from mixlocal.app.catalog import (
    DEFAULT_VARIANT,
    CatalogEntry,
    HubSource,
    Variant,
    find_entry,
    read_catalog,
    split_variant,
)
from mixlocal.errors import NotFoundError, UsageError
from mixlocal.store.repo_names import is_repository, is_revision

MAIN = "main"


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of the Hub. name: of its store. revision: a branch, a tag or a commit."""

    name: str
    variant: Variant
    repository: str
    revision: str
    entry: CatalogEntry | None

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision[:12]}" if self.revision != MAIN else self.repository


def hub_model(reference: str, revision: str | None = None) -> HubModel | None:
    """None for a catalogue model that is not of the Hub. revision: of the command line.

    Raises `NotFoundError` for a name nobody knows, `UsageError` for a revision that cannot be one.
    """
    name, variant = split_variant(reference)
    name, at, written = name.partition("@")
    if at and revision and written != revision:
        raise UsageError(f"{reference} and --revision {revision} contradict each other")
    revision = written if at else revision
    if revision is not None and not is_revision(revision):
        raise UsageError(f"{revision!r} cannot be a revision", "give a branch, a tag or a commit of 40 hex digits")
    entry = find_entry(name)
    if entry is None and is_repository(name):
        return _of_repository(name, variant, revision)
    if entry is None:
        raise NotFoundError(f"no model is called {name}", f"known: {', '.join(read_catalog())}; or give org/repo")
    if not isinstance(entry.source, HubSource):
        if revision is not None:
            raise UsageError(f"{name} does not come from the Hub and has no revisions")
        return None
    pinned = revision or entry.source.revision or MAIN
    return HubModel(name, variant or entry.variant, entry.source.repository, pinned, entry)


def store_name(repository: str) -> str:
    """Of a repository that the catalogue does not know: a folder's name that cannot be another repository's."""
    return repository.replace("/", "--")


def known_repository(repository: str) -> str | None:
    """The catalogue's name for a repository."""
    entries = read_catalog().items()
    return next(
        (n for n, e in entries if isinstance(e.source, HubSource) and e.source.repository == repository), None
    )


def _of_repository(repository: str, variant: Variant | None, revision: str | None) -> HubModel:
    known = known_repository(repository)
    if known is None:
        return HubModel(store_name(repository), variant or DEFAULT_VARIANT, repository, revision or MAIN, None)
    entry = find_entry(known)
    assert entry is not None
    assert isinstance(entry.source, HubSource)
    return HubModel(known, variant or entry.variant, repository, revision or entry.source.revision or MAIN, entry)
