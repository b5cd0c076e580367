"""A model that is to be measured: as it will be run, and the text as it sees it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import msgspec

from mixlocal import __version__
from mixlocal.app.budgets import RunOptions
from mixlocal.app.installed import find_store
from mixlocal.app.model_run import ModelRun, store_config
from mixlocal.app.parameters import count_parameters, total_and_active
from mixlocal.app.quality.scoring import scoring_bytes
from mixlocal.app.quality.text import Chunks, Text, check_same_tokens, cut, n_scored
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.errors import RefusedError
from mixlocal.kernels import select
from mixlocal.model.config import ModelConfig
from mixlocal.store.logit_file import LogitHead
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home


@dataclass(frozen=True, slots=True)
class Subject:
    store: ModelStore
    config: ModelConfig
    options: RunOptions
    folders: Home
    chunks: Chunks

    @classmethod
    def of(cls, model: str, text: Text, options: RunOptions, folders: Home, most: int | None) -> Subject:
        """options.context: tokens of a chunk. most: chunks.

        Raises `NotFoundError` if it is not installed, `UsageError` for a text without a chunk.
        """
        assert options.context is not None
        store = ModelStore.open(find_store(model, folders))
        config, tokenizer = store_config(store), load_tokenizer(store.folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise RefusedError(
                f"{store.folder}: the tokenizer knows {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
            )
        chunks = cut(text, tokenizer, options.context, most, model)
        return cls(store, config, options, folders, chunks)

    def with_experts(self, count: int | None) -> Subject:
        """The same, with so many experts per token; None: as trained."""
        return replace(self, options=replace(self.options, experts_per_token=count))

    @property
    def name(self) -> str:
        return f"{self.store.manifest.name}:{self.store.manifest.variant}"

    @property
    def top_k(self) -> int:
        return self.options.experts_per_token or self.config.router.top_k

    @property
    def bits_per_weight(self) -> float:
        """Of all its files, per parameter."""
        return 8 * self.store.manifest.nbytes / total_and_active(self.config)[0]

    @property
    def expert_bits_per_weight(self) -> float:
        """Of the experts' records, scales and padding included."""
        experts = next(part.total for part in count_parameters(self.config) if part.name == "experts")
        return 8 * self.store.manifest.experts_bytes / experts

    def run(self) -> ModelRun:
        """Checked and planned; nothing is loaded. Raises as `ModelRun`."""
        beside = scoring_bytes(self.config.vocab_size, self.chunks.context)
        return ModelRun(self.store, replace(self.options, beside=beside), self.folders)

    def check_comparable(self, reference: Subject) -> None:
        """Raises `RefusedError` if the two do not tell of the same tokens."""
        names = self.name, reference.name
        if self.config.vocab_size != reference.config.vocab_size:
            sizes = f"{self.config.vocab_size} logits against {reference.config.vocab_size}"
            raise RefusedError(f"{names[0]} and {names[1]} cannot be compared: {sizes}", "compare models of one family")
        ours, theirs = load_tokenizer(self.store.folder), load_tokenizer(reference.store.folder)
        check_same_tokens(ours, theirs, names)
        if self.chunks != reference.chunks:
            raise RefusedError(f"{names[0]} and {names[1]} have different tokenizers: they cut the text differently")

    def head(self, text: Text) -> LogitHead:
        """Of the file with its logits, which have the same bits with every instruction set of the compiled kernels."""
        run = self.run()
        kernels = select(run.device).name
        return LogitHead(
            model=self.name,
            manifest_sha256=hashlib.sha256(msgspec.json.encode(self.store.manifest)).hexdigest(),
            text_sha256=text.sha256,
            tokens_sha256=self.chunks.sha256,
            context=self.chunks.context,
            experts_per_token=self.top_k,
            arithmetic="native" if kernels.startswith("cpu-") else kernels,
            kv_dtype=self.options.kv_dtype,
            mixlocal=__version__,
            scored=n_scored(self.chunks.context),
            vocab_size=self.config.vocab_size,
        )

