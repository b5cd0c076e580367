"""What a model would be sent, found without its weights: tokenizer, chat template and configuration are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Self

from mixlocal.app.budgets import RunOptions
from mixlocal.app.catalog import find_entry, sampling_defaults
from mixlocal.app.encoding import encode_prompt
from mixlocal.app.installed import find_store
from mixlocal.app.model_run import ModelRun
from mixlocal.app.template import ChatTemplate, Message
from mixlocal.app.templates import load_template
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.app.vocabulary import Vocabulary
from mixlocal.engine.params import SamplingParams
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home


@dataclass(frozen=True, slots=True)
class Preview:
    """What a `Session` of the same model and options would have. warnings: for the user."""

    name: str
    variant: str
    context: int
    defaults: SamplingParams
    tokenizer: Tokenizer
    template: ChatTemplate
    warnings: tuple[str, ...]

    @classmethod
    def open(cls, model: str, options: RunOptions, folders: Home) -> Self:
        """Raises as `Session.open` for what is not installed, damaged or too large for this machine."""
        store = ModelStore.open(find_store(model, folders))
        run = ModelRun(store, options, folders)
        manifest = store.manifest
        defaults = sampling_defaults(find_entry(manifest.name))
        template = load_template(store.folder, manifest.template)
        tokenizer = load_tokenizer(store.folder)
        return cls(manifest.name, manifest.variant, run.context, defaults, tokenizer, template, run.warnings)

    def encode(self, messages: Sequence[Message], *, raw: bool = False, prefill: str = "") -> list[int]:
        """As `Session.encode`."""
        return encode_prompt(messages, self.template, self.tokenizer, raw=raw, prefill=prefill)


def render_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[tuple[str, bool]]:
    """The text of some tokens in stretches, and whether each is a control token, by its name."""
    names = tokenizer.control_ids if isinstance(tokenizer, Vocabulary) else {}
    parts: list[tuple[str, bool]] = []
    for name, run in groupby(ids, names.get):
        stretch = list(run)
        parts.append((tokenizer.decode(stretch) if name is None else name * len(stretch), name is not None))
    return parts
