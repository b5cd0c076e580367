"""Streamed Markdown: append-only, safe, word by word, and the same screen for any pieces."""

from __future__ import annotations

import io
import random
import re
import time
from collections.abc import Iterable, Iterator

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console

from mixlocal.cli.markdown import MarkdownStream, render_markdown
from mixlocal.cli.safe_text import MAX_MARKS, safe_text

HOLD = 120
SGR = re.compile(r"\x1b\[[0-9;]*m")
FURNITURE = re.compile(r"[\s\u2500-\u257f]+")  # white space, bars of quotes, rules of tables: they depend on the width
FIXED = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def console(width: int = 80, *, colour: bool = False) -> Console:
    return Console(
        file=io.StringIO(), width=width, height=24, force_terminal=colour, color_system="truecolor" if colour else None,
        _environ={},
    )  # fmt: skip


def written(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def rendered(text: str, width: int = 80, *, colour: bool = False) -> str:
    out = console(width, colour=colour)
    render_markdown(out, text)
    return written(out)


def streamed(pieces: Iterable[str], width: int = 80, *, colour: bool = False) -> str:
    out = console(width, colour=colour)
    stream = MarkdownStream(out)
    for piece in pieces:
        stream.push(piece)
    stream.finish()
    return written(out)


def shown_after(text: str, width: int = 80) -> str:
    """What is on the screen before the end of the answer is known."""
    out = console(width)
    MarkdownStream(out).push(text)
    return written(out)


def chunks(text: str, size: int) -> Iterator[str]:
    return (text[at : at + size] for at in range(0, len(text), size))


def cut(text: str, generator: random.Random) -> list[str]:
    places = sorted(generator.choices(range(len(text) + 1), k=generator.randint(0, 8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def screen(output: str) -> list[str]:
    """The lines of an 80x24 terminal, those that scrolled away first."""
    terminal = pyte.HistoryScreen(80, 24, history=5000, ratio=0.5)
    stream = pyte.Stream(terminal)
    for character in output.replace("\n", "\r\n"):
        stream.feed(character)
    above = ["".join(line[column].data for column in range(80)) for line in terminal.history.top]
    return [line.rstrip() for line in (*above, *terminal.display)]


def essence(output: str) -> str:
    return FURNITURE.sub("", SGR.sub("", output))


# --- what is shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain *em* **strong** `code` ~~gone~~", "plain em strong code gone\n"),
        ("***both*** **a *b* c** **a***b*", "both a b c ab\n"),
        ("2 * 3 * 4, snake_case_name, \\*no\\*", "2 * 3 * 4, snake_case_name, *no*\n"),
        ("`` a ` b `` and `x", "a ` b and `x\n"),
        ("# One\ntext\n## Two ##\n", "One\n\ntext\n\nTwo\n"),
        ("[t](http://u) [http://u](http://u) <http://v>", "t (http://u) http://u http://v\n"),
        ("![alt](http://i) [x](javascript:y) [a][b]", "alt (http://i) [x](javascript:y) [a][b]\n"),
        ("- a\n- b\n  - c\n\n- d", " • a\n • b\n    • c\n\n • d\n"),
        ("9. a\n10. b\n11. c", " 9. a\n10. b\n11. c\n"),
        ("1. a\n   more\n1. b\nlazy", " 1. a more\n 2. b lazy\n"),
        ("> a\nlazy\n> > b\n>\n> c", "│ a lazy\n│ │ b\n│\n│ c\n"),
        ("a\n\n---\n\nb", f"a\n\n{'─' * 20}\n\nb\n"),
        ("Title\n===\nTwo\n---", f"Title === Two\n\n{'─' * 20}\n"),
        ("[a]: http://u\n\n[a]", "[a]: http://u\n\n[a]\n"),
        ("<b>x</b>\n<div>\n\n&lt;&copy;", "<b>x</b> <div>\n\n<©\n"),
        ("a  \nb\\\nc\nd", "a\nb\nc d\n"),
        ("a\n```python\nif x:\n\n\tf()\n```\nb", "a\n\nif x:\n\n    f()\n\nb\n"),
        ("- a\n  ```nonesuch\n  b\n   c\n  ```\n- d", " • a\n\nb\n c\n\n • d\n"),
        ("    code\n\n    more\ntext", "code\n\nmore\n\ntext\n"),
        ("```\nunclosed", "unclosed\n"),
        ("-\n- b\n-", " •\n • b\n •\n"),
        ("|a|b|\n|-|-|\n|1|`2`|\nend", "a   b\n─────\n1   2\n\nend\n"),
        ("|a|b|\n|-:|-|\n|1|2|3|", "a   b\n─────────\n1   2   3\n"),
        ("|a|b|\n|-|\nc", "|a|b| |-| c\n"),
        ("|a|\n", "|a|\n"),
        ("", ""),
        ("\n\n", ""),
    ],
)  # fmt: skip
def test_what_is_shown(text: str, shown: str) -> None:
    assert rendered(text) == shown
    assert streamed(text) == shown


def test_words_are_wrapped_and_indented() -> None:
    text = "- one two three four five\n  > six seven eight nine"
    assert rendered(text, 16) == " • one two three\n   four five\n   │ six seven\n   │ eight nine\n"
    assert rendered("1. " + "a" * 30, 20) == " 1. " + "a" * 16 + "\n    " + "a" * 14 + "\n"


def test_where_there_is_no_room_for_margins_there_are_none() -> None:
    assert rendered("- ab cd\n  - ef", 4) == "• ab\ncd\n• ef\n"
    assert rendered("12. a中", 1) == "1\n2\n.\na\n中\n"


def test_wide_characters_are_not_cut_and_begin_no_line_with_a_stop() -> None:
    assert rendered("中文字符测试", 5) == "中文\n字符\n测试\n"
    assert rendered("中文。字", 4) == "中\n文。\n字\n"
    assert rendered("ab「中」c", 6) == "ab\n「中」\nc\n"
    assert rendered("👩\u200d👧👩\u200d👧", 5) == "👩\u200d👧\n👩\u200d👧\n"


def test_code_can_be_copied() -> None:
    """No frame, no padding, no line of it broken, no trailing spaces added."""
    code = "def f(x):\n    return '" + "y" * 100 + "'"
    indented = code.replace("def", "   def").replace("    return", "       return")
    assert rendered(f"1. a\n\n   ```python\n{indented}\n   ```", 40).endswith(f"\n\n{code}\n")
    coloured = rendered(f"```python\n{code}\n```", 40, colour=True)
    assert coloured != SGR.sub("", coloured) == f"{code}\n"


def test_a_table_too_wide_is_wrapped_or_told_in_rows() -> None:
    table = "| name | text |\n|---|---|\n| alpha | several words here |\n"
    assert rendered(table, 24).split("\n")[2:4] == ["alpha   several words", "        here"]
    long = f"|a|b|\n|-|-|\n|{'x' * 20}|{'y' * 30}|\n"
    assert rendered(long, 30).count("x") == 20
    assert rendered(long, 30).count("y") == 30
    assert rendered(table, 12) == "name │ text\nalpha │\nseveral\nwords here\n"


def test_no_hyperlinks_and_no_colour_without_colour() -> None:
    text = "# h\n[a](http://b) **c** `d`\n```python\nx = 1\n```"
    assert "\x1b[" in rendered(text, colour=True)
    assert "\x1b]" not in rendered(text, colour=True)
    for out in (console(), Console(file=io.StringIO(), width=80, force_terminal=True, no_color=True, _environ={})):
        render_markdown(out, text)
        assert "\x1b" not in written(out)


# --- the structure is CommonMark's: markdown-it parses the whole and must see the same

ORACLE = MarkdownIt("commonmark", {"html": False, "maxNesting": 200}).enable("strikethrough")
ORACLE.disable(["lheading", "reference", "html_block"])


class Expected:
    """Lines from the tokens of a whole text, without blank ones."""

    def __init__(self, text: str) -> None:
        self.lines: list[str] = []
        self._margins: list[list[str]] = []  # first, rest: the first is used up
        self._numbers: list[int | None] = []
        for token in ORACLE.parse(text):
            self._take(token)
        self.lines = [line for line in map(squeezed, self.lines) if line]

    def _put(self, text: str) -> None:
        self.lines.append("".join(margin.pop(0) if len(margin) > 1 else margin[0] for margin in self._margins) + text)

    def _take(self, token: Token) -> None:
        kind = token.type
        if kind == "blockquote_open":
            self._margins.append(["│ "])
        elif kind in ("bullet_list_open", "ordered_list_open"):
            self._numbers.append(int(token.attrs.get("start", 1)) if kind[0] == "o" else None)
        elif kind in ("bullet_list_close", "ordered_list_close"):
            self._numbers.pop()
        elif kind == "list_item_open":
            self._margins.append([self._marker(token), " " * len(self._marker(token))])
            self._numbers[-1] = None if self._numbers[-1] is None else self._numbers[-1] + 1
        elif kind in ("list_item_close", "blockquote_close"):
            if len(self._margins[-1]) > 1:
                self._put("")
            self._margins.pop()
        elif kind == "hr":
            self._put("─" * 20)
        elif kind in ("fence", "code_block"):
            if any(len(margin) > 1 for margin in self._margins):
                self._put("")
            self.lines += token.content.split("\n")
        elif kind == "inline":
            for line in self._inline(token.children or []):
                self._put(line)

    def _marker(self, token: Token) -> str:
        number = self._numbers[-1]
        return " • " if number is None else f"{number}{token.markup} ".rjust(4)

    def _inline(self, tokens: list[Token]) -> Iterator[str]:
        parts = []
        for token in tokens:
            if token.type == "link_close":
                parts.append(" (http://u)")
            parts.append({"softbreak": " ", "hardbreak": "\n"}.get(token.type, token.content))
        yield from (line for line in "".join(parts).split("\n") if line.strip())


def squeezed(line: str) -> str:
    return re.sub(" +", " ", line.rstrip("│ "))


def generated_lines(generator: random.Random) -> str:
    indents = ["", "", "", "  ", "   "]
    marks = [
        "- ", "* ", "+ ", "1. ", "2. ", "3) ", "10. ", "> ", ">", "# ", "### ", "```", "~~~", "---", "* * *", "-", "1.",
        "-    ", "-      ", "~~~py", "word", "x y", "*em* `c o`", "**b** ~~s~~", "[l](http://u)", "a  ", "b\\", "===",
        "&amp; \\* x", "#", "# t #", "## u ##x", "#x",
    ]  # fmt: skip
    lines = []
    for _ in range(generator.randint(1, 10)):
        if generator.random() < 0.2:
            lines.append(generator.choice(["", "", "  ", ">"]))
        else:
            start = "".join(generator.choices(marks, k=generator.randint(0, 2)))
            lines.append(generator.choice(indents) + start + generator.choice(["foo", "bar baz", " q", ""]))
    return "\n".join(lines)


def test_blocks_are_those_of_commonmark() -> None:
    generator = random.Random(7)
    for _ in range(1500):
        text = generated_lines(generator)
        lines = [squeezed(line) for line in rendered(text, 10_000).split("\n")]
        assert [line for line in lines if line] == Expected(text).lines, repr(text)


# --- pieces do not matter, and nothing is taken back

FRAGMENTS = [
    "*", "**", "***", "_", "`", "``", "```", "~~", "~~~", "[",
    "](", "]", ")", "!", "<", "http://a.b", ">", "&",
    "&amp;", "&#27;", "&#x202e;", "&#10;", "\\", "\n", "\n\n", "  \n", "# ", " #", "- ", "* ", "1. ", "2) ",
    "> ", "    ", "\t",
    "|", "|---|", "|a|b|\n|-|-|\n", "---", "a", "word", "two words", "long" * 9, "中文", "。", "👩\u200d👧", "e\u0301",
    "\u0301" * 12, "\x1b[31m", "\x9b", "\r", "\u202e", "\u2028", "\u00a0", "\n===\n", "```py\n", "f = '''\n", "<div>",
    "[t](u)", "☺\ufe0f", "\u200d", "0", "9.",
]  # fmt: skip
garbage = st.lists(st.sampled_from(FRAGMENTS), max_size=40).map("".join)


@FIXED
@given(garbage, st.sampled_from([1, 2, 5, 12, 40, 80, 500]), st.booleans(), st.randoms(use_true_random=False))
def test_any_pieces_of_any_text(text: str, width: int, colour: bool, generator: random.Random) -> None:
    whole = rendered(text, width, colour=colour)
    assert streamed(text, width, colour=colour) == whole
    assert streamed(cut(text, generator), width, colour=colour) == whole


@FIXED
@given(st.text(st.characters(exclude_categories=()), max_size=60), st.sampled_from([1, 7, 80]))
def test_any_characters(text: str, width: int) -> None:
    whole = rendered(text, width)
    assert streamed(text, width) == whole
    assert whole == "" or whole.endswith("\n")


def test_any_generated_markdown() -> None:
    generator = random.Random(8)
    for _ in range(300):
        text = generated_lines(generator)
        assert streamed(cut(text, generator)) == rendered(text), repr(text)


def test_output_only_grows_and_ends_a_line() -> None:
    out = console(30)
    stream = MarkdownStream(out)
    before = ""
    for piece in chunks(answer(), 3):
        stream.push(piece)
        assert written(out).startswith(before)
        before = written(out)
    stream.finish()
    stream.finish()
    assert written(out).endswith("\n")
    assert not written(out).endswith("\n\n")
    assert before.count("\n") > 100


# --- safety

OPENERS = ["\x1b[", "\x1b]", "\x1bP", "\x1b_", "\x1b^", "\x1bX", "\x9b", "\x9d", "\x90", "\x9f", "\x9e", "\x98"]
LINK = "8;;http://evil\x1b\\t\x1b]8;;\x1b\\"
BODIES = ["31m", "2J", "52;c;ZXZpbA==\x07", LINK, "](http://u)", "[a](http://u)", "q#0\x1b\\"]
ENTITIES = ["&#x202e;", "&#13;", "&#12;", "&#x9b;", "&#27;", "&zwnj;", "&shy;", "&#xe041;", "&#xe0041;", "&rlm;"]
FORBIDDEN = [
    *(chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"),
    *map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0x200B, 0x2010))),
    *map(chr, (0x2028, 0x2029, *range(0xE0000, 0xE0080), 0xFEFF)),
]  # fmt: skip
FRAMES = [
    "{}", "**{}**", "`{}`", "# {}", "- {}\n", "|{}|\n|-|\n", "```python\n'{}'\n```", "[{}](http://{})", "<http://{}>",
]  # fmt: skip


