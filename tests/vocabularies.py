"""Tokenizer files that tests make: Mixtral's as tokenizer.json, and a small byte-level one like SmolLM2's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mistral_common
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

V1_MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)

_MAKE_CONTROL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
_CORPUS = [
    "The quick brown fox jumps over the lazy dog. 0123456789",
    "user assistant system\nhello, wörld é 漢字 😀",
] * 8


def mixtral_document(oracle: Any) -> dict[str, Any]:
    """Mixtral's tokenizer.json, made from the sentencepiece model as transformers' converter makes it."""
    vocab = {oracle.id_to_piece(i): i for i in range(oracle.n_words)}
    merges = [(p[:n], p[n:]) for p in vocab for n in range(1, len(p)) if p[:n] in vocab and p[n:] in vocab]
    score = oracle._model.get_score
    merges.sort(key=lambda pair: (-score(vocab[pair[0] + pair[1]]), -len(pair[0]), -len(pair[1])))
    control = [{"id": i, "content": c, **_MAKE_CONTROL} for i, c in enumerate(["<unk>", "<s>", "</s>"])]
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    return {
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst",
        "stride": 0},
        "padding": None, "added_tokens": control, "normalizer": {"type": "Sequence", "normalizers": prepend},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
        "merges": merges},
    }  # fmt: skip


def byte_level_document(vocab_size: int = 600) -> dict[str, Any]:
    """A SmolLM2-like tokenizer.json: digits one by one, byte-level BPE, chat tokens."""
    library = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(_CORPUS, trainer)
    library.add_tokens(
        [tokenizers.AddedToken("<think>", special=False), tokenizers.AddedToken("two words", special=False)]
    )
    document: dict[str, Any] = json.loads(library.to_str())
    return document
