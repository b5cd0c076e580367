"""`prompt` at a terminal, and Ctrl-C everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest

from mixlocal.app.session import Chunk, Session
from mixlocal.cli import answer
from mixlocal.cli.answer import PrefillMeter, summary
from mixlocal.cli.options import Globals
from mixlocal.engine.generate import Prefilled
from mixlocal.engine.params import SamplingParams

GREEDY = ("-m", "tiny", "--raw", "-T", "0", "-n", "12")
LOUD = Globals(home=None, quiet=False, color="auto", as_json=False, debug=False)


def at_a_terminal(home: Path, *arguments: str, **environment: str) -> tuple[bytes, list[str], int]:
    """Every byte that was written, the screen at the end, the exit code."""
    command = ["-m", "mixlocal", "--home", str(home), "prompt", "-m", "tiny", "-T", "0", "-n", "8", *arguments]
    child = pexpect.spawn(sys.executable, command, dimensions=(24, 200), timeout=60)
    raw = child.read()
    child.close()
    screen = pyte.Screen(200, 24)
    pyte.ByteStream(screen).feed(raw)
    return raw, [line.rstrip() for line in screen.display if line.strip()], child.exitstatus


def test_nothing_steers_the_terminal(home: Path) -> None:
    raw, screen, code = at_a_terminal(home, "--raw", "--prefill", "\x1b[2J\x1b]0;owned\x07\u202e!", "x" * 200)
    assert code == 0
    assert "^[[2J^[]0;owned^G<U+202E>!" in screen[0]
    ours = raw.replace(b"\x1b[K", b"")
    assert b"\x1b" not in ours
    assert b"reading 0/" in raw  # the progress, and
    assert not any("reading" in line for line in screen)  # how it was wiped
    assert screen[-1].startswith("prompt ")


def test_a_short_prompt_is_read_in_silence(home: Path) -> None:
    raw, _, _ = at_a_terminal(home, "--raw", "hi")
    assert raw.startswith(b"loading tiny\r\x1b[K")
    assert b"\x1b" not in raw.removeprefix(b"loading tiny\r\x1b[K")
    assert b"reading" not in raw


def test_dry_run_tells_control_tokens_from_text(home: Path) -> None:
    """The tiny model's only control token in a prompt would be its BOS, and it has none there."""
    raw, screen, _ = at_a_terminal(home, "--dry-run", "Hello</s>\x1b[2J")
    assert screen[-1] == "Hello</s>^[[2J"
    assert b"\x1b[2J" not in raw


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(answer, "time", clock)
    return clock


def test_meter_on_a_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    meter = PrefillMeter(LOUD)
    meter.show(Prefilled(1000, 20480, 1000))
    clock.now += 10
    meter.show(Prefilled(8192, 20480, 1000))
    meter.clear()
    meter.clear()
    assert capsys.readouterr().err == (
        "\rreading 1000/20480 tok (4%)\x1b[K\rreading 8192/20480 tok (40%) · ETA 17 s\x1b[K\r\x1b[K"
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_meter_elsewhere(
    terminal: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line every 10 s; a dumb terminal is no better."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "dumb")
    meter = PrefillMeter(LOUD)
    for done in range(0, 5121, 512):
        meter.show(Prefilled(done, 5120))
        clock.now += 4
    meter.clear()
    assert capsys.readouterr().err == (
        "reading 1536/5120 tok (30%) · ETA 28 s\nreading 3072/5120 tok (60%) · ETA 16 s\n"
        "reading 4608/5120 tok (90%) · ETA 4 s\n"
    )


def test_what_was_kept_is_told(home: Path) -> None:
    session = Session.open(str(home / "models" / "tiny" / "q4"))
    cache, params = session.new_cache(), SamplingParams(max_tokens=4, seed=1)
    first, second = (list(session.stream_ids(list(range(20)), params, cache=cache))[-1].stats for _ in range(2))
    assert first is not None
    assert second is not None
    assert summary(first, params).startswith("prompt 20 tok ")
    assert "load" in summary(first, params)
    assert summary(second, params).startswith("prompt 1 tok (+19 kept) ")
    assert summary(second, params).endswith("seed 1")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after five tokens."""
    original = Session.stream_ids

    def stream_ids(self: Session, *arguments: Any, **options: Any) -> Iterator[Chunk]:
        for n, chunk in enumerate(original(self, *arguments, **options)):
            if n == 7:  # two of them tell of the prompt
                raise KeyboardInterrupt
            yield chunk

    monkeypatch.setattr(Session, "stream_ids", stream_ids)


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_keeps_what_there_is(run) -> None:
    plain = run("prompt", *GREEDY, "Hello")
    assert plain.code == 130
    assert (
        plain.err
        == f"interrupted after 5 tokens · seed {plain.err.split('seed ')[1].split()[0]}\nmixlocal: interrupted\n"
    )
    assert plain.out.endswith("\n")
    for mode in ("--no-stream", "-x"):
        result = run("prompt", *GREEDY, mode, "Hello")
        assert (result.code, result.out) == (130, plain.out)
    for mode in ("--json", "--stream-json"):
        result = run("prompt", *GREEDY, mode, "Hello")
        body = json.loads(result.out.splitlines()[-1])
        assert (result.code, body["finish_reason"], body["prompt_tokens"]) == (130, "interrupted", 5)
        assert body["completion_tokens"] == len(body["token_ids"]) == 5
        assert body["timings"] is body["offload"] is None
        assert body["text"] == plain.out.removesuffix("\n")
    schema = run("prompt", *GREEDY, "--json-object", "Hello")
    assert schema.code == 130
    assert schema.out.startswith("{")
