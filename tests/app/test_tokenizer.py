"""Tokenizers against their oracles: mistral-common's v1, `tokenizers` itself; and the stream against the whole."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mixlocal.app.tokenizer import JsonTokenizer, StopScanner, TextStream, Tokenizer, load_tokenizer
from mixlocal.errors import CorruptError, MixlocalError, NotFoundError, RefusedError, UsageError

V1_MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MAKE_CONTROL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

CORPUS = ["The quick brown fox jumps over the lazy dog. 0123456789", "user assistant system\nhello, wörld é 漢字 😀"] * 8

ATOMS = [
    "", " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\v", "\f", "\0", "\x01", "\x1b[31m", "\x7f", "\x85", "\xa0", "\xad",
    "a", "Hello", "hello world", "I don't", "naïve café", "e\u0301", "a\u0300\u0301\u0302\u0303", "\u0301", "Å", "ﬁ", "ß",
    "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "👍🏽", "\u200b", "\u200d", "\ufe0f", "\ufeff", "\u202e", "\u2028", "\ufffd", "\ufffe", "\U0010ffff",
    "漢字", "日本語のテキスト", "한국어", "ไทย", "नमस्ते", "مرحبا بالعالم", "שלום", "Ελληνικά", "Привет", "𝔘𝔫𝔦", "𒀀",
    "<s>", "</s>", "<unk>", "<0x41>", "<0x0A>", "[INST]", "[/INST]", "[INST] x [/INST]", "<|im_start|>", "<|im_end|>", "▁", "▁▁a",
    "x = [i for i in range(10)]", "if a:\n    return b\n", "\tint main() { return 0; }\n", "{\"a\": [1, 2.5e-3, null]}", "// ok",
    "https://example.org/a?b=c&d=%20#x", "user@example.org", "C:\\temp\\x", "$x^2$", "`code`", "```py\nx\n```", "1234567890", "3.14",
    "...", "!!!", "—", "“q”", "a,b;c", "ALLCAPS", "camelCase", "snake_case", "#" * 40, "=" * 200, "ab" * 500, " " * 300, "\n" * 100,
    "a" * 1000, "é" * 300, "😀" * 100, "漢" * 300,
]  # fmt: skip


def texts() -> list[str]:
    """Every atom alone, between spaces and newlines, and joined with its neighbours: over 600 different strings."""
    made = list(ATOMS)
    for atom, after in zip(ATOMS, ATOMS[1:] + ATOMS[:1], strict=True):
        made += [f" {atom}", f"{atom} ", f"  {atom}  ", f"\n{atom}\t", atom + after, f"{after} {atom}\n{after}", f"x{atom}x"]
    return list(dict.fromkeys(made))


TEXTS = texts()
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def v1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v1")
    shutil.copy(V1_MODEL, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def v1(v1_folder: Path) -> Tokenizer:
    return load_tokenizer(v1_folder)


@pytest.fixture(scope="module")
def oracle() -> Any:
    """mistral-common's v1 sentencepiece tokenizer."""
    return MistralTokenizer.v1().instruct_tokenizer.tokenizer


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, oracle: Any) -> Path:
    """Mixtral's tokenizer.json, made from the sentencepiece model as transformers' converter makes it."""
    vocab = {oracle.id_to_piece(i): i for i in range(oracle.n_words)}
    merges = [(p[:n], p[n:]) for p in vocab for n in range(1, len(p)) if p[:n] in vocab and p[n:] in vocab]
    score = oracle._model.get_score
    merges.sort(key=lambda pair: (-score(vocab[pair[0] + pair[1]]), -len(pair[0]), -len(pair[1])))
    control = [{"id": i, "content": c, **MAKE_CONTROL} for i, c in enumerate(["<unk>", "<s>", "</s>"])]
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    prepend = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    document = {
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "padding": None, "added_tokens": control, "normalizer": {"type": "Sequence", "normalizers": prepend},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab, "merges": merges},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    return folder


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Tokenizer:
    return load_tokenizer(llama_folder)


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
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens([tokenizers.AddedToken("<think>", special=False), tokenizers.AddedToken("two words", special=False)])
    document: dict[str, Any] = json.loads(library.to_str())
    return document


@pytest.fixture(scope="module")
def smol_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smol")
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_document()))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}')
    return folder


@pytest.fixture(scope="module")
def smol(smol_folder: Path) -> Tokenizer:
    return load_tokenizer(smol_folder)


