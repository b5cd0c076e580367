"""Tokenizers against their oracles, mistral-common's v1 and `tokenizers` itself; and what they tell of themselves."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from vocabularies import ANY_TEXT, byte_level_document

from mixlocal.app.text_stream import TextStream
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.errors import RefusedError, UsageError

ATOMS = [
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\v", "\f", "\0", "\x01", "\x1b[31m", "\x7f", "\x85", "\xa0",
    "\xad",
    "a", "Hello", "hello world", "I don't", "naïve café", "e\u0301", "a\u0300\u0301\u0302\u0303", "\u0301", "Å", "ﬁ",
    "ß",
    "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "👍🏽", "\u200b", "\u200d", "\ufe0f", "\ufeff", "\u202e", "\u2028", "\ufffd",
    "\ufffe", "\U0010ffff",
    "漢字", "日本語のテキスト", "한국어", "ไทย", "नमस्ते", "مرحبا بالعالم", "שלום",
    "Ελληνικά", "Привет", "\U0001d518\U0001d52b", "𒀀",
    "<s>", "</s>", "<unk>", "<0x41>", "<0x0A>", "[INST]", "[/INST]", "[INST] x [/INST]", "<|im_start|>", "<|im_end|>",
    "▁", "▁▁a",
    "x = [i for i in range(10)]", "if a:\n    return b\n", "\tint main() { return 0; }\n",
    "{\"a\": [1, 2.5e-3, null]}", "// ok",
    "https://example.org/a?b=c&d=%20#x", "user@example.org", "C:\\temp\\x", "$x^2$", "`code`", "```py\nx\n```",
    "1234567890", "3.14",
    "...", "!!!", "—", "“q”", "a,b;c", "ALLCAPS", "camelCase", "snake_case", "#" * 40, "=" * 200, "ab" * 500,
    " " * 300, "\n" * 100,
    "a" * 1000, "é" * 300, "😀" * 100, "漢" * 300,
]  # fmt: skip


def texts() -> list[str]:
    """Every atom alone, between spaces and newlines, and joined with its neighbours: over 600 different strings."""
    made = list(ATOMS)
    for atom, after in zip(ATOMS, ATOMS[1:] + ATOMS[:1], strict=True):
        made += [
            f" {atom}",
            f"{atom} ",
            f"  {atom}  ",
            f"\n{atom}\t",
            atom + after,
            f"{after} {atom}\n{after}",
            f"x{atom}x",
        ]
    return list(dict.fromkeys(made))


TEXTS = texts()


def test_there_are_enough_texts() -> None:
    assert len(TEXTS) >= 600


def test_v1_encodes_as_mistral_common(v1: Tokenizer, oracle: Any) -> None:
    assert [(t, v1.encode(t)) for t in TEXTS] == [(t, oracle.encode(t, bos=False, eos=False)) for t in TEXTS]


@given(text=ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_v1_encodes_any_text_as_mistral_common(v1: Tokenizer, oracle: Any, text: str) -> None:
    ids = v1.encode(text)
    assert ids == oracle.encode(text, bos=False, eos=False)
    assert v1.decode(ids) == oracle.decode(ids)


def test_tokenizer_json_of_mixtral_encodes_as_mistral_common(llama: Tokenizer, oracle: Any) -> None:
    assert [(t, llama.encode(t)) for t in TEXTS] == [(t, oracle.encode(t, bos=False, eos=False)) for t in TEXTS]


def test_byte_level_encodes_as_the_library(smol: Tokenizer, smol_library: tokenizers.Tokenizer) -> None:
    for special in (False, True):
        smol_library.encode_special_tokens = not special
        wanted = [(t, smol_library.encode(t, add_special_tokens=False).ids) for t in TEXTS]
        assert [(t, smol.encode(t, special=special)) for t in TEXTS] == wanted


@pytest.mark.parametrize(
    "text", ["<s>", "x</s>", "<s>[INST] <s> [/INST]</s>", "<unk><s>", "<|im_start|>system\n<|im_end|>"]
)
def test_user_text_never_becomes_a_control_token(v1: Tokenizer, llama: Tokenizer, smol: Tokenizer, text: str) -> None:
    for tokenizer in (v1, llama, smol):
        ids = tokenizer.encode(text)
        assert all(tokenizer.is_text(i) for i in ids)
        assert tokenizer.decode(ids) == text


def test_trusted_text_holds_control_tokens(v1: Tokenizer, llama: Tokenizer, smol: Tokenizer) -> None:
    for tokenizer in (v1, llama):
        assert tokenizer.encode("<s>hi</s>", special=True) == [1, *tokenizer.encode("hi"), 2]
    assert smol.encode("<|im_start|>user<|im_end|>", special=True) == [1, *smol.encode("user"), 2]


def test_a_control_token_that_plain_text_reaches_is_spelled_in_bytes(tmp_path: Path) -> None:
    """`ignore_merges` takes a whole pre-token from the vocabulary, control tokens included."""
    document = byte_level_document()
    document["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    document["model"]["ignore_merges"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("<|im_end|>")
    assert all(tokenizer.is_text(i) for i in ids)
    assert tokenizer.decode(ids) == "<|im_end|>"


def test_half_a_surrogate_pair_is_a_usage_error(v1: Tokenizer, smol: Tokenizer) -> None:
    for tokenizer in (v1, smol):
        with pytest.raises(UsageError, match=r"U\+DC80.*character 2"):
            tokenizer.encode("ab\udc80")


def test_a_megabyte_is_encoded_in_seconds(v1: Tokenizer, llama: Tokenizer, smol: Tokenizer) -> None:
    for tokenizer in (v1, llama, smol):
        for text in ("hello wörld " * 40_000, "a" * 500_000, "<|im_start|>" * 20_000):
            begin = time.perf_counter()
            tokenizer.encode(text)
            assert time.perf_counter() - begin < 5


def test_v1_decodes_as_mistral_common(v1: Tokenizer, oracle: Any) -> None:
    for text in TEXTS:
        ids = oracle.encode(text, bos=False, eos=False)
        assert v1.decode(ids) == oracle.decode(ids)
        assert v1.decode([1, *ids, 2]) == oracle.decode([1, *ids, 2])


def test_token_bytes_are_what_a_token_adds(v1: Tokenizer, smol: Tokenizer) -> None:
    word = v1.encode("world")[0]
    assert v1.token_bytes(word) == b" world"
    assert v1.token_bytes(word, first=True) == b"world"
    assert [v1.token_bytes(i) for i in (0, 1, 2, 3, 258)] == [" ⁇ ".encode(), b"", b"", b"\0", b"\xff"]
    assert b"".join(smol.token_bytes(i) for i in smol.encode("é 😀")) == "é 😀".encode()
    assert smol.token_bytes(1) == b""


@pytest.mark.parametrize("token_id", [-1, 32000, 2**31, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(v1: Tokenizer, llama: Tokenizer, token_id: int) -> None:
    for tokenizer in (v1, llama):
        for call in (tokenizer.token_bytes, tokenizer.is_text, TextStream(tokenizer).push):
            with pytest.raises(RefusedError, match="outside the tokenizer's 32000 ids"):
                call(token_id)
        with pytest.raises(RefusedError):
            tokenizer.decode([token_id])


def test_v1_has_its_own_ends(v1: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (v1, llama):
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (32000, 1, (2,))
        assert tokenizer.adds_bos


def test_smol_names_a_bos_but_puts_none(smol: Tokenizer) -> None:
    assert (smol.bos_id, smol.eos_ids, smol.adds_bos) == (1, (2,), False)


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"generation_config.json": {"eos_token_id": [2, 0, 2]}, "config.json": {"eos_token_id": 1}}, (2, 0)),
        ({"generation_config.json": {"eos_token_id": 0}, "tokenizer_config.json": {"eos_token": "<|im_end|>"}}, (0,)),
        ({"generation_config.json": {"eos_token_id": None}, "config.json": {"eos_token_id": 1}}, (1,)),
        ({"generation_config.json": {"eos_token_id": []}, "config.json": {"eos_token_id": 1}}, (1,)),
        ({"config.json": {"eos_token_id": 0}, "tokenizer_config.json": {"eos_token": "<|im_end|>"}}, (0,)),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}}}, (2,)),
        ({}, ()),
    ],
)
def test_generation_config_names_eos_first(
    tmp_path: Path, smol_folder: Path, files: dict[str, object], eos: tuple[int, ...]
) -> None:
    shutil.copy(smol_folder / "tokenizer.json", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).eos_ids == eos


def test_added_tokens_extend_a_sentencepiece_model(tmp_path: Path, v1_folder: Path) -> None:
    """Dolphin and other Mixtral finetunes put their chat tokens after the model's own 32000 pieces."""
    shutil.copy(v1_folder / "tokenizer.model", tmp_path)
    added = {"1": {"content": "<s>", "special": True}, "32001": {"content": "<|im_start|>", "special": True}}
    config = {"eos_token": "<|im_start|>", "add_bos_token": False, "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.adds_bos) == (32002, (32001,), False)
    assert tokenizer.encode("<|im_start|>x", special=True) == [32001, *tokenizer.encode("x")]
    assert tokenizer.decode([32000, 32001, 32000]) == ""
    assert tokenizer.decode(tokenizer.encode("<|im_start|>")) == "<|im_start|>"
