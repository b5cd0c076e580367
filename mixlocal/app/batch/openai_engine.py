"""Answers from any server that speaks OpenAI's API: vLLM on a cluster, llama.cpp's on another machine, OpenAI's own."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping

from mixlocal.app.batch.engine import Pulse, Reply, Request
from mixlocal.app.batch.openai_crew import PROBE_SECONDS, Crew, Service
from mixlocal.app.batch.openai_retries import STRIKES, Reception, Retries
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import NotFoundError, UsageError
from mixlocal.store.chat_api import PATIENCE, ApiAddress, ChatApi, one_line
from mixlocal.store.patience import Cancellation, Patience

CONCURRENCY, MAX_CONCURRENCY = 32, 1024
LISTED = 10  # names of models in a message


class OpenAIEngine:
    """A `BatchEngine`. Nothing is asked before `identity`, if no model is named, or `answer`."""

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        concurrency: int | None = None,
        api_key: str | None = None,
        *,
        patience: Patience = PATIENCE,
        strikes: int = STRIKES,
    ) -> None:
        """base_url: such as http://127.0.0.1:8000/v1. model: None for the one that the server has. Raises
        `UsageError`, also for a key that would go over a network in clear."""
        self._concurrency = CONCURRENCY if concurrency is None else concurrency
        if not 1 <= self._concurrency <= MAX_CONCURRENCY:
            raise UsageError(f"concurrency = {self._concurrency} is outside 1 to {MAX_CONCURRENCY}")
        self._address = ApiAddress(base_url.rstrip("/"), api_key or None)
        self._named, self._patience, self._strikes = model, patience, strikes
        self._crew: Crew | None = None

    @functools.cached_property
    def model(self) -> str:
        """Raises `UsageError` if the server has none or several; `NetworkError`, `AccessError`."""
        return self._named or self._only_model()

    @property
    def identity(self) -> Mapping[str, str]:
        return {"engine": "openai", "model": self.model}

    @property
    def defaults(self) -> SamplingParams:
        return SamplingParams()

    @property
    def concurrency(self) -> int:
        return self._concurrency

    def answer(self, requests: Iterator[Request]) -> Generator[Reply | Pulse, None, None]:
        """As `BatchEngine.answer`. Raises `NetworkError` if the server answers nobody any more, `AccessError` if it
        does not let us in, `UsageError` if there is no such server or model."""
        self._crew = Crew(Service(self._address, self.model, self._patience, self._strikes), self._concurrency)
        try:
            yield from self._crew.run(requests)
        finally:
            self.close()

    def close(self) -> None:
        if self._crew:
            self._crew.dismiss()
            self._crew = None

    def _only_model(self) -> str:
        host = self._address.host
        patience = Patience(self._patience.give_up, self._patience.reach, min(PROBE_SECONDS, self._patience.read))
        api = ChatApi(self._address, Cancellation(), patience, 1)
        try:
            names = Retries(api, Reception(), self._strikes, lambda note: None).ask(api.models)
        except NotFoundError as error:
            raise UsageError(
                f"{host} has no list of models", "does the address end in /v1? if it does, name a model: --api-model"
            ) from error
        finally:
            api.close()
        if len(names) == 1:
            return names[0]
        if not names:
            raise UsageError(f"{host} serves no model")
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        listed = ", ".join(map(one_line, names[:LISTED])) + more
        raise UsageError(f"{host} serves several models: {listed}", "choose one with --api-model")
