"""Saved chats: what was acknowledged is there whatever happens, and nothing said can break it."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixlocal.errors import (
    CorruptError,
    DiskFullError,
    LockedError,
    MixlocalError,
    NotFoundError,
    PermissionDeniedError,
    RefusedError,
    UsageError,
)
from mixlocal.store import session_db, sqlite_file
from mixlocal.store.session_db import SavedSession, SessionDb, Turn

KILLS = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sessions.db"


@pytest.fixture
def db(path: Path) -> Iterator[SessionDb]:
    with SessionDb(path) as db:
        yield db


def begin(db: SessionDb, name: str | None = "one", *texts: str) -> SavedSession:
    """A session in which the texts were said in turns."""
    saved = db.create(name, "smolmix", "q4", "", first=texts[0] if texts else "")
    for n, text in enumerate(texts):
        db.put(saved.id, n, Turn("assistant" if n % 2 else "user", text))
    return db.get(saved.id)


def names(sessions: list[SavedSession]) -> list[str]:
    return [saved.name for saved in sessions]


def test_turns_come_back_as_they_were(path: Path) -> None:
    turns = [
        Turn("user", "Why?\0 \ud83d \u2028 é e\u0301 \U0001f600"),
        Turn("assistant", "", (0, 1, 2**32 - 1), interrupted=True, seed=2**63 - 1),
    ]
    with SessionDb(path) as db:
        saved = db.create("one", "smolmix", "q4", "be \udfff brief")
        for n, turn in enumerate(turns):
            db.put(saved.id, n, turn)
    with SessionDb(path) as db:
        found = db.latest()
        assert found is not None
        assert db.turns(found.id) == turns
        assert (found.name, found.system, found.turns) == ("one", "be \udfff brief", 2)
        assert found.first == "Why?\0 \ud83d é e\u0301 \U0001f600"


@given(text=st.text(st.characters(exclude_categories=())), ids=st.lists(st.integers(0, 2**32 - 1)))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_kept_and_can_be_searched_for(db: SessionDb, text: str, ids: list[int]) -> None:
    saved = begin(db, None, text)
    db.put(saved.id, 1, Turn("assistant", text, tuple(ids)))
    assert [turn.content for turn in db.turns(saved.id)] == [text, text]
    assert db.turns(saved.id)[1].ids == tuple(ids)
    assert saved.id in [found.id for found in db.list(search=text)]
    db.remove(saved.id)


def test_a_turn_is_replaced_and_later_ones_stay(db: SessionDb) -> None:
    saved = begin(db, "one", "a", "b", "c")
    db.put(saved.id, 1, Turn("assistant", "B", (7,)))
    assert [turn.content for turn in db.turns(saved.id)] == ["a", "B", "c"]
    db.truncate(saved.id, 1)
    assert [turn.content for turn in db.turns(saved.id)] == ["a"]


def test_a_turn_after_ones_that_another_process_removed_is_refused(db: SessionDb) -> None:
    saved = begin(db, "one", "a", "b", "c")
    db.truncate(saved.id, 1)
    with pytest.raises(RefusedError, match="another mixlocal"):
        db.put(saved.id, 3, Turn("assistant", "d"))
    assert [turn.content for turn in db.turns(saved.id)] == ["a"]


def test_a_removed_session_is_told(db: SessionDb) -> None:
    saved = begin(db, "one", "a")
    db.remove(saved.id)
    changes: list[Callable[[], object]] = [
        lambda: db.put(saved.id, 1, Turn("user", "b")), lambda: db.truncate(saved.id, 0),
        lambda: db.describe(saved.id, system="x"), lambda: db.copy(saved.id, "two"), lambda: db.remove(saved.id),
        lambda: db.get(saved.id),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(NotFoundError, match="removed"):
            change()
    assert db.turns(saved.id) == []
    assert db.list() == []


def test_what_was_removed_is_no_longer_on_the_disk(path: Path) -> None:
    with SessionDb(path) as db:
        keep, gone = begin(db, "keep", "kept words"), begin(db, "gone", "secret words " * 1000)
        assert b"secret words" in b"".join(file.read_bytes() for file in path.parent.iterdir())
        db.remove(gone.id)
        assert b"secret words" not in b"".join(file.read_bytes() for file in path.parent.iterdir())
        assert db.turns(keep.id) == [Turn("user", "kept words")]


def test_description_changes_what_is_given(db: SessionDb) -> None:
    saved = begin(db, "one", "a")
    db.describe(saved.id, model="other", system="s")
    db.describe(saved.id, name=" two ", params='{"seed": 1}')
    found = db.get(saved.id)
    assert (found.name, found.model, found.variant, found.system, found.params) == (
        "two", "other", "q4", "s", '{"seed": 1}',
    )  # fmt: skip
    db.describe(saved.id, name="two")  # its own


def test_a_copy_goes_its_own_way(db: SessionDb) -> None:
    saved = begin(db, "one", "a", "b")
    copied = db.copy(saved.id, "two")
    db.put(copied.id, 2, Turn("user", "c"))
    assert [turn.content for turn in db.turns(saved.id)] == ["a", "b"]
    assert [turn.content for turn in db.turns(copied.id)] == ["a", "b", "c"]
    assert names(db.list()) == ["two", "one"]


@pytest.mark.parametrize(
    "name", ["", "  ", "-m", ".x", "a/b", "a\nb", "a\x1b[m", "a\u202eb", "\ud800", "a\u200bb", "x" * 81]
)
def test_names_that_cannot_be(db: SessionDb, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be the name"):
        db.create(name, "m", "q4", "")


def test_names_are_unique(db: SessionDb) -> None:
    saved = begin(db, "caf\u00e9")
    for taking in (lambda n: db.create(n, "m", "q4", ""), lambda n: db.copy(saved.id, n)):
        with pytest.raises(UsageError, match="already"):
            taking("cafe\u0301")  # the same to the eye
    other = begin(db, "other")
    with pytest.raises(UsageError, match="already"):
        db.describe(other.id, name="caf\u00e9")
    assert len(db.list()) == 2


@pytest.mark.parametrize(
    ("first", "name"),
    [
        ("What's the sky? Tell me why it is blue", "whats-the-sky-tell-me"),
        ("  <b>ÜBER</b> 42\n", "b-über-b-42"),
        ("Donaudampfschifffahrtsgesellschaftskapitänsmütze", "donaudampfschifffahrtsgesellschaftskapit"),
        ("為什麼天空是藍色的\uff1f", "為什麼天空是藍色的"),
        ("\u2764\ufe0f \ud800 ?", "chat-2026-11-26-1"), ("", "chat-2026-11-26-1"),
    ],
)  # fmt: skip
def test_a_name_is_made_of_the_first_words(
    db: SessionDb, monkeypatch: pytest.MonkeyPatch, first: str, name: str
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: form.replace("%Y-%m-%d", "2026-11-26"))
    assert begin(db, None, first).name == name
    second = begin(db, None, first).name
    assert second == (name[:-1] + "2" if name.startswith("chat-2026") else f"{name}-2")


def test_a_session_is_found_by_what_its_name_or_id_begins_with(db: SessionDb) -> None:
    recipes, recipe, other = begin(db, "recipes"), begin(db, "recipe"), begin(db, "Other talk")
    assert db.find("recipe").id == recipe.id
    assert db.find("recipes").id == recipes.id
    assert db.find("Oth").id == db.find(" Other talk ").id == db.find(other.id[:15]).id == db.find(other.id).id
    with pytest.raises(UsageError, match="recipe, recipes"):
        db.find("rec")
    with pytest.raises(NotFoundError) as missing:
        db.find("recipies")
    assert missing.value.hint == "did you mean recipes, recipe?"
    for nothing in ("", " ", "zzz", "\ud800"):
        with pytest.raises(NotFoundError):
            db.find(nothing)


def test_newest_first(db: SessionDb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_db.time, "time", lambda: 1.0)  # a clock that stands still
    sessions = [begin(db, f"s{n}", "a") for n in range(4)]
    assert names(db.list()) == ["s3", "s2", "s1", "s0"]
    monkeypatch.setattr(session_db.time, "time", lambda: 2.0)
    db.put(sessions[1].id, 1, Turn("assistant", "b"))
    assert names(db.list(2)) == ["s1", "s3"]
    latest = db.latest()
    assert latest is not None
    assert (latest.name, latest.created, latest.updated) == ("s1", 1.0, 2.0)


def test_search_finds_every_word_in_any_case_and_no_syntax(db: SessionDb) -> None:
    begin(db, "cooking", "Wie koche ich Käse?", "STRASSE und 100% C++")
    begin(db, "weather", 'why is it "raining" AND (not) snowing*', "NEAR the sea_side")
    assert names(db.list(search="KÄSE straße")) == ["cooking"]
    assert names(db.list(search="cook c++ 100%")) == ["cooking"]
    assert names(db.list(search='"raining" AND (not) snowing*')) == ["weather"]
    for words in ("käse raining", "100_", "sea%side", "OR koche", "' OR 1=1 --", "raining*", "content:wie"):
        assert names(db.list(search=words)) == [], words
    assert len(db.list(search="  ")) == 2
    assert names(db.list(1, search="i")) == ["weather"]


def test_only_the_owner_can_read_it(path: Path, db: SessionDb) -> None:
    begin(db, "one", "a")
    files = sorted(path.parent.iterdir())
    assert [file.name for file in files] == ["sessions.db", "sessions.db-shm", "sessions.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize("dangling", [False, True])
def test_a_symbolic_link_is_refused(path: Path, tmp_path: Path, dangling: bool) -> None:
    target = tmp_path / "target"
    if not dangling:
        SessionDb(target).close()
    path.parent.mkdir()
    path.symlink_to(target)
    with pytest.raises(PermissionDeniedError, match="symbolic link"):
        SessionDb(path)
    assert target.exists() is not dangling


def test_a_newer_format_is_refused_and_not_touched(path: Path) -> None:
    SessionDb(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(RefusedError, match="format version 2") as refusal:
        SessionDb(path)
    assert refusal.value.hint == "upgrade mixlocal"
    assert path.read_bytes() == before


def test_another_programs_database_is_refused(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(RefusedError, match="another program"):
        SessionDb(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"no database" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
def test_what_is_no_database_is_told_and_left(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"sessions\.db") as damage:
        SessionDb(path)
    assert "aside" in damage.value.hint
    assert path.read_bytes() == content


def test_an_empty_file_is_a_new_database(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with SessionDb(path) as db:
        assert db.list() == []


def use(path: Path) -> None:
    """All that can be done with it."""
    with SessionDb(path) as db:
        for saved in db.list():
            assert isinstance(saved, SavedSession)
            db.turns(saved.id)
            db.put(saved.id, 0, Turn("user", "new"))
        db.list(search="word")
        begin(db, None, "x")


def test_flipped_bits_and_cuts_are_survived_or_told(path: Path, tmp_path: Path) -> None:
    with SessionDb(path) as db:
        for n in range(5):
            begin(db, None, f"word {n} " * 50, "answer " * 200, "more")
    whole, damaged, told = path.read_bytes(), tmp_path / "damaged.db", 0
    for n in range(150):
        data = bytearray(whole[: random.Random(n).randrange(len(whole))] if n % 5 == 0 else whole)
        for _ in range(20):
            if data:
                at = random.Random(f"{n} {_}").randrange(min(len(data), 1 << (8 + n % 8)))
                data[at] ^= 1 << n % 8
        for file in tmp_path.glob("damaged.db*"):
            file.unlink()
        damaged.write_bytes(data)
        try:
            use(damaged)
        except MixlocalError:
            told += 1
    assert told > 50


def test_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MixlocalError):
        SessionDb(tmp_path / "file" / "sessions.db")
    (tmp_path / "sessions.db").mkdir()
    with pytest.raises(PermissionDeniedError):
        SessionDb(tmp_path / "sessions.db")


def test_read_only_is_told(db: SessionDb) -> None:
    saved = begin(db, "one", "a")
    db._file.read("PRAGMA query_only = ON")  # root may write anywhere
    with pytest.raises(PermissionDeniedError, match="readonly"):
        db.put(saved.id, 1, Turn("user", "b"))
    assert [turn.content for turn in db.turns(saved.id)] == ["a"]


def test_a_lock_of_another_process_is_waited_for_and_then_told(
    db: SessionDb, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = begin(db, "one", "a")
    monkeypatch.setattr(sqlite_file, "WAIT_SECONDS", 0.5)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert [turn.content for turn in db.turns(saved.id)] == ["a"]  # who reads does not wait
        start = time.monotonic()
        with pytest.raises(LockedError, match="another process"):
            db.put(saved.id, 1, Turn("assistant", "b"))
        assert 0.5 <= time.monotonic() - start < 3
        timer = threading.Timer(0.2, lambda: other.execute("COMMIT"))
        timer.start()
        db.put(saved.id, 1, Turn("assistant", "b"))
        timer.join()


def test_threads_may_share_it(db: SessionDb) -> None:
    sessions = [begin(db, f"s{n}") for n in range(4)]

    def talk(saved: SavedSession) -> None:
        for n in range(30):
            db.put(saved.id, n, Turn("user", str(n)))
            assert len(db.turns(saved.id)) == n + 1

    threads = [threading.Thread(target=talk, args=(saved,)) for saved in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [saved.turns for saved in db.list()] == [30] * 4


def test_an_interrupt_leaves_no_half_change(db: SessionDb) -> None:
    saved = begin(db, "one", "a", "b")
    with contextlib.suppress(KeyboardInterrupt), db._file.transaction() as connection:
        connection.execute("DELETE FROM turn")
        raise KeyboardInterrupt
    db.put(saved.id, 2, Turn("user", "c"))
    assert len(db.turns(saved.id)) == 3


TALK = """
import sys
from pathlib import Path
from mixlocal.store.session_db import SessionDb, Turn
path, name, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with SessionDb(path) as db:
    known = [saved for saved in db.list() if saved.name == name]
    saved = known[0] if known else db.create(name, "m", "q4", "")
    for n in range(saved.turns, saved.turns + count):
        db.put(saved.id, n, Turn("user", f"{n} " * 500, tuple(range(n))))
        print(n, flush=True)
