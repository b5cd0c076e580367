"""mixlocal sessions: list, show, export, rename, remove."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pexpect
import pytest
from markdown_it import MarkdownIt

from mixlocal import cli
from mixlocal.app.export import as_json, as_markdown
from mixlocal.cli.sessions import age
from mixlocal.store.kv_file import snapshot_path
from mixlocal.store.paths import Home
from mixlocal.store.paths import home as folders_of
from mixlocal.store.session_db import SavedSession, SessionDb, Turn

Sessions = Callable[..., Any]
NASTY = [
    "```python\nnever closed", "~~~~\n``` ~~~", "# You\n\n## smolmix\n\n---", "<!-- never closed", "<pre><script>",
    "a\n\n    code\n\n> quoted\n", "[a]: http://b\n\n- list\n  1. deeper", "a\r# b\r\n# c", "", "\n\n",
    "x\0\u2028# y\ud800", "text\n===", "<details>\n\n# inside", "| a |\n|--|", "\t# tab", "$$\nmath",
]  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path) -> Home:
    return folders_of(tmp_path / "home")


@pytest.fixture
def db(folders: Home) -> Iterator[SessionDb]:
    """Two chats; the first was long ago."""
    with SessionDb(folders.sessions_db) as db:
        _talk(db)
        yield db


def _talk(db: SessionDb) -> None:
    weather = db.create("weather talk", "smolmix", "q4", "")
    db.put(weather.id, 0, Turn("user", "Will it   rain\n[bold]tomorrow[/bold]?"))
    recipe = db.create("recipe", "mixtral", "q8", "Be brief.")
    db.put(recipe.id, 0, Turn("user", "How long is an egg cooked?"))
    db.put(recipe.id, 1, Turn("assistant", "Seven \x1b[31mminutes", (5, 6), interrupted=True, seed=42))
    db.describe(recipe.id, params='{"top_k": 5}')
    with db._file.transaction() as connection:
        connection.execute("UPDATE session SET updated = ? WHERE name = 'weather talk'", (time.time() - 3 * 3600 - 9,))


@pytest.fixture
def call(run: Callable[..., Any], folders: Home, monkeypatch: pytest.MonkeyPatch) -> Sessions:
    monkeypatch.setitem(cli.COMMANDS, "sessions", ("sessions", "The saved chats."))
    return lambda *arguments, before=(): run("--home", str(folders.data), *before, "sessions", *arguments)


def names(folders: Home) -> list[str]:
    with SessionDb(folders.sessions_db) as db:
        return [saved.name for saved in db.list()]


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_chats_are_listed_newest_first(call: Sessions, db: SessionDb, arguments: tuple[str, ...]) -> None:
    outcome = call(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert [line.split("  ")[0] for line in outcome.out.splitlines()] == ["NAME", "recipe", "weather talk"]
    assert outcome.out.splitlines()[1].split() == [
        "recipe", "mixtral:q8", "2", "just", "now", "How", "long", "is", "an", "egg", "cooked?",
    ]  # fmt: skip
    assert "3 h ago" in outcome.out
    assert "Will it rain [bold]tomorrow[/bold]?" in outcome.out


@pytest.mark.parametrize("command", [(), ("list",)])
def test_search_and_limit(call: Sessions, db: SessionDb, command: tuple[str, ...]) -> None:
    assert call(*command, "--search", "EGG minutes").out.splitlines()[1].startswith("recipe ")
    assert len(call(*command, "--limit", "1").out.splitlines()) == 2
    nothing = call(*command, "--search", "egg rain")
    assert (nothing.code, nothing.out) == (0, "")
    assert nothing.err == "no chat has all of these words: egg rain\n"
    assert call(*command, "--limit", "0").code == 2


def test_options_of_a_list_are_not_ignored_elsewhere(call: Sessions, db: SessionDb) -> None:
    outcome = call("--search", "egg", "rm", "recipe", "--yes")
    assert outcome.code == 2
    assert "--search" in outcome.err


def test_the_list_as_json(call: Sessions, db: SessionDb) -> None:
    for outcome in (call("--json"), call("list", "--json"), call(before=("--json",))):
        first, second = json.loads(outcome.out)
        assert (first["name"], first["model"], first["variant"], first["turns"]) == ("recipe", "mixtral", "q8", 2)
        assert (first["system"], first["params"], second["params"]) == ("Be brief.", {"top_k": 5}, {})
        assert abs(datetime.fromisoformat(first["updated"]).timestamp() - time.time()) < 60
        assert second["first"] == "Will it rain [bold]tomorrow[/bold]?"


def test_where_there_is_nothing_it_says_how_to_begin(call: Sessions, folders: Home) -> None:
    outcome = call()
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == "no chats yet; begin one with: mixlocal chat\n"
    assert call("--json").out == "[]\n"
    for arguments in (("show", "x"), ("export", "x"), ("rm", "x", "--yes"), ("rename", "x", "y")):
        outcome = call(*arguments)
        assert outcome.code == 3
        assert "mixlocal chat" in outcome.err
    assert not folders.data.exists()


def test_a_chat_is_shown_without_its_control_characters(call: Sessions, db: SessionDb) -> None:
    outcome = call("show", "rec")
    assert outcome.code == 0
    assert outcome.out == (
        "recipe (mixtral:q8, just now)\n\n[System]\nBe brief.\n\n[You]\nHow long is an egg cooked?\n\n"
        "[mixtral]\nSeven ^[[31mminutes (interrupted)\n"
    )
    assert json.loads(call("show", "rec", "--json").out)["turns"][1]["content"] == "Seven \x1b[31mminutes"


def test_a_wrong_name(call: Sessions, db: SessionDb) -> None:
    outcome = call("show", "receipe")
    assert outcome.code == 3
    assert outcome.err == "mixlocal: no chat is called 'receipe'\n  did you mean recipe?\n"
    assert call("show", "recipe", "more").code == 2
    assert call("nonsense").code == 2


def test_export_to_stdout_and_files(call: Sessions, db: SessionDb, tmp_path: Path) -> None:
    markdown = call("export", "recipe").out
    assert markdown.startswith("# recipe\n\nmixtral\\:q8, 20")
    assert markdown.endswith("## mixtral\n\n> Seven \x1b[31mminutes\n\n*(interrupted)*\n")
    as_object = call("export", "recipe", "--format", "json").out
    assert as_object.isascii()
    assert call("export", "recipe", "--json").out == call("export", "recipe", before=("--json",)).out == as_object
    for file, arguments, content in (
        ("a.md", (), markdown), ("a.json", (), as_object), ("a.txt", (), markdown), ("b.txt", ("--json",), as_object),
        ("b.json", ("--format", "md"), markdown),
    ):  # fmt: skip
        outcome = call("export", "recipe", "-o", str(tmp_path / file), *arguments)
        assert (outcome.code, outcome.out, outcome.err) == (0, "", f"wrote {tmp_path / file}\n")
        assert (tmp_path / file).read_text() == content


def test_export_replaces_nothing_unasked(call: Sessions, db: SessionDb, tmp_path: Path) -> None:
    file = tmp_path / "notes.md"
    file.write_text("mine")
    outcome = call("export", "recipe", "-o", str(file))
    assert outcome.code == 2
    assert "--force" in outcome.err
    assert file.read_text() == "mine"
    assert call("export", "recipe", "-o", str(tmp_path), "--force").code == 2
    assert call("export", "recipe", "-o", str(tmp_path / "no" / "folder.md")).code == 3
    assert call("export", "recipe", "-o", str(file), "--force").code == 0
    assert file.read_text().startswith("# recipe")


def test_json_has_all_that_was_said(db: SessionDb) -> None:
    saved = db.create(None, "smolmix", "q4", "")
    turns = [Turn("user" if n % 2 else "assistant", text, (n, n)) for n, text in enumerate(NASTY)]
    whole = json.loads(as_json(saved, turns, ids=True))
    assert (whole["format"], whole["version"], whole["id"]) == ("mixlocal-chat", 1, saved.id)
    assert [Turn(**turn | {"ids": tuple(turn["ids"])}) for turn in whole["turns"]] == turns
    short = json.loads(as_json(saved, turns))
    assert {tuple(turn) for turn in short["turns"]} == {("role", "content", "interrupted", "seed")}
    assert datetime.fromisoformat(whole["created"]) == datetime.fromtimestamp(int(saved.created), UTC)


def headings(markdown: str) -> list[str]:
    """The document's own: what is inside of a quotation is not."""
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    return [tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "heading_open" and not token.level]