@pytest.fixture(scope="module")
def smol_library(smol_folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(smol_folder / "tokenizer.json"))


def stream(tokenizer: Tokenizer, ids: Sequence[int], *, continuation: bool = False) -> str:
    machine = TextStream(tokenizer, continuation=continuation)
    return "".join([machine.push(i) for i in ids]) + machine.flush()


# --- encoding ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("text", ["<s>", "x</s>", "<s>[INST] <s> [/INST]</s>", "<unk><s>", "<|im_start|>system\n<|im_end|>"])
def test_user_text_never_becomes_a_control_token(
    v1: Tokenizer, llama: Tokenizer, smol: Tokenizer, text: str
) -> None:
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
    document["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
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


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_v1_decodes_as_mistral_common(v1: Tokenizer, oracle: Any) -> None:
    for text in TEXTS:
        ids = oracle.encode(text, bos=False, eos=False)
        assert v1.decode(ids) == oracle.decode(ids)
        assert v1.decode([1, *ids, 2]) == oracle.decode([1, *ids, 2])


BYTE_HEAVY = st.lists(
    st.one_of(st.integers(3, 258), st.sampled_from([0, 1, 2, 28705, 259, 264, 35]), st.integers(0, 31999)), max_size=24
)


@given(ids=BYTE_HEAVY)
@settings(max_examples=500, deadline=None)
def test_v1_streams_any_ids_as_mistral_common_decodes_them(v1: Tokenizer, oracle: Any, ids: list[int]) -> None:
    assert stream(v1, ids) == v1.decode(ids) == oracle.decode(ids)


@given(data=st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
def test_v1_bytes_decode_as_mistral_common(v1: Tokenizer, oracle: Any, data: bytes) -> None:
    ids = [3 + byte for byte in data]
    assert stream(v1, ids) == oracle.decode(ids)


@given(ids=st.lists(st.integers(0, 600), max_size=24))
@settings(max_examples=500, deadline=None)
def test_byte_level_streams_any_ids_as_the_library_decodes_them(
    smol: Tokenizer, smol_library: tokenizers.Tokenizer, ids: list[int]
) -> None:
    ids = [i for i in ids if i < smol.vocab_size]
    assert stream(smol, ids) == smol.decode(ids) == smol_library.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(259, 31999), max_size=24))
@settings(max_examples=300, deadline=None)
def test_tokenizer_json_of_mixtral_streams_as_the_library_decodes(
    llama: Tokenizer, llama_folder: Path, ids: list[int]
) -> None:
    assert isinstance(llama, JsonTokenizer)
    assert stream(llama, ids) == llama._library.decode(ids, skip_special_tokens=True)


