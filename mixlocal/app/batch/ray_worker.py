"""What a Ray actor does: it owns one engine and answers requests with it. What loads torch is the engine."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from mixlocal import __version__
from mixlocal.app.batch.engine import BatchEngine, Pulse, Reply, Request
from mixlocal.app.batch.ray_desk import Desk
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import MixlocalError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a worker says of itself once its engine is there."""

    host: str
    version: str
    identity: dict[str, str]
    defaults: SamplingParams
    concurrency: int


@dataclass(frozen=True, slots=True)
class Trouble:
    """An error that concerns all requests. A value, because Ray gives an exception another type on its way."""

    error: MixlocalError
    host: str


class Worker:
    """Its methods are coroutines, so that many requests can wait in one actor."""

    def __init__(self) -> None:
        self._desk: Desk | None = None

    async def open(self, make_engine: Callable[[], BatchEngine]) -> Facts | Trouble:
        self._desk = Desk(make_engine)
        engine = await _outcome(self._desk.opened)
        if isinstance(engine, Trouble):
            return engine
        return Facts(socket.gethostname(), __version__, dict(engine.identity), engine.defaults, engine.concurrency)

    async def ask(self, request: Request) -> Reply | Trouble:
        return await _outcome(self._opened.ask(request))

    async def no_more(self, count: int) -> None:
        self._opened.no_more(count)

    async def news(self) -> list[Pulse]:
        return self._opened.news()

    async def close(self) -> None:
        await asyncio.to_thread(self._opened.close)

    @property
    def _opened(self) -> Desk:
        assert self._desk is not None, "open() comes first"
        return self._desk


async def _outcome(future: Future[Result]) -> Result | Trouble:
    try:
        return await asyncio.wrap_future(future)
    except MixlocalError as error:
        return Trouble(error, socket.gethostname())