def assert_safe(text: str, pieces: list[str], width: int) -> None:
    """The colours are all that a terminal is told beyond text: without them it is what a plain file gets."""
    plain, coloured = rendered(text, width), streamed(pieces, width, colour=True)
    assert SGR.sub("", coloured) == plain, ascii(text)
    assert not set(plain) & (set(FORBIDDEN) - {"\u200d"}), ascii(text)


def test_control_sequences_in_every_place_and_split() -> None:
    cases = 0
    for number, payload in enumerate(opener + body for opener in OPENERS for body in BODIES):
        text = FRAMES[number % len(FRAMES)].replace("{}", payload)
        for place in range(len(text) + 1):
            assert_safe(text, [text[:place], text[place:]], 80)
            cases += 1
    assert cases > 1000


def test_random_mixtures_stay_text() -> None:
    generator = random.Random(18)
    parts = [*FORBIDDEN, *ENTITIES, *FRAGMENTS, *(opener + body for opener in OPENERS for body in BODIES)]
    for _ in range(1500):
        text = "".join(generator.choices(parts, k=generator.randint(1, 12)))
        assert_safe(text, cut(text, generator), generator.choice([3, 20, 80]))


@pytest.mark.parametrize("character", FORBIDDEN, ids=lambda character: f"{ord(character):04x}")
def test_each_is_shown_as_it_is_elsewhere(character: str) -> None:
    shown = safe_text(character).replace("\u200d", "<U+200D>")  # it joins nothing here
    assert rendered(f"a{character}(http://u) *b*") == f"a{shown}(http://u) b\n"


