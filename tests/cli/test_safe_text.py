"""Nothing from outside steers a terminal: controls are shown, floods are bounded, and the pieces do not matter."""

from __future__ import annotations

import random
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlocal.cli.safe_text import MAX_MARKS, SafeStream, safe_text

C0 = [chr(code) for code in range(0x20) if chr(code) not in "\n\t"]
CONTROLS = [*C0, "\x7f", *map(chr, range(0x80, 0xA0))]
FORMATS = [
    *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A)), *map(chr, range(0x200B, 0x2010)),
    *map(chr, range(0xE0000, 0xE0080)), "\u2028", "\u2029", "\ufeff", "\u00ad", "\u061c", "\u2060", "\ufff9",
]  # fmt: skip
OTHERS = ["\ud800", "\udfff", "\udc9b", "\ue000", "\U000f0000", "\u3164", "\u115f", "\u034f", "\ufdd0", "\uffff"]
UNSAFE = [character for character in (*CONTROLS, *FORMATS, *OTHERS) if character != "\u200d"]
BODIES = [
    "31m", "2J", "1;1H", "?1049h", "6n", "c", "!p", "3;J", "8;;http://evil\x1b\\text\x1b]8;;", "8;;file:///etc\x07x",
    "52;c;ZXZpbA==\x07", "52;p;?\x1b\\", "0;title\x07", "q#0!9~\x1b\\", "$q\"p\x9c",
    "Ga=T,f=100;AAAA\x1b\\", "1337;File=:AA\x07",
]  # fmt: skip
OPENERS = ["\x1b[", "\x1b]", "\x1bP", "\x1b_", "\x1b^", "\x1bX", "\x9b", "\x9d", "\x90", "\x9f", "\x9e", "\x98"]
PAYLOADS = [opener + body for opener in OPENERS for body in BODIES]
MARK = "\u0301"


def streamed(*pieces: str) -> str:
    stream = SafeStream()
    return "".join(map(stream.push, pieces))


def is_harmless(text: str) -> bool:
    """In categories alone: no control, format, surrogate, private or separator character but newline and tab."""
    return all(
        unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or c in "\n\t\u200d" for c in text
    ) and not set(text) & set(UNSAFE)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\x1b", "^["), ("\x00", "^@"), ("\x7f", "^?"), ("\x9b", "<U+009B>"), ("\r", "^M"), ("\x07", "^G"),
        ("\u202e", "<U+202E>"), ("\u2066", "<U+2066>"), ("\u200b", "<U+200B>"), ("\u2028", "<U+2028>"),
        ("\U000e0041", "<U+E0041>"), ("\ud800", "<U+D800>"), ("\ue000", "<U+E000>"), ("\u3164", "<U+3164>"),
        ("\n\t", "\n\t"), ("é中😀\u00a0", "é中😀\u00a0"), ("\U0001fae8", "\U0001fae8"),
    ],
)  # fmt: skip
def test_what_is_shown(raw: str, shown: str) -> None:
    assert safe_text(raw) == shown
    assert streamed(raw) == shown


@pytest.mark.parametrize("character", UNSAFE, ids=lambda character: f"{ord(character):04x}")
def test_each_alone_and_in_words(character: str) -> None:
    for text in (character, f"a{character}b", f"😀{character}😀", character * 3):
        assert is_harmless(safe_text(text)), ascii(text)
        assert streamed(*text) == streamed(text) == safe_text(text)


def test_every_payload_at_every_split() -> None:
    cases = 0
    for payload in PAYLOADS:
        text = f"é{payload}中"
        shown = safe_text(text)
        assert is_harmless(shown)
        assert shown[0] + shown[-1] == "é中"
        for cut in range(len(text) + 1):
            assert streamed(text[:cut], text[cut:]) == shown
            cases += 1
    assert len(PAYLOADS) > 200
    assert cases > 2500


def test_random_mixtures_in_random_pieces() -> None:
    generator = random.Random(33)
    parts = [*UNSAFE, *PAYLOADS, "word ", "\n", "\t", "中", "👩\u200d👧", "\u200d", MARK, MARK * 20, "\ufe0f", "[", "m"]
    for _ in range(20_000):
        text = "".join(generator.choices(parts, k=generator.randint(1, 6)))
        cuts = sorted(generator.choices(range(len(text) + 1), k=3))
        pieces = (text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] : cuts[2]], text[cuts[2] :])
        shown = streamed(*pieces)
        assert shown == streamed(text)
        assert is_harmless(shown), ascii(text)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text(st.characters(exclude_categories=()), max_size=8), max_size=8))
def test_any_split_gives_the_output_of_the_whole(pieces: list[str]) -> None:
    assert streamed(*pieces) == streamed("".join(pieces))
    assert is_harmless(streamed(*pieces))


@pytest.mark.parametrize("base", ["a", "中", " ", "\n", ""])
def test_a_flood_of_marks_is_bounded(base: str) -> None:
    shown = streamed(base, *[MARK] * 1000, "b", MARK * 3)
    assert shown == base + MARK * MAX_MARKS + "b" + MARK * 3


def test_marks_in_use_are_kept() -> None:
    for text in ("Tiếng Việt", "हिन्दी", "ก็ดีที่สุด", "שָׁלוֹם", "e\u0301\u0323"):
        assert streamed(*unicodedata.normalize("NFD", text)) == unicodedata.normalize("NFD", text)


def test_hidden_jamo_do_not_pile_up() -> None:
    assert streamed("ᄀ" + "ᅡ" * 100) == "ᄀ" + "ᅡ" * MAX_MARKS


@pytest.mark.parametrize(
    "text", ["👩\u200d👩\u200d👧", "❤\ufe0f\u200d🔥", "👩🏽\u200d🚀", "🏳\ufe0f\u200d🌈", "ශ්\u200dරී", "1\ufe0f\u20e3"]
)
def test_emoji_and_letters_stay_joined(text: str) -> None:
    assert streamed(*text) == text
    assert safe_text(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u200db", "a<U+200D>b"), ("\u200d", "<U+200D>"), ("😀\u200d\u200d", "😀\u200d<U+200D>"),
        ("😀\ufe0f\ufe0e", "😀\ufe0f<U+FE0E>"), ("a\U000e0101\U000e0102", "a\U000e0101<U+E0102>"),
    ],
)  # fmt: skip
def test_a_joiner_or_selector_with_nothing_to_do_is_shown(text: str, shown: str) -> None:
    assert streamed(*text) == streamed(text) == shown


def test_only_the_standard_library_is_imported() -> None:
    code = "import sys; old = set(sys.modules); import mixlocal.cli.safe_text; print(*set(sys.modules) - old)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "mixlocal.cli.safe_text" in names
    assert not [name for name in names if name.split(".")[0] in {"rich", "markdown_it", "torch", "pygments"}]