"""


def talk(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    """A process that says things, and each number when it has been kept."""
    command = [sys.executable, "-c", TALK, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def is_intact(path: Path) -> bool:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_kill_9_takes_no_acknowledged_turn(path: Path) -> None:
    dice, total = random.Random(0), 0
    for _ in range(KILLS):
        process = talk(path, "one", 1_000_000)
        assert process.stdout is not None
        wanted = dice.randrange(1, 12)
        said = [process.stdout.readline() for _ in range(wanted)]
        time.sleep(dice.random() * 0.003)
        process.kill()
        said += process.stdout.readlines()
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        acknowledged = [int(line) for line in said if line.endswith("\n")]
        assert is_intact(path)
        with SessionDb(path) as db:
            turns = db.turns(db.find("one").id)
        assert acknowledged == list(range(total, total + len(acknowledged)))
        assert len(turns) - total - len(acknowledged) in (0, 1)
        assert all(turn == Turn("user", f"{n} " * 500, tuple(range(n))) for n, turn in enumerate(turns))
        total = len(turns)
    assert total >= KILLS


def test_processes_write_at_once(path: Path) -> None:
    """They create it at once, too."""
    processes = [talk(path, f"s{n}", 50) for n in range(3)]
    for process in processes:
        out, _ = process.communicate()
        assert (process.returncode, len(out.split())) == (0, 50)
    with SessionDb(path) as db:
        assert [saved.turns for saved in db.list()] == [50] * 3
    assert is_intact(path)


@pytest.mark.parametrize("limit", [0, 4096, 40_000, 150_000, 400_000])
def test_a_full_disk_is_told_and_nothing_is_damaged(path: Path, limit: int) -> None:
    with SessionDb(path) as db:
        saved = begin(db, "one", "a")
    pid = os.fork()
    if pid == 0:
        os._exit(_fill(path, saved.id, limit))
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == DiskFullError.exit_code
    assert is_intact(path)
    with SessionDb(path) as db:
        turns = db.turns(saved.id)
        assert turns == [Turn("user", "a"), *(Turn("assistant", f"{n}" * 9000) for n in range(1, len(turns)))]
        db.put(saved.id, len(turns), Turn("user", "there is room again"))


def _fill(path: Path, session: str, limit: int) -> int:
    """The exit code of a chat in a process whose files cannot grow beyond `limit`; it goes on after the first error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        with SessionDb(path) as db:
            kept = 1
            try:
                while kept < 1000:
                    db.put(session, kept, Turn("assistant", f"{kept}" * 9000))
                    kept += 1
            finally:
                if len(db.turns(session)) != kept:
                    os._exit(99)
    except MixlocalError as error:
        return error.exit_code
    return 0
