"""The engine that a Ray worker has: the model on the worker's own node, in its share of that node."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

from mixlocal.app.batch.engine import Pulse, Reply, Request
from mixlocal.app.batch.local import LocalEngine
from mixlocal.app.budgets import FREE_SHARE, RunOptions
from mixlocal.app.catalog import is_folder, split_variant
from mixlocal.app.hardware import Hardware
from mixlocal.app.session import Session
from mixlocal.app.sizes import parse_size
from mixlocal.store.paths import Home, home


class NodeEngine(LocalEngine):
    """A `LocalEngine` whose session is its own, and which tells of that session's warnings itself."""

    def __init__(self, session: Session, concurrency: int | None) -> None:
        super().__init__(session, concurrency)
        self._own, self._warnings = session, session.warnings

    def answer(self, requests: Iterator[Request]) -> Generator[Reply | Pulse, None, None]:
        warnings, self._warnings = self._warnings, ()
        yield from (Pulse(note=warning) for warning in warnings)
        yield from super().answer(requests)

    def close(self) -> None:
        super().close()
        self._own.close()


def local_engine(model: str, folders: Home, concurrency: int | None, options: RunOptions) -> NodeEngine:
    """folders: the driver's; a node where they are not has its own."""
    return NodeEngine(Session.load(model, options, folders if folders.models.is_dir() else home()), concurrency)


def absolute(model: str) -> str:
    """A model as a worker can find it, whose working directory is another one."""
    name, variant = split_variant(model)
    if not is_folder(name):
        return model
    path = str(Path(name).expanduser().absolute())
    return f"{path}:{variant}" if variant else path


def divided(options: RunOptions, share: int, machine: Hardware) -> RunOptions:
    """Options for one of `share` workers on a machine, so that they get along in its cores and its memory."""
    free = int(machine.ram_free * FREE_SHARE)
    asked = parse_size("--ram", options.ram, machine.ram_total) if isinstance(options.ram, str) else options.ram
    threads = machine.cores if options.threads is None else options.threads
    return replace(options, ram=min(asked or free, free) // share, threads=max(1, threads // share))
