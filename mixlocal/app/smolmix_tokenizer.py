"""smolmix's tokenizer: what a GGUF file says of SmolLM2's, as Hugging Face's tokenizer files."""

from __future__ import annotations

from typing import Any

from gguf import TokenType

from mixlocal.store.gguf import GgufFile, corrupt


def tokenizer_document(source: GgufFile) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE whose pre-tokenizer splits digits one by one, which llama.cpp calls "smollm"."""
    source.require("tokenizer.ggml.model", "gpt2")
    source.require("tokenizer.ggml.pre", "smollm")
    tokens, merges = (source.field(f"tokenizer.ggml.{name}", list) for name in ("tokens", "merges"))
    types = source.field("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or not isinstance(tokens[0], str):
        raise corrupt(source.path, "tokenizer.ggml.tokens are not as many different strings as there are token types")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    check_merges(source, vocabulary, merges)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(number, token) for token, number in vocabulary.items() if types[number] == TokenType.CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def check_merges(source: GgufFile, vocabulary: dict[str, int], merges: list[str]) -> None:
    """Raise `CorruptError` for the first merge that is not two tokens, a space between, whose join is a token."""
    for merge in merges:
        pair = str(merge).split(" ")
        if len(pair) != 2 or not all(part in vocabulary for part in (*pair, "".join(pair))):
            raise corrupt(source.path, f"tokenizer.ggml.merges: {merge!r} joins what is not in the vocabulary")


def added_token(number: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def tokenizer_config(source: GgufFile, max_length: int) -> dict[str, Any]:
    tokens = source.field("tokenizer.ggml.tokens", list)
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[token_id(source, key)] for role, key in roles.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": source.field("tokenizer.chat_template", str),
    }


def token_id(source: GgufFile, role: str) -> int:
    name = f"tokenizer.ggml.{role}_token_id"
    number = source.field(name, int)
    if not 0 <= number < len(source.field("tokenizer.ggml.tokens", list)):
        raise corrupt(source.path, f"{name} {number} is outside the vocabulary")
    return number
