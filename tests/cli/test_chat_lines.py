"""mixlocal chat from a pipe: a message a line, the same commands; and what its command line takes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from stores import quantized

from mixlocal.errors import DiskFullError
from mixlocal.store.paths import home
from mixlocal.store.session_db import SessionDb, Turn


@dataclass(frozen=True)
class Chatted:
    code: int
    out: str
    err: str


Chat = Callable[..., Chatted]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that chat, a base model, and one whose template has no system role."""
    root = tmp_path_factory.mktemp("chat-lines")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=512)
    for name, template in (("tiny", "mistral-v1"), ("other", "mistral-v1"), ("base", "plain")):
        quantized(checkpoint, root / "models" / name / "q4", name=name, template=template)
    return root / "models"


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Path:
    (tmp_path / "models").symlink_to(models)
    return tmp_path


@pytest.fixture
def chat(run, place: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """A chat with greedy answers of eight tokens; `lines` are piped in."""
    monkeypatch.setenv("MIXLOCAL_HOME", str(place))

    def talk(*lines: str, given: tuple[str, ...] = ("-m", "tiny")) -> Chatted:
        typed = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
        result = run("chat", "-T", "0", "-n", "8", *given, stdin=typed)
        return Chatted(result.code, result.out, result.err)

    return talk


def turns(place: Path, name: str | None = None) -> list[Turn]:
    with SessionDb(home(place).sessions_db) as db:
        head = db.find(name) if name else db.latest()
        return db.turns(head.id) if head else []


def test_answers_on_stdout_talk_on_stderr(chat: Chat, place: Path) -> None:
    result = chat("Hello", "And now?")
    assert result.code == 0
    said = turns(place)
    assert [turn.role for turn in said] == ["user", "assistant"] * 2
    assert result.out == "".join(turn.content + "\n" * (not turn.content.endswith("\n")) for turn in said[1::2])
    assert "/help lists commands" in result.err
    assert len(re.findall(r"gen 8 tok", result.err)) == 2
    assert "\x1b" not in result.out + result.err


def test_every_command_from_a_pipe(chat: Chat, place: Path, tmp_path: Path) -> None:
    script = [
        "Hello", "/help", "/set", "/set seed 7", "/show", "/system Be brief.", "/regen", "/continue", "/edit Hi",
        "/ctx", "/stats", "/experts", "/file FILE", "And this?", "/save one", "/sessions", "/export OUT.json", "/undo",
        "/copy", "/new two", "first of two", "/clear", "/load one", "/model", "/quit", "never said",
    ]  # fmt: skip
    (tmp_path / "FILE").write_text("text of a file")
    lines = [line.replace("FILE", str(tmp_path / "FILE")).replace("OUT", str(tmp_path / "OUT")) for line in script]
    result = chat(*lines)
    assert result.code == 0
    assert "Traceback" not in result.err
    complaints = [line for line in result.err.splitlines() if line.startswith("mixlocal: ")]
    assert complaints == ["mixlocal: there is no clipboard here for so much text"]
    assert json.loads((tmp_path / "OUT.json").read_text())["turns"][-2]["content"].endswith("And this?")
    assert "never said" not in [turn.content for turn in turns(place, "one")]
    assert turns(place, "two")[0].content == "first of two"


def test_a_chat_goes_on_where_it_was(chat: Chat, place: Path) -> None:
    chat("Hello", given=("-m", "tiny", "--session", "mine", "-s", "Be brief."))
    again = chat("And now?", given=("--session", "mine"))
    assert re.search(r"mine: 2 turns, \d+ tokens\n", again.err)
    assert len(turns(place, "mine")) == 4
    latest = chat("More", "/show", given=("-c",))
    assert "mine: 4 turns" in latest.err
    assert re.search(r"system +Be brief\.", latest.err)
    other = chat("Elsewhere", given=("-m", "tiny", "--session", "yours", "--new"))
    assert other.code == 0
    assert len(turns(place, "mine")) == 6
    refused = chat("x", given=("-m", "tiny", "--session", "yours", "--new"))
    assert (refused.code, refused.out) == (2, "")
    assert "there is a chat called 'yours' already" in refused.err


def test_the_kv_cache_comes_back(chat: Chat, place: Path) -> None:
    chat("x" * 100, given=("-m", "tiny", "--session", "long"))
    files = list(home(place).kv_snapshots.iterdir())
    assert len(files) == 1
    assert files[0].stat().st_mode & 0o077 == 0
    again = chat("And now?", given=("--session", "long"))
    assert "its KV cache is back" in again.err
    assert int(re.search(r"\(\+(\d+) kept\)", again.err)[1]) > 100
    files[0].write_bytes(files[0].read_bytes()[:-5])
    third = chat("And then?", given=("--session", "long"))
    assert "to be read again with your next message" in third.err
    assert " kept)" not in third.err
    assert len(turns(place, "long")) == 6


def test_another_model_takes_a_chat_over(chat: Chat, place: Path) -> None:
    chat("Hello", given=("-m", "tiny", "--session", "mine"))
    result = chat("/model", "And now?", "/model tiny", "Back?", given=("-m", "other", "--session", "mine"))
    assert result.code == 0
    assert "other:q4, context 512" in result.err
    assert "tiny:q4, context 512" in result.err
    assert len(turns(place, "mine")) == 6
    with SessionDb(home(place).sessions_db) as db:
        assert db.find("mine").model == "tiny"


def test_a_chat_whose_model_is_gone_says_so(chat: Chat, place: Path, models: Path) -> None:
    chat("Hello", given=("-m", str(models / "other" / "q4"), "--session", "mine"))
    (place / "models").unlink()
    (place / "models").mkdir()
    result = chat("And now?", given=("--session", "mine"))
    assert result.code == 3
    assert "'mine' was held with it; go on with another model, or its folder: -m MODEL" in result.err
    assert len(turns(place, "mine")) == 2
    assert chat("And now?", given=("--session", "mine", "-m", str(models / "other" / "q4"))).code == 0
    assert len(turns(place, "mine")) == 4


def test_a_model_that_does_not_load_leaves_the_former(chat: Chat, place: Path, models: Path) -> None:
    broken = place / "broken"
    broken.mkdir()
    for file in (models / "other" / "q4").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "trunk.safetensors").write_bytes(b"rubbish")
    result = chat("Hello", f"/model {broken}", "still there?")
    assert result.code == 0
    assert "loading tiny:q4 again" in result.err
    assert len(turns(place)) == 4


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        (("-m", "nobody"), 3, "nobody"),
        (("-m", "tiny", "-T", "-1"), 2, "temperature"),
        (("-m", "tiny", "-s", "x", "--system-file", "y"), 2, "--system"),
        (("-m", "tiny", "--system-file", "/nowhere/at/all"), 3, "no such file"),
        (("-m", "tiny", "-f", "/nowhere/at/all"), 3, "no such file"),
        (("-m", "tiny", "-c", "--new"), 2, "--continue"),
        (("-c",), 2, "there is no chat to go on with yet"),
        (("-m", "tiny", "--session", "a/b"), 2, "cannot be the name of a chat"),
        (("-m", "tiny", "--ctx", "100000"), 2, "--ctx"),
        (("-m", "tiny", "--on-overflow", "panic"), 2, "on-overflow"),
    ],
)
def test_bad_command_lines(chat: Chat, given: tuple[str, ...], code: int, says: str) -> None:
    result = chat("Hello", given=given)
    assert result.code == code
    assert says in result.err
    assert result.out == ""
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/nosuch", "no command /nosuch"), ("/s", "did you mean /set or /show"), ("/", "no command /"),
        ("/set temprature 1", "did you mean temperature?"), ("/set temperature hot", "takes a number, not 'hot'"),
        ("/set top-k 1.5", "takes a whole number"), ("/set temperature -3", "outside 0 to 100"),
        ("/set markdown maybe", "on or off"), ("/set on-overflow panic", "error or drop-oldest"),
        ("/regen", "nothing has been said yet"), ("/undo", "nothing has been said yet"), ("/edit", "nothing has been"),
        ("/continue", "there is no answer to go on with"), ("/stats", "no answer has been finished"),
        ("/copy", "there is no answer to copy"), ("/export", "nothing has been said yet"),
        ("/save", "under which name"), ("/load", "which one?"), ("/load nobody", "no chat is called 'nobody'"),
        ("/file", "which file?"),
        ("/file /nowhere/at/all", "no such file"), ("/file /", "is a folder"), ("/save a/b", "cannot be the name"),
        ("/model nobody", "nobody"),
        ("x" * 600, "alone has 616 tokens and the context has room for 504"),
        ("caf\udce9", "not UTF-8: byte 3"), ("a\0b", "NUL byte at 1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line_and_the_chat_goes_on(chat: Chat, place: Path, line: str, says: str) -> None:
    result = chat(line, "Hello")
    assert result.code == 0
    assert says in result.err
    assert "Traceback" not in result.err
    assert [turn.content for turn in turns(place) if turn.role == "user"] == ["Hello"]


def test_a_disk_that_fills_up_costs_no_answer(chat: Chat, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer that could not be saved is shown to its end, and saved with the next one."""
    put, calls = SessionDb.put, []

    def failing(self: SessionDb, session: str, n: int, turn: Turn) -> None:
        calls.append(n)
        if len(calls) in (2, 3):
            raise DiskFullError("sessions.db: no space left on device")
        put(self, session, n, turn)

    monkeypatch.setattr(SessionDb, "put", failing)
    result = chat("Hello", "refused", "And now?")
    assert result.code == 0
    assert result.err.count("no space left on device") == 2
    assert [turn.content for turn in turns(place) if turn.role == "user"] == ["Hello", "And now?"]
    assert len(turns(place)) == 4
    assert result.out.count("\n") >= 2


def test_old_turns_are_dropped_aloud(chat: Chat, place: Path) -> None:
    result = chat(*[f"{n} " + "long " * 14 for n in range(9)], given=("-m", "tiny", "--session", "full"))
    assert result.code == 0
    assert "the context of 512 tokens is full: the oldest" in result.err
    assert len(turns(place, "full")) == 18


def test_the_context_s_end_by_the_other_policy(chat: Chat, place: Path) -> None:
    lines = [f"{n} " + "long " * 14 for n in range(9)]
    result = chat(*lines, "/clear", "Hello", given=("-m", "tiny", "--on-overflow", "error"))
    assert result.code == 0
    assert "the conversation has" in result.err
    assert "the context has room for" in result.err
    assert turns(place)[0].content == "Hello"


def test_a_system_text_without_a_role_is_said_once(chat: Chat) -> None:
    result = chat("Hello", "Again", given=("-m", "tiny", "-s", "Be brief."))
    assert result.err.count("no system role") == 1


def test_a_base_model_says_that_it_has_no_turns(chat: Chat, place: Path) -> None:
    result = chat("Once upon a time", "and then", given=("-m", "base"))
    assert result.code == 0
    assert "no chat format" in result.err


def test_files_go_with_the_first_message(chat: Chat, place: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The key is under the mat.")
    chat("Where is it?", "And now?", given=("-m", "tiny", "-f", str(tmp_path / "notes.txt")))
    first, _, second, _ = turns(place)
    assert "The key is under the mat." in first.content
    assert first.content.endswith("Where is it?")
    assert second.content == "And now?"


def test_two_slashes_send_one(chat: Chat, place: Path) -> None:
    chat("//help me")
    assert turns(place)[0].content == "/help me"


def test_run_answers_a_text_and_talks_without(run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLOCAL_HOME", str(place))
    answer = run("run", "tiny", "-T", "0", "-n", "8", "Hello")
    assert (answer.code, answer.out) == (0, run("prompt", "-m", "tiny", "-T", "0", "-n", "8", "Hello").out)
    assert run("run", "tiny", "-T", "0", "-n", "8", stdin=b"Hello").out == answer.out
    assert run("run", "nobody", "Hello").code == 3
