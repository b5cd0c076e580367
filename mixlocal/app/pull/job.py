"""A pull from its name to its end: what is here already, what it would take, and then the work."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass, replace

from mixlocal.app.background import in_background
from mixlocal.app.budgets import RunOptions
from mixlocal.app.catalog import recipe_for
from mixlocal.app.install import QuantizeRequest, quantize_model
from mixlocal.app.planning import Outlook, Subject, look_into
from mixlocal.app.progress import Notice, Progress, Step
from mixlocal.app.pull.carry_out import DiskNeeds, Line, PullOptions, carry_out, clean_up, disk_needs
from mixlocal.app.pull.survey import Reach, Survey, survey
from mixlocal.app.reference import MAIN, HubModel
from mixlocal.errors import DiskFullError, MemoryBudgetError, MixlocalError, PermissionDeniedError, RefusedError
from mixlocal.store.download import Event, Waiting
from mixlocal.store.download_folder import DownloadFolder
from mixlocal.store.durable import make_folder
from mixlocal.store.http import Client
from mixlocal.store.hub import HubSettings, hub_settings
from mixlocal.store.manifest import MANIFEST
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home
from mixlocal.store.patience import REACH, READ, Cancellation, Patience


@dataclass(frozen=True, slots=True)
class PullPlan:
    """What is known before the first shard. outlook: how it would run; None if it would not, which `error` explains."""

    survey: Survey
    needs: DiskNeeds
    outlook: Outlook | None
    outlook_error: MemoryBudgetError | None

    def trouble(self) -> MixlocalError | None:
        """Why it had better not begin."""
        try:
            self.needs.check()
        except DiskFullError as error:
            return error
        return self.outlook_error


@dataclass(frozen=True, slots=True)
class PullJob:
    """One model to pull. warnings: what its user should hear first."""

    model: HubModel
    home: Home
    options: PullOptions
    settings: HubSettings
    line: Line
    warnings: tuple[str, ...]

    @classmethod
    def begin(cls, model: HubModel, home: Home, options: PullOptions, *, offline: bool, patience: float) -> PullJob:
        """Nothing is asked of anybody yet."""
        settings = hub_settings()
        cancellation = Cancellation()
        bounds = Patience(give_up=patience, reach=min(patience, REACH), read=_read_seconds())
        client = Client(settings.endpoint, bounds, cancellation, options.jobs)
        warnings = []
        if settings.endpoint.token and not settings.endpoint.safe_for_token:
            warnings.append(f"{settings.endpoint.host} is reached over plain http: your token is not sent there")
        line = Line(None if offline or settings.offline else client, cancellation)
        return cls(model, home, options, settings, line, tuple(warnings))

    @property
    def host(self) -> str:
        """Empty offline."""
        return self.settings.endpoint.host if self.line.client else ""

    def installed(self) -> ModelStore | None:
        """The finished store, found without asking anybody. Raises `RefusedError` if it is of another revision."""
        final = self.home.store(self.model.name, self.model.variant)
        if not (final / MANIFEST).is_file():
            return None
        store = ModelStore.open(final)
        here, wanted = store.manifest.source.revision, self.model.revision
        if wanted not in (MAIN, here) and not (here or "").startswith(wanted):
            raise RefusedError(
                f"{self.model.name}:{self.model.variant} is here at {(here or 'an unknown revision')[:12]}, "
                f"and {wanted[:12]} was asked for",
                f"remove it first: mixlocal rm {self.model.name}:{self.model.variant}",
            )
        clean_up(final, DownloadFolder(self.home.downloads / self.model.name))
        return store

    def check_writable(self) -> None:
        """Before anything is asked. Raises `PermissionDeniedError`."""
        for folder in (self.home.models, self.home.downloads):
            make_folder(folder)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionDeniedError(f"{folder}: not writable", "check its owner and mode, or use --home")

    def from_bf16(self) -> Generator[Step, None, ModelStore] | None:
        """Work that makes this variant of the bf16 one, where that is here and of the revision asked for."""
        if self.model.variant == "bf16":
            return None
        other = replace(self, model=replace(self.model, variant="bf16"))
        try:
            store = other.installed()
        except RefusedError:
            return None
        if store is None:
            return None
        variant = self.model.variant
        return quantize_model(QuantizeRequest(f"{self.model.name}:bf16", variant, recipe_for(variant)), self.home)

    def survey(self) -> Generator[Step, None, Survey]:
        """Ask the Hub, look at the headers. Raises what `survey` does."""
        reach = Reach(self.line.client, self.settings.cache, self.home.downloads)
        try:
            return (yield from _notices(in_background(lambda tell: survey(self.model, reach, tell))))
        except GeneratorExit:
            self.line.cancellation.cancel()
            raise

    def plan(self) -> Generator[Step, None, PullPlan]:
        """As `survey`, and measure this machine."""
        found = yield from self.survey()
        needs = disk_needs(found, self.home, self.options)
        yield Progress("measure", 0, 1)
        model, blueprint = self.model, found.blueprint
        subject = Subject(model.name, model.variant, blueprint.config, found.recipe, None)
        try:
            return PullPlan(found, needs, look_into(subject, RunOptions(), self.home), None)
        except MemoryBudgetError as error:
            return PullPlan(found, needs, None, error)

    def run(self, found: Survey, needs: DiskNeeds) -> Generator[Step, None, ModelStore]:
        """Fetch, quantize, publish. Raises what `carry_out` does."""
        return carry_out(found, self.line, self.home, needs, self.options)


def _notices(work: Generator[Event, None, Survey]) -> Generator[Step, None, Survey]:
    while True:
        try:
            event = next(work)
        except StopIteration as end:
            result: Survey = end.value
            return result
        if isinstance(event, Waiting):
            yield Notice(event.text)


def _read_seconds() -> float:
    """HF_HUB_DOWNLOAD_TIMEOUT, where it is a number."""
    given = os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", "")
    return float(given) if given.isdigit() and int(given) else READ
