"""mixlocal chat when something else happens: signals, another size of the terminal, bytes that are no text."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import tiny
from faults import chat_faults
from stores import quantized
from terminal import Terminal

from mixlocal.cli.chat.screen import KEEP_SECONDS
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import home
from mixlocal.store.session_db import SessionDb, Turn

LONG = ("-m", "smolmix:q8", "-T", "0", "--repeat-penalty", "1.1", "-n", "300", "--ctx", "2048")
SGR = re.compile(rb"\x1b\[[0-9;]*m")


def turns(place: Path) -> list[Turn]:
    with SessionDb(home(place).sessions_db) as db:
        return db.turns(db.latest().id)


def begin(terminal: Terminal, text: str = "Write a long story about the sea.") -> None:
    """Ask, and wait until the answer has begun."""
    terminal.ready()
    terminal.say(text)
    terminal.until(lambda: terminal.raw.count(b"\x1b[?2004l") == 1 and len(terminal.text().rpartition(text)[2]) > 20)


def test_interrupts_at_random_times(smolmix: ModelStore, tmp_path: Path) -> None:
    """A few of what tests/faults/chat_faults.py does, which also judges how long it takes."""
    report = chat_faults.campaign(str(smolmix.folder), tmp_path, count=14, seed=3)
    assert report.faults == []
    assert report.struck >= 5
    assert len(report.loading) == 3


@pytest.mark.parametrize("how", ["signal", "key"])
def test_an_interrupt_right_behind_a_message(place: Path, how: str) -> None:
    """While the line editor is still busy with the key that sent it."""
    with Terminal("chat", *LONG, home=place) as terminal:
        terminal.ready()
        for n, pause in enumerate((0.0, 0.005, 0.02, 0.05, 0.1)):
            prompts = terminal.prompts()
            terminal.type(f"\x1b[200~{n}: {'a long story about the sea, ' * 40}\x1b[201~\r" + "\x03" * (how == "key"))
            if how == "signal":
                time.sleep(pause)
                terminal.interrupt()
            terminal.ready(prompts + 1)
            prompts = terminal.prompts()
            terminal.say("/undo" if n % 2 else "/show")
            terminal.ready(prompts + 1)
            terminal.type("\x03" * bool(n % 2))  # the draft that /undo leaves
        terminal.say("/quit")
        assert terminal.end() == 0
    answers = [turn for turn in turns(place) if turn.role == "assistant"]
    assert answers
    assert all(turn.interrupted for turn in answers)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("answering", [True, False])
def test_a_signal_that_ends_it_loses_nothing(place: Path, number: signal.Signals, answering: bool) -> None:
    with Terminal("chat", *LONG, home=place) as terminal:
        before = terminal.modes()
        if answering:
            begin(terminal)
        else:
            terminal.ready()
        terminal.child.kill(number)
        assert terminal.end() == 143
        assert terminal.last_modes == before
        assert "Traceback" not in terminal.text()
    if answering:
        question, partial = turns(place)
        assert question.content == "Write a long story about the sea."
        assert partial.interrupted
        assert len(partial.content) > 10


def test_kill_leaves_the_message_and_most_of_the_answer(place: Path) -> None:
    with Terminal("chat", *LONG, "-n", "2000", home=place) as terminal:
        begin(terminal)
        start = time.monotonic()
        terminal.until(lambda: time.monotonic() - start > 2 * KEEP_SECONDS)
        terminal.child.kill(signal.SIGKILL)
        terminal.end()
    question, partial = turns(place)
    assert question.content == "Write a long story about the sea."
    assert partial.interrupted
    assert len(partial.content) > 20


def test_a_stopped_chat_goes_on(place: Path) -> None:
    """Ctrl-Z while it answers: the shell finds the terminal as it was."""
    with Terminal("chat", *LONG, home=place) as terminal:
        before = terminal.modes()
        begin(terminal)
        silent = terminal.modes()
        assert silent != before
        terminal.child.kill(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(terminal.child.pid, os.WUNTRACED)[1])
        assert terminal.modes() == before
        terminal.child.kill(signal.SIGCONT)
        terminal.ready(2)
        terminal.say("/quit")
        assert terminal.end() == 0
    assert not turns(place)[1].interrupted


def test_what_is_typed_meanwhile_waits(place: Path) -> None:
    with Terminal("chat", *LONG, "-n", "60", home=place) as terminal:
        begin(terminal)
        terminal.type("typed meanwhile")
        terminal.ready(2)
        terminal.until(lambda: "> typed meanwhile" in terminal.display()[terminal.screen.cursor.y])
        assert terminal.text().count("typed meanwhile") == 1


@pytest.mark.parametrize(("keys", "code"), [("\x04", 0), ("/quit\r", 0), ("/exit\r\x04", 0), ("\x03\x03", 130)])
def test_ways_to_leave(place: Path, keys: str, code: int) -> None:
    with Terminal("chat", *LONG, home=place) as terminal:
        before = terminal.modes()
        terminal.ready()
        for n, key in enumerate(re.findall(r"[\x03\x04]|[^\x03\x04]+", keys)):
            terminal.ready(n + 1)
            terminal.type(key)
        assert terminal.end() == code
        assert terminal.last_modes == before


def test_any_size_of_the_terminal_while_it_answers(place: Path) -> None:
    """No exception, no character lost: but for spaces the screen's history has the answer."""
    rng = random.Random(8)
    with Terminal("chat", *LONG, "-n", "160", "--no-stats", home=place) as terminal:
        begin(terminal)
        while terminal.prompts() < 2:
            terminal.resize(*rng.choice([(1, 1), (20, 5), (500, 200), (80, 24), (33, 7), (120, 40)]))
            for _ in range(5):
                terminal.read(0.01)
        terminal.resize(80, 24)
        terminal.ready(2)
        written = SGR.sub(b"", terminal.raw).decode()
        terminal.say("/quit")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.text()
    answer = turns(place)[1].content
    letters = re.findall(r"[A-Za-z]+", answer)
    assert len(letters) > 60
    assert "".join(letters) in "".join(re.findall(r"[A-Za-z]+", re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", written)))


def test_a_model_that_writes_bytes_at_random(tmp_path: Path) -> None:
    """Control sequences among them: between two prompts there are only lines and colours of our own."""
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", max_position_embeddings=8192)
    quantized(checkpoint, tmp_path / "models" / "tiny" / "q4", template="mistral-v1")
    options = ("-m", "tiny", "-T", "8", "--top-p", "1", "-n", "400", "--no-stats", "--no-markdown")
    with Terminal("chat", *options, home=tmp_path) as terminal:
        terminal.ready()
        for n in range(12):
            terminal.say(f"/set markdown {'on' if n % 2 else 'off'}")
            terminal.ready(2 * n + 2)
            terminal.say("Go on.")
            terminal.ready(2 * n + 3)
        terminal.say("/quit")
        assert terminal.end() == 0
    written = b"".join(part.partition(b"\x1b[?2004h")[0] for part in terminal.raw.split(b"\x1b[?2004l")[1:])
    said = "".join(turn.content for turn in turns(tmp_path) if turn.role == "assistant")
    assert {"\x1b", "\x07", "\x00", "\x08"} <= set(said)  # it did try
    text = ours(written)
    assert "^[" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def ours(written: bytes) -> str:
    """Without what the line editor and the renderer write themselves."""
    text = SGR.sub(b"", written).decode()
    return re.sub(r"\x1b\[(\?(25[hl]|12[hl]|7[hl])|[0-9]*[ABCDJKGH]|6n)|\r", "", text)
