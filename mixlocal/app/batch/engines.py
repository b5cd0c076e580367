"""Who answers the rows, by the name of `--engine`. To know an engine costs little; to open it may take a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from mixlocal.app.batch.engine import BatchEngine
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from mixlocal.app.budgets import RunOptions
    from mixlocal.app.session import Session
    from mixlocal.store.manifest import Manifest
    from mixlocal.store.paths import Home


AUTO_SEQUENCES = 32  # at once, on a machine of ours: from there on a token costs hardly less


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """model, run, folders, load: of one that runs here or on workers of ours; load opens the model on this machine.
    base_url, api_model, api_key: of a server. ray_address, workers: of a cluster. concurrency: None for what suits."""

    model: str
    run: Callable[[], RunOptions]
    folders: Home
    load: Callable[[], Session]
    concurrency: int | None = None
    base_url: str | None = None
    api_model: str | None = None
    api_key: str | None = None
    ray_address: str | None = None
    workers: int | None = None


class EngineChoice(Protocol):
    """What a batch has to know of an engine before it needs answers. Once open, the engine must say the same."""

    @property
    def identity(self) -> Mapping[str, str]: ...

    @property
    def defaults(self) -> SamplingParams: ...

    def open(self) -> BatchEngine: ...

    def close(self) -> None:
        """The engine too, if it is open."""


class _Opened:
    """An engine that is open already."""

    def __init__(self, engine: BatchEngine) -> None:
        self._engine = engine
        try:
            self.identity, self.defaults = engine.identity, engine.defaults
        except BaseException:
            engine.close()
            raise

    def open(self) -> BatchEngine:
        return self._engine

    def close(self) -> None:
        self._engine.close()


class _Installed:
    """An engine that runs a model of this machine's."""

    def __init__(self, options: EngineOptions, open_engine: Callable[[ExitStack], BatchEngine]) -> None:
        """open_engine: gets what to put there that has to be closed behind the engine."""
        from mixlocal.app.catalog import find_entry, sampling_defaults
        from mixlocal.app.installed import find_store
        from mixlocal.store.manifest import read_manifest

        manifest = read_manifest(find_store(options.model, options.folders))
        self.identity = local_identity(manifest, options.run())
        self.defaults = sampling_defaults(find_entry(manifest.name))
        self._open_engine, self._open = open_engine, ExitStack()

    def open(self) -> BatchEngine:
        engine = self._open_engine(self._open)
        self._open.callback(engine.close)
        return engine

    def close(self) -> None:
        self._open.close()


def local_identity(manifest: Manifest, run: RunOptions) -> dict[str, str]:
    """Of a model that runs on a machine of ours, wherever it is: by what it computes, not by how fast."""
    return {
        "engine": "local",
        "model": manifest.name,
        "variant": manifest.variant,
        "weights": hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()[:32],
        "experts per token": str(run.experts_per_token or "as trained"),
        "kv dtype": run.kv_dtype,
        "device": run.device.partition(":")[0],
    }


def _local(options: EngineOptions) -> EngineChoice:
    def open_engine(closing: ExitStack) -> BatchEngine:
        from mixlocal.app.batch.local import LocalEngine

        session = options.load()
        closing.callback(session.close)
        return LocalEngine(session, options.concurrency)

    return _Installed(options, open_engine)


def _ray(options: EngineOptions) -> EngineChoice:
    """Where the model is on this machine too, its workers are not needed to know what it is."""

    def open_engine() -> BatchEngine:
        from mixlocal.app.batch.ray_engine import RayEngine

        return RayEngine(
            options.model, options.run(), options.folders, options.ray_address, options.workers, options.concurrency
        )

    try:
        return _Installed(options, lambda _: open_engine())
    except NotFoundError:
        return _Opened(open_engine())


def _openai(options: EngineOptions) -> EngineChoice:
    from mixlocal.app.batch.openai_engine import OpenAIEngine

    if not options.base_url:
        raise UsageError("--engine openai needs --base-url", "for example --base-url http://127.0.0.1:8000/v1")
    return _Opened(OpenAIEngine(options.base_url, options.api_model, options.concurrency, options.api_key))


ENGINES: dict[str, Callable[[EngineOptions], EngineChoice]] = {"local": _local, "ray": _ray, "openai": _openai}
