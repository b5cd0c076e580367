"""One line changes; a file that cannot be changed so stays as it is."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlocal.app.config import literal
from mixlocal.app.config_edit import with_value, without
from mixlocal.errors import NotFoundError, RefusedError

FILE = Path("config.toml")


@pytest.mark.parametrize(
    ("text", "key", "value", "changed"),
    [
        ("", ("a",), 1, "a = 1\n"),
        ("b = 1", ("a",), 2, "b = 1\na = 2\n"),
        ("a = 1", ("a",), 2, "a = 2\n"),
        ("a=1# x\n", ("a",), 2, "a=2# x\n"),
        ("  a  =  '#'   # x\n", ("a",), "y", '  a  =  "y"   # x\n'),
        ("a = '''#''' # x\n", ("a",), True, "a = true # x\n"),
        ("a = [1, '#]'] # x\n", ("a",), [2], "a = [2] # x\n"),
        ("max_tokens = 1\n", ("max-tokens",), 2, "max_tokens = 2\n"),
        ('"a" = 1\n', ("a",), 2, '"a" = 2\n'),
        ("a = 1\r\nb = 2\r\n", ("a",), 3, "a = 3\r\nb = 2\r\n"),
        ("# hello\n", ("a",), 1, "# hello\na = 1\n"),
        ("# a = 5\n# b = 6\n", ("a",), 1, "# a = 5\na = 1\n# b = 6\n"),
        ("[t]\nb = 1\n", ("a",), 1, "a = 1\n[t]\nb = 1\n"),
        ("c = 1\n\n# of t\n[t]\nb = 1\n", ("a",), 1, "c = 1\na = 1\n\n# of t\n[t]\nb = 1\n"),
        ("[t]\na = 1\n[u]\na = 2\n", ("u", "a"), 3, "[t]\na = 1\n[u]\na = 3\n"),
        ("[t]\na = 1\n[u]\na = 2\n", ("t", "b"), 3, "[t]\na = 1\nb = 3\n[u]\na = 2\n"),
        ("[ t ] # x\n", ("t", "a"), 1, "[ t ] # x\na = 1\n"),
        ("a = 1\n", ("t", "a"), 2, "a = 1\n\n[t]\na = 2\n"),
        ("a = 1\n", ("t", "u", "a"), 2, "a = 1\n\n[t.u]\na = 2\n"),
        ("s = '''\na = 1\n[t]\n'''\na = 2\n", ("a",), 3, None),
        ("s = '''\nb = 1\n'''\na = 2\n", ("a",), 3, "s = '''\nb = 1\n'''\na = 3\n"),
        ("a = [\n1,\n]\n", ("a",), 3, None),
        ("t.a = 1\n", ("t", "a"), 3, None),
        ("t = { a = 1 }\n", ("t", "a"), 3, None),
        ("t = 1\n", ("t", "a"), 3, None),
        ("[[t]]\na = 1\n", ("t", "a"), 3, None),
        ("a = = 1\n", ("a",), 3, None),
    ],
    ids=str,
)  # fmt: skip
def test_with_value(text: str, key: tuple[str, ...], value: Any, changed: str | None) -> None:
    if changed is None:
        with pytest.raises(RefusedError, match=r"config\.toml: "):
            with_value(FILE, text, key, value)
    else:
        assert with_value(FILE, text, key, value) == changed


@pytest.mark.parametrize(
    ("text", "key", "changed"),
    [
        ("a = 1 # x\nb = 2\n", ("a",), "b = 2\n"),
        ("max_tokens = 1\n", ("max-tokens",), ""),
        ("a = 1\n[t]\na = 2\n", ("t", "a"), "a = 1\n[t]\n"),
        ("a = [\n1,\n]\n", ("a",), None),
        ("t.a = 1\n", ("t", "a"), None),
        ("t = { a = 1 }\n", ("t", "a"), None),
    ],
    ids=str,
)
def test_without(text: str, key: tuple[str, ...], changed: str | None) -> None:
    if changed is None:
        with pytest.raises(RefusedError, match="cannot be changed by line"):
            without(FILE, text, key)
    else:
        assert without(FILE, text, key) == changed


@pytest.mark.parametrize(
    ("text", "key"), [("", ("a",)), ("b = 1", ("a",)), ("a = 1", ("t", "a")), ("t = 1", ("t", "a"))]
)
def test_what_is_not_there_cannot_be_removed(text: str, key: tuple[str, ...]) -> None:
    with pytest.raises(NotFoundError, match="is not set"):
        without(FILE, text, key)


VALUES = st.one_of(st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1), st.text(), st.lists(st.text()), st.floats())
LINES = st.sampled_from(
    [
        "# note",
        "",
        "a = 1",
        "b = 'x # y' # z",
        "a_b = 2",
        "[t]",
        "a = 3 # in t",
        "[u]",
        "t.a = 1",
        "x = '''",
        "'''",
        "l = [",
        "]",
    ]
)


@given(VALUES)
def test_a_literal_means_its_value(value: Any) -> None:
    assert repr(tomllib.loads(f"x = {literal(value)}")["x"]) == repr(value)


@given(st.lists(LINES, max_size=12), st.sampled_from([("a",), ("a-b",), ("t", "a"), ("u", "b"), ("n",)]), VALUES)
def test_an_edit_does_what_it_should_or_nothing(lines: list[str], key: tuple[str, ...], value: Any) -> None:
    """Whatever the file: it comes out with the value set and every other line as it was, or it is refused."""
    text = "".join(f"{line}\n" for line in lines)
    try:
        changed = with_value(FILE, text, key, value)
    except RefusedError:
        return
    data = tomllib.loads(changed)
    for name in key[:-1]:
        data = data[name]
    assert repr(data[next(name for name in data if name.replace("_", "-") == key[-1])]) == repr(value)
    assert any(in_order([*lines[:n], *lines[n + 1 :]], changed.splitlines()) for n in range(len(lines) + 1)), changed


def in_order(some: list[str], among: list[str]) -> bool:
    left = iter(among)
    return all(line in left for line in some)
