"""Reads a text with a model and keeps what its routers said."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np

from mixlocal.app.budgets import RunOptions
from mixlocal.app.expert_caches import CacheHits, cache_hits
from mixlocal.app.expert_usage import RouterFigures, Usage, router_figures, usage
from mixlocal.app.installed import find_store
from mixlocal.app.measure import Running
from mixlocal.app.model_run import ModelRun, store_config
from mixlocal.app.text_stream import TextStream
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.engine.generate import prefill
from mixlocal.errors import UsageError
from mixlocal.experts.recorder import RecordingExperts, RoutingRecord
from mixlocal.experts.runtime import ExpertRuntime
from mixlocal.model.transformer import Transformer, TrunkWeights
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home

CHUNK = 512  # tokens that see each other, if the model's context has so many


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a text for an empty context. own: its first tokens that are not of the text."""

    ids: list[int]
    own: int


@dataclass(frozen=True, slots=True)
class TextRouting:
    """texts: [T], what each token completed of the text, in which a character may take several tokens.
    begins: the tokens with which a chunk begins."""

    texts: tuple[str, ...]
    begins: tuple[int, ...]
    record: RoutingRecord


@dataclass(frozen=True, slots=True)
class ExpertFigures:
    """All that is computed of a `TextRouting`."""

    usage: Usage
    router: RouterFigures
    hits: CacheHits


class Reading:
    """A model and the chunks of a text that are to be read with it. Nothing is loaded yet."""

    def __init__(self, model: str, text: str, options: RunOptions, folders: Home) -> None:
        """options.context: tokens of a chunk.

        Raises `NotFoundError` if the model is not installed, `UsageError` if a chunk or the text has less than two
        tokens, and as `ModelRun`.
        """
        store = ModelStore.open(find_store(model, folders))
        context = options.context or min(CHUNK, store_config(store).max_context)
        self.name = f"{store.manifest.name}:{store.manifest.variant}"
        self._tokenizer = load_tokenizer(store.folder)
        self.chunks = _chunks(text, self._tokenizer, context)
        self.run = ModelRun(store, replace(options, context=context))

    def read(self) -> Generator[Running, None, TextRouting]:
        """Load the model, read all chunks, let go of the model. Raises as `Session`."""
        recorders: list[RecordingExperts] = []

        def recorded(experts: ExpertRuntime, trunk: TrunkWeights) -> ExpertRuntime:
            recorders.append(RecordingExperts(experts, [layer.router for layer in trunk.layers]))
            return recorders[0]

        yield Running("loading the model", 0, 0)
        try:
            yield from self._read_chunks(self.run.load(recorded))
        finally:
            self.run.finish()
        of_text = np.concatenate([np.arange(len(chunk.ids)) >= chunk.own for chunk in self.chunks])
        return TextRouting(self._texts(), self._begins(), recorders[0].record().of(of_text))

    @property
    def _tokens(self) -> int:
        return sum(len(chunk.ids) - chunk.own for chunk in self.chunks)

    def _read_chunks(self, model: Transformer) -> Generator[Running, None, None]:
        cache, done = self.run.new_cache(self.run.context), 0
        for chunk in self.chunks:
            cache.truncate(0)
            for progress, _ in prefill(model, chunk.ids, cache):
                yield Running("reading", done + max(0, progress.done - chunk.own), self._tokens)
            done += len(chunk.ids) - chunk.own

    def _begins(self) -> tuple[int, ...]:
        lengths = [len(chunk.ids) - chunk.own for chunk in self.chunks]
        return tuple(sum(lengths[:i]) for i in range(len(lengths)))

    def _texts(self) -> tuple[str, ...]:
        stream = TextStream(self._tokenizer)
        texts = [stream.push(token) for chunk in self.chunks for token in chunk.ids[chunk.own :]]
        texts[-1] += stream.flush()
        return tuple(texts)


def figures(routing: TextRouting) -> ExpertFigures:
    record = routing.record
    return ExpertFigures(
        usage(record.chosen, record.n_experts, routing.begins),
        router_figures(record),
        cache_hits(record.chosen, record.n_experts),
    )


def _chunks(text: str, tokenizer: Tokenizer, context: int) -> list[Chunk]:
    """Of a model that expects a token in front of a text, it stands in front of each chunk."""
    front = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    room = context - len(front)
    if room < 2:
        raise UsageError(
            f"--ctx {context} has no room for two tokens of a text", f"give {len(front) + 2} or more, 512 is usual"
        )
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise UsageError(
            f"the text has {len(ids)} token{'s' * (len(ids) != 1)}; what consecutive tokens share needs two or more",
            "give a longer text",
        )
    return [Chunk(front + ids[i : i + room], len(front)) for i in range(0, len(ids), room)]