@pytest.mark.parametrize("nasty", NASTY)
def test_what_was_said_does_not_break_the_markdown(nasty: str) -> None:
    head = SavedSession("0" * 16, "<b> *a* `#", "m_o_d", "q4", nasty, 0.0, 0.0, 4, "", "{}")
    turns = [
        Turn("user", nasty),
        Turn("assistant", nasty, interrupted=True),
        Turn("user", nasty),
        Turn("assistant", "x"),
    ]
    text = as_markdown(head, turns)
    text.encode()
    expected = ["\\<b\\> \\*a\\* \\`\\#", *(["System"] if nasty else []), *["You", "m\\_o\\_d"] * 2]
    assert headings(text) == expected
    assert text.count("*(interrupted)*") == 1


def test_rename(call: Sessions, db: SessionDb, folders: Home) -> None:
    assert call("rename", "rec", "Eggs, boiled").err == "recipe is called Eggs, boiled now\n"
    assert names(folders) == ["Eggs, boiled", "weather talk"]
    assert call("rename", "Eggs", "weather talk").code == 2
    assert call("rename", "Eggs", "a\x1bb").code == 2
    assert names(folders) == ["Eggs, boiled", "weather talk"]


def test_rm_takes_the_kv_cache_too(call: Sessions, db: SessionDb, folders: Home) -> None:
    folders.kv_snapshots.mkdir(parents=True)
    snapshots = {saved.name: snapshot_path(folders.kv_snapshots, saved.id) for saved in db.list()}
    for snapshot in snapshots.values():
        snapshot.touch()
    unasked = call("rm", "recipe")
    assert unasked.code == 2
    assert "--yes" in unasked.err
    assert call("rm", "recipe", "nobody", "--yes").code == 3
    assert len(names(folders)) == 2
    outcome = call("rm", "rec", "recipe", "--yes")
    assert (outcome.code, outcome.err) == (0, "removed recipe\n")
    assert names(folders) == ["weather talk"]
    assert [snapshot.exists() for snapshot in snapshots.values()] == [False, True]
    assert call("rm").code == 2