@given(text=ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_text_survives_the_round_trip_and_the_stream(llama: Tokenizer, smol: Tokenizer, text: str) -> None:
    for tokenizer in (llama, smol):
        ids = tokenizer.encode(text)
        if "▁" not in text:
            assert stream(tokenizer, ids) == text


def test_a_stream_shows_a_character_when_it_is_whole(v1: Tokenizer) -> None:
    machine = TextStream(v1)
    shown = [machine.push(3 + byte) for byte in "a😀é".encode()]
    assert shown == ["a", "", "", "", "😀", "", "é"]
    assert machine.flush() == ""


def test_a_cut_character_is_shown_as_replacement_when_the_stream_ends(v1: Tokenizer, smol: Tokenizer) -> None:
    machine = TextStream(v1)
    assert [machine.push(3 + byte) for byte in b"\xf0\x9f"] == ["", ""]
    assert machine.flush() == "\ufffd\ufffd"  # sentencepiece: one for each byte
    ids = smol.encode("🦊")
    assert len(ids) > 2
    assert stream(smol, ids[:2]) == "\ufffd"  # one for the malformed sequence


def test_only_a_continuation_keeps_the_first_space(v1: Tokenizer, llama: Tokenizer) -> None:
    for tokenizer in (v1, llama):
        ids = tokenizer.encode("hello big world")
        assert stream(tokenizer, ids) == tokenizer.decode(ids) == "hello big world"
        assert stream(tokenizer, ids, continuation=True) == " hello big world"
        assert tokenizer.decode(ids, continuation=True) == " hello big world"
        assert stream(tokenizer, ids[1:]) == tokenizer.decode(ids[1:])


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


# --- BOS, EOS, extra tokens -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("generation_config.json", '{"eos_token_id": 99999}', "99999"),
        ("generation_config.json", '{"eos_token_id": -1}', "-1"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id"),
        ("config.json", '{"eos_token_id": "2"}', "eos_token_id"),
        ("config.json", '{"eos_token_id": [2, null]}', "eos_token_id"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "<nope>"),
        ("tokenizer_config.json", '{"bos_token": 1}', "bos_token"),
        ("tokenizer_config.json", "[]", "object"),
        ("tokenizer_config.json", '{"a"', "not JSON"),
        ("tokenizer_config.json", '{"x": ' + "[" * 200_000, "nested"),
    ],
)
@pytest.mark.parametrize("kind", ["v1_folder", "smol_folder"])
def test_a_bad_configuration_is_named(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, name: str, content: str, words: str
) -> None:
    folder: Path = request.getfixturevalue(kind)
    for file in ("tokenizer.json", "tokenizer.model"):
        if (folder / file).exists():
            shutil.copy(folder / file, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises((RefusedError, CorruptError)) as caught:
        load_tokenizer(tmp_path)
    assert name in caught.value.message
    assert words in caught.value.message


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


@pytest.mark.parametrize("added", [{"1": {"content": "<S>"}}, {"-1": {"content": "x"}}, {"4000000000": {"content": "x"}}])
def test_added_tokens_that_contradict_the_model_are_refused(
    tmp_path: Path, v1_folder: Path, added: dict[str, object]
) -> None:
    shutil.copy(v1_folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(RefusedError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


# --- malformed files --------------------------------------------------------------------------------------------------


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(NotFoundError):
        load_tokenizer(tmp_path / "nowhere")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CorruptError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = byte_level_document(300)
    change(document)
    return json.dumps(document).encode()


WRONG_DOCUMENTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda d: d.pop("model"),
    "model is a list": lambda d: d.update(model=[]),
    "model is null": lambda d: d.update(model=None),
    "unknown model": lambda d: d["model"].update(type="Oracle"),
    "vocab is a string": lambda d: d["model"].update(vocab="abc"),
    "vocab id is text": lambda d: d["model"]["vocab"].update({"!": "3"}),
    "vocab id is a float": lambda d: d["model"]["vocab"].update({"!": 3.5}),
    "vocab id is negative": lambda d: d["model"]["vocab"].update({"!": -3}),
    "vocab id is huge": lambda d: d["model"]["vocab"].update({"!": 4294967295}),
    "vocab id is enormous": lambda d: d["model"]["vocab"].update({"!": 10**30}),
    "merge of unknown tokens": lambda d: d["model"]["merges"].append(["qqq", "zzz"]),
    "merge is one word": lambda d: d["model"]["merges"].append("abc"),
    "merges is a number": lambda d: d["model"].update(merges=7),
    "added id is huge": lambda d: d["added_tokens"][0].update(id=2**31),
    "added id is another's": lambda d: d["added_tokens"][0].update(id=77),
    "added id is text": lambda d: d["added_tokens"][0].update(id="0"),
    "added content is a number": lambda d: d["added_tokens"][0].update(content=5),
    "added_tokens is an object": lambda d: d.update(added_tokens={}),
    "no decoder": lambda d: d.update(decoder=None),
    "unknown decoder": lambda d: d.update(decoder={"type": "CTC"}),
    "decoders in another order": lambda d: d.update(
        decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}
    ),
    "bad regex": lambda d: d.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
    "unknown normalizer": lambda d: d.update(normalizer={"type": "Magic"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_DOCUMENTS)
def test_a_wrong_tokenizer_json_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(edited(WRONG_DOCUMENTS[name]))
    with pytest.raises((RefusedError, CorruptError), match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert len(caught.value.message.splitlines()) == 1


def test_a_panic_of_the_library_is_a_refusal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A merge shorter than continuing_subword_prefix makes the library panic: a BaseException of no importable class."""
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"], "continuing_subword_prefix": "##"}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "decoder": decoder}))
    with pytest.raises(RefusedError, match=r"tokenizer\.json is not a usable tokenizer"):
        load_tokenizer(tmp_path)
    assert "panicked" in capfd.readouterr().err


def works_or_refuses(folder: Path) -> bool:
    """True if the folder's tokenizer can be used, False if it is refused; any other exception is a failure."""
    try:
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("hello wörld 😀 <s> 12", special=True) + tokenizer.encode("<|im_end|>\0")
        tokenizer.decode(ids)
        for token_id in range(min(tokenizer.vocab_size, 400)):
            tokenizer.token_bytes(token_id)
    except MixlocalError:
        return False
    return True


def cut_points(length: int, count: int) -> Iterator[int]:
    return iter(sorted({*range(16), *(length * n // count for n in range(count)), length - 1}))


def test_a_truncated_tokenizer_json_is_corrupt(tmp_path: Path) -> None:
    whole = json.dumps(byte_level_document(300)).encode()
    for cut in cut_points(len(whole), 150):
        (tmp_path / "tokenizer.json").write_bytes(whole[:cut])
        with pytest.raises(CorruptError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)


def test_a_truncated_tokenizer_model_never_escapes(tmp_path: Path) -> None:
    """A cut between two pieces is a valid, shorter model; only the manifest's checksum can tell."""
    whole = V1_MODEL.read_bytes()
    for cut in [*range(64), *cut_points(len(whole), 60)]:
        (tmp_path / "tokenizer.model").write_bytes(whole[:cut])
        works_or_refuses(tmp_path)
    for cut in (0, 1, 5):
        (tmp_path / "tokenizer.model").write_bytes(whole[:cut])
        assert not works_or_refuses(tmp_path)


def mutated(data: bytes, rng: random.Random) -> bytes:
    copy = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 30])):
        at = rng.randrange(len(copy))
        copy[at : at + rng.choice([0, 1, 1, 1, 4])] = rng.choice([rng.randbytes(1), rng.randbytes(3), b'"', b"0", b"9" * 9])
    return bytes(copy)


MUTATE = """
import sys, random
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import test_tokenizer as t
folder, name, count = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
whole = (folder / name).read_bytes()
rng = random.Random(7)
used = 0
for n in range(count):
    random_bytes = rng.randbytes(rng.randrange(200))
    (folder / name).write_bytes(random_bytes if n % 8 == 0 else t.mutated(whole, rng))
    used += t.works_or_refuses(folder)
print("done", used)
"""


@pytest.mark.parametrize(("name", "count"), [("tokenizer.json", 300), ("tokenizer.model", 60)])
def test_mutated_files_never_escape(tmp_path: Path, name: str, count: int) -> None:
    """In a process of its own: a signal would be a failure too."""
    whole = json.dumps(byte_level_document(300)).encode() if name == "tokenizer.json" else V1_MODEL.read_bytes()
    (tmp_path / name).write_bytes(whole)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", MUTATE, here, str(tmp_path), name, str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("done")


# --- stop strings -----------------------------------------------------------------------------------------------------


def shown_until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The specification: the first stop string to be complete, the longest of those that end together."""
    for end in range(len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)], True
    return text, False


def scan(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    scanner = StopScanner(stops)
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = scanner.push(piece)
        assert not any(stop in shown + text for stop in stops)
        shown += text
    return shown + scanner.flush(), stopped


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("hello END world", ["END"]), ("aaab", ["aab"]), ("ababac", ["abac"]), ("x\n\ny", ["\n\n"]), ("abc d", ["abc d", "bc"]),
        ("abcd", ["bcd", "abcd"]), ("😀</s>x", ["</s>"]), ("User: x", ["User:", "User"]), ("nothing", ["END"]), ("EN", ["END"]),
        ("end", []), ("ENDEND", ["END"]), ("END", ["END"]),
    ],
)  # fmt: skip
def test_a_stop_string_is_found_however_the_text_is_cut(text: str, stops: list[str]) -> None:
    wanted = shown_until_stop(text, stops)
    for cuts in range(1 << (len(text) - 1) if len(text) <= 8 else 0):
        borders = [0, *(n + 1 for n in range(len(text) - 1) if cuts >> n & 1), len(text)]
        pieces = [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]
        assert scan(pieces, stops) == wanted
    for one in range(len(text) + 1):
        for two in range(one, len(text) + 1):
            assert scan([text[:one], text[one:two], text[two:]], stops) == wanted
    assert scan(list(text), stops) == wanted


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
@settings(max_examples=500, deadline=None)
def test_any_stop_strings_over_any_borders(pieces: list[str], stops: list[str]) -> None:
    assert scan(pieces, stops) == shown_until_stop("".join(pieces), stops)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    scanner = StopScanner(["<end>"])
    assert scanner.push("abc <e") == ("abc ", False)
    assert scanner.push("x") == ("<ex", False)
    assert scanner.push("<end>tail") == ("", True)
    assert scanner.push("more") == ("", True)
    assert scanner.flush() == ""


def test_an_empty_stop_string_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="empty stop string"):
        StopScanner(["a", ""])
