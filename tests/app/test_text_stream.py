"""A stream against the whole decode of the libraries, and stop strings against their specification."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import ANY_TEXT

from mixlocal.app.text_stream import StopScanner, TextStream
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.app.tokenizer_json import JsonTokenizer
from mixlocal.errors import UsageError

BYTE_HEAVY = st.lists(
    st.one_of(st.integers(3, 258), st.sampled_from([0, 1, 2, 28705, 259, 264, 35]), st.integers(0, 31999)), max_size=24
)


def stream(tokenizer: Tokenizer, ids: Sequence[int], *, continuation: bool = False) -> str:
    machine = TextStream(tokenizer, continuation=continuation)
    return "".join([machine.push(i) for i in ids]) + machine.flush()


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
        ("hello END world", ["END"]), ("aaab", ["aab"]), ("ababac", ["abac"]), ("x\n\ny", ["\n\n"]), ("abc d",
        ["abc d", "bc"]),
        ("abcd", ["bcd", "abcd"]), ("😀</s>x", ["</s>"]), ("User: x", ["User:", "User"]), ("nothing", ["END"]), ("EN",
        ["END"]),
        ("end", []), ("ENDEND", ["END"]), ("END", ["END"]),
    ],
)  # fmt: skip
def test_a_stop_string_is_found_however_the_text_is_cut(text: str, stops: list[str]) -> None:
    wanted = shown_until_stop(text, stops)
    for cuts in range(1 << (len(text) - 1) if len(text) <= 8 else 0):
        borders = [0, *(n + 1 for n in range(len(text) - 1) if cuts >> n & 1), len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
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