@pytest.mark.parametrize("entity", ENTITIES)
def test_markdown_cannot_bring_them_back(entity: str) -> None:
    for frame in (*FRAMES, "**a{}b**", "<http://h/%1b%9b%e2%80%ae{}>", "[x](http://h/%1b{})"):
        text = frame.replace("{}", entity)
        assert_safe(text, list(text), 80)


def test_a_flood_of_marks_is_bounded_even_in_parts() -> None:
    for flood in ("\u0301" * 500, "&#x301;" * 500, "\u0301" * 8 + "**" + "\u0301" * 8 + "**"):
        shown = rendered(f"a{flood} b")
        assert max(len(run) for run in re.findall("\u0301+", shown)) <= MAX_MARKS


# --- time


def test_a_paragraph_appears_word_by_word() -> None:
    words = [f"word{number}" for number in range(60)]
    for frame in ("", "- ", "# ", "> ", "1. a\n   - "):
        for count in (3, 30, 57):
            shown = shown_after(frame + " ".join(words[:count]))
            assert essence(shown).endswith("".join(words[: count - 1])), frame
            assert words[count - 1] not in shown
    assert words[2] in shown_after(" ".join(words[:3]) + " ")


def test_ideographs_do_not_wait_for_a_space() -> None:
    assert essence(shown_after("中文字符测试")) == "中文字符测"