def on_terminal(folders: Home, *arguments: str, columns: int = 80) -> Any:
    program = (
        "from mixlocal.cli.options import Globals; from mixlocal.cli.sessions import sessions; "
        "sessions(obj=Globals(home=None, quiet=False, color='never', as_json=False, debug=False))"
    )
    env = os.environ | {"MIXLOCAL_HOME": str(folders.data), "TERM": "xterm", "LANG": "C.UTF-8"}
    command = ["-c", program, *arguments]
    return pexpect.spawn(sys.executable, command, env=env, encoding="utf-8", dimensions=(24, columns), timeout=30)


@pytest.mark.parametrize(("answer", "left"), [("n", 2), ("y", 1)])
def test_rm_asks_on_a_terminal(db: SessionDb, folders: Home, answer: str, left: int) -> None:
    with on_terminal(folders, "rm", "weather") as child:
        child.expect(r"Remove weather talk\?")
        child.sendline(answer)
        child.expect(pexpect.EOF)
    assert (child.exitstatus == 0) is (answer == "y")
    assert len(names(folders)) == left


def test_a_narrow_terminal_cuts_the_first_words(db: SessionDb, folders: Home) -> None:
    saved = db.create("long", "m", "q4", "")
    db.put(saved.id, 0, Turn("user", "many words " * 20))
    with on_terminal(folders, columns=60) as child:
        lines = child.read().splitlines()
    assert len(lines) == 4
    assert lines[1].endswith("\u2026")
    assert {len(line) for line in lines[1:]} <= set(range(61))
    assert [line.split()[0] for line in lines[1:]] == ["long", "recipe", "weather"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-100, "just now"), (59, "just now"), (60, "1 min ago"), (3599, "59 min ago"), (3600, "1 h ago"),
        (86399, "23 h ago"), (86400, "1 day ago"), (30 * 86400, "30 days ago"), (1_000_000_000, "1994-11-05"),
    ],
)  # fmt: skip
def test_age(monkeypatch: pytest.MonkeyPatch, seconds: int, text: str) -> None:
    now = 1_784_030_400.0  # noon, so that no time zone changes the date
    monkeypatch.setattr(time, "time", lambda: now)
    assert age(now - seconds) == text


def test_a_damaged_database_is_told(call: Sessions, folders: Home) -> None:
    folders.data.mkdir(parents=True)
    folders.sessions_db.write_bytes(b"nonsense" * 1000)
    outcome = call()
    assert outcome.code == 8
    assert "sessions.db" in outcome.err
    assert "aside" in outcome.err
