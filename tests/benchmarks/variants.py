"""Perplexity of models on a text, and their KL divergence from the first: Markdown on stdout.

    python tests/benchmarks/variants.py smolmix:bf16 smolmix:q8 smolmix:q4 [--text FILE] [--ctx 512]

Each chunk of --ctx tokens is one pass from an empty cache; every token of it but the first is scored. The default text
is the package's own; it shares no sentence with the text that smolmix's routers were made on.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from stores import open_model

import mixlocal
from mixlocal.app.installed import find_store
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.model.kv_cache import own_cache
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import home

TEXT = Path(mixlocal.__file__).parent / "data" / "evaluation.txt"


@dataclass
class Score:
    """Sums over the scored tokens."""

    tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    same_top: int = 0


def logprobs(store: ModelStore, text: str, ctx: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each chunk: log probabilities [T - 1, V] and the ids [T - 1] that followed."""
    model, config = open_model(store)
    ids = torch.tensor(load_tokenizer(store.folder).encode(text))
    for chunk in ids.split(ctx):
        if len(chunk) > 1:
            logits = model.forward(chunk, own_cache(config, ctx), all_logits=True)
            yield torch.log_softmax(logits[:-1], dim=-1), chunk[1:]


def compare(reference: ModelStore, other: ModelStore, text: str, ctx: int) -> Score:
    score = Score()
    for (expected, ids), (found, _) in zip(logprobs(reference, text, ctx), logprobs(other, text, ctx), strict=True):
        score.tokens += len(ids)
        score.nll -= found.gather(1, ids[:, None]).sum().item()
        score.kl += (expected.exp() * (expected - found)).sum().item()
        score.same_top += int((expected.argmax(-1) == found.argmax(-1)).sum())
    return score


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", help="the first is the reference of the divergence")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--ctx", type=int, default=512)
    args = parser.parse_args()
    stores = [ModelStore.open(find_store(model, home())) for model in args.models]
    print("| model | bytes | perplexity | mean KL | same top token | tokens |\n|---|---|---|---|---|---|")
    for name, store in zip(args.models, stores, strict=True):
        score = compare(stores[0], store, args.text.read_text(), args.ctx)
        perplexity = math.exp(score.nll / score.tokens)
        divergence, same = score.kl / score.tokens, 100 * score.same_top / score.tokens
        size = f"{store.manifest.nbytes / 1e6:.0f} MB"
        print(f"| {name} | {size} | {perplexity:.3f} | {divergence:.5f} | {same:.1f} % | {score.tokens} |", flush=True)


if __name__ == "__main__":
    main()