def test_code_appears_line_by_line_and_a_table_at_its_end() -> None:
    assert shown_after("```python\na = 1\nb =") == "a = 1\n"
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    assert shown_after(table) == ""
    assert shown_after(table + "\n") == "a   b\n─────\n1   2\n"
    assert shown_after(table + "T") == "a   b\n─────\n1   2\n"


@pytest.mark.parametrize("opener", ["**", "*", "_", "`", "[", "~~", "![", "***"])
def test_an_open_delimiter_holds_text_for_a_while(opener: str) -> None:
    filler = "some words that go on " * 20
    assert shown_after(f"before {opener}" + filler[: HOLD // 2]).strip() == "before"
    late = shown_after(f"before {opener}" + filler[: HOLD + 10])
    assert essence(late).startswith(f"before{opener}somewords")
    assert essence(rendered(f"before {opener}" + filler[: HOLD + 10])).startswith(f"before{opener}somewords")
    assert rendered(f"a {opener}b\n\nc") == f"a {opener}b\n\nc\n"


@pytest.mark.parametrize(
    ("opener", "closer"), [("**", "** e"), ("_", "_"), ("`", "`"), ("[", "](u) e"), ("**`", "`** e"), ("***a*", "** e")]
)
def test_a_delimiter_that_closes_about_the_limit(opener: str, closer: str) -> None:
    """At 120 characters it does, at 121 not: for every way the pieces may come."""
    outputs = set()
    for length in range(HOLD - 12, HOLD + 4):
        text = f"x {opener}{'b' * length}{closer}\n"
        whole = rendered(text, 500)
        outputs.add(whole.replace("b", ""))
        assert streamed(text, 500) == whole
        for size in (3, HOLD - 1, HOLD, HOLD + 1, HOLD + 2):
            assert streamed(chunks(text, size), 500) == whole
    assert len(outputs) > 1


def test_a_closed_delimiter_holds_nothing() -> None:
    assert shown_after("a **b c** d e ") == "a b c d e"
    assert shown_after("a * b [x] `c` snake_case <b e ") == "a * b [x] c snake_case <b e"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 8000, "*[" * 4000, "**a*b " * 1300, "_a**" * 2000, "[a](b c)" * 1000, "-" * 8000, "> " * 4000,
        "`a``" * 2000,
    ],
)  # fmt: skip
def test_garbage_takes_no_longer_than_an_answer(text: str) -> None:
    began = time.process_time()
    streamed(chunks(text, 4))
    assert time.process_time() - began < 8  # about 0.7 s alone; what grows with the square takes a minute


# --- a long answer


def answer() -> str:
    """About 4,000 tokens of what a model writes."""
    generator = random.Random(2024)
    words = ["the", "router", "picks", "two", "experts", "for", "every", "token", "while", "attention", "stays", "here"]

    def prose(count: int) -> str:
        said = generator.choices(words, k=count)
        said[count // 2] = f"**{said[count // 2]} {said[0]}**"
        said[count // 3] = f"`{said[count // 3]}_{said[1]}`"
        return " ".join(said).capitalize() + "."

    parts = []
    for section in range(1, 9):
        python = "".join(f"def step_{n}(x):\n    \"\"\"Say.\"\"\"\n    return x * {n}  # it\n\n" for n in range(3))
        rust = f"fn main() {{\n    let x = {section};\n    println!(\"{{}}\", x);\n}}\n"
        items = [
            f"{n}. {prose(9)}\n   - {prose(14)}\n   - [{prose(3)}](https://example.org/{n})" for n in range(8, 12)
        ]
        rows = [f"| e{n} | {n * section} | {n}% |" for n in range(5)]
        parts += [
            f"## {section}. {prose(4)}", prose(80), "\n".join(items), f"```python\n{python}```",
            "混合专家模型在每一层选择两个专家、" * 3 + "然后把结果相加。",
            "\n".join(["| name | size | share |", "|---|--:|:-:|", *rows]),
            f"> {prose(40)}\n> - {prose(5)}", f"```rust\n{rust}```",
        ]  # fmt: skip
    return "\n\n".join(parts)


def test_a_long_answer_gives_the_screen_of_one_rendering() -> None:
    text = answer()
    assert 15_000 < len(text) < 20_000
    began = time.process_time()
    output = streamed(chunks(text, 4), colour=True)
    assert time.process_time() - began < 4  # about 0.6 s alone
    lines = screen(output)
    assert lines == screen(rendered(text, colour=True))
    assert [line for line in lines if line] == [line for line in rendered(text).split("\n") if line]
    assert sum("def step_1" in line for line in lines) == 8


def test_a_long_answer_on_a_terminal_of_changing_size() -> None:
    text = answer()
    generator = random.Random(32)
    pieces = list(chunks(text, 4))
    changes = set(generator.sample(range(len(pieces)), 200))
    out = console()
    terminal = pyte.Stream(display := pyte.Screen(80, 24))
    stream = MarkdownStream(out)
    seen = 0
    for number, piece in enumerate(pieces):
        if number in changes:
            columns, rows = generator.choice([(1, 1), (20, 5), (500, 200), (80, 24), (2, 3), (33, 10), (7, 7)])
            out.size = (columns, rows)
            display.resize(rows, columns)
        stream.push(piece)
        terminal.feed(written(out)[seen:].replace("\n", "\r\n"))
        seen = len(written(out))
    stream.finish()
    assert essence(written(out)) == essence(rendered(text))


def test_a_new_width_ends_the_line_and_is_obeyed() -> None:
    out = console(40)
    stream = MarkdownStream(out)
    stream.push("- one two three four ")
    out.width = 13
    stream.push("five six seven eight ")
    stream.finish()
    assert written(out) == " • one two three four\n   five six\n   seven\n   eight\n"
    out = console(14)
    stream = MarkdownStream(out)
    stream.push("> one two ")
    out.width = 40
    stream.push("three ")
    stream.finish()
    assert written(out) == "│ one two\n│ three\n"


@FIXED
@given(garbage, st.lists(st.sampled_from([1, 2, 9, 20, 80, 500]), min_size=1), st.randoms(use_true_random=False))
def test_no_character_is_lost_or_doubled_by_resizing(text: str, widths: list[int], generator: random.Random) -> None:
    text = text.replace("|", "/")  # a table wraps words within its cells: another order
    out = console()
    stream = MarkdownStream(out)
    for piece in cut(text, generator):
        out.width = generator.choice(widths)
        stream.push(piece)
    stream.finish()
    assert essence(written(out)) == essence(rendered(text))
