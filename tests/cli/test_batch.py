"""mixlocal batch: what it prints, how it ends, what it refuses. A double stands in for the model."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_double import VARIABLE, Double
from terminal import Terminal

from mixlocal.app.batch import engines
from mixlocal.app.batch.job import Progress
from mixlocal.cli import batch as command
from mixlocal.cli import batch_progress
from mixlocal.cli.batch_progress import line
from mixlocal.store import durable

DOUBLE = Path(__file__).parent.parent / "batch_double.py"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command is run in, with ten rows in it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, 10)
    return tmp_path


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Double:
    found = Double()
    monkeypatch.setitem(engines.ENGINES, "local", lambda _: found)
    monkeypatch.setattr(command, "install_default", lambda *_: None)
    return found


def write(folder: Path, count: int, *more: str) -> None:
    lines = [json.dumps({"id": f"r{n}", "prompt": f"question {n}"}) for n in range(count)]
    (folder / "in.jsonl").write_text("".join(f"{line}\n" for line in [*lines, *more]))


def lines(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


BATCH = ("batch", "in.jsonl", "-o", "out.jsonl")


def test_all_rows(run, work: Path, double: Double) -> None:
    result = run(*BATCH, "--seed", "5")
    assert (result.code, result.out) == (0, "")
    assert "10 rows · seed 5" in result.err
    assert "10 answers, 0 failed in out.jsonl" in result.err
    assert len(lines()) == 10
    assert double.closed


def test_again(run, work: Path, double: Double) -> None:
    run(*BATCH)
    result = run(*BATCH)
    assert (result.code, double.opened) == (0, 1)
    assert "10 rows · 10 are done already" in result.err
    assert "all rows were done; out.jsonl is as it should be" in result.err
    Path("out.jsonl").unlink()
    assert "out.jsonl is written anew" in run(*BATCH).err
    assert double.opened == 1


def test_10_failed_rows(run, work: Path, double: Double) -> None:
    write(work, 10, "{broken")
    double.behaviour.fails = "r3"
    result = run(*BATCH)
    assert (result.code, result.out) == (10, "")
    assert "1 cannot be asked" in result.err
    assert "9 answers, 2 failed in out.jsonl" in result.err
    assert "--retry-errors" in result.err
    assert run(*BATCH).code == 10
    double.behaviour.fails = "$^"
    assert run(*BATCH, "--retry-errors").code == 10
    assert len([line for line in lines() if line["error"]]) == 1


def test_10_max_failures(run, work: Path, double: Double) -> None:
    double.behaviour.fails = "r"
    result = run(*BATCH, "--max-failures", "2")
    assert result.code == 10
    assert "stopped: too many rows have failed" in result.err
    assert "go on with: mixlocal" in result.err
    assert not Path("out.jsonl").exists()


def test_json(run, work: Path, double: Double) -> None:
    found = json.loads(run(*BATCH, "--seed", "3", "--json").out)
    assert found.pop("seconds") >= 0
    assert found == {
        "rows": 10, "answers": 10, "failed": 0, "left": 0, "answered_now": 10, "prompt_tokens": 100,
        "completion_tokens": 50, "seed": 3, "engine": {"engine": "double", "model": "double", "variant": "v1"},
        "out": "out.jsonl", "folder": "out.jsonl.batch",
    }  # fmt: skip
    assert json.loads(run("--json", *BATCH).out)["answered_now"] == 0


def test_quiet_says_nothing(run, work: Path, double: Double) -> None:
    result = run("-q", *BATCH)
    assert (result.code, result.out, result.err) == (0, "", "")


def test_options_reach_the_rows(run, work: Path, double: Double) -> None:
    (work / "t").write_text("Tell me: {prompt}\n")
    run(*BATCH, "-T", "0.2", "--top-k", "4", "-n", "7", "--stop", "END", "-s", "Be brief.", "--template", "@t",
        "--json-object", "--limit", "2", "--order", "done")  # fmt: skip
    assert len(lines()) == 2
    request = double.requests[0]
    assert [message.content for message in request.prompt] == ["Be brief.", "Tell me: question 0"]
    params = request.params
    assert (params.temperature, params.top_k, params.max_tokens, params.stop) == (0.2, 4, 7, ("END",))
    assert request.form is not None


def test_text_and_standard_input(run, work: Path, double: Double) -> None:
    (work / "in.txt").write_bytes("﻿Why?\r\n\r\nHow?".encode())
    assert run("batch", "in.txt", "-o", "a").code == 0
    assert [line["custom_id"] for line in lines("a")] == ["1", "3"]
    assert [request.prompt for request in double.requests] == ["Why?", "How?"]
    assert run("batch", "-", "-o", "b", stdin=b'{"prompt": "x"}\n{"prompt": "y"}').code == 0
    assert len(lines("b")) == 2
    assert not (work / "b.batch" / "input").exists()
    grown = run("batch", "-", "-o", "b", stdin=b'{"prompt": "x"}\n{"prompt": "y"}\n{"prompt": "z"}')
    assert "3 rows · 2 are done already" in grown.err
    assert run("batch", "in.txt", "-o", "c", "--template", "<{line}>").code == 0
    assert double.requests[-1].prompt == "<How?>"


def test_a_pipe_is_read_once(run, work: Path, double: Double) -> None:
    os.mkfifo("pipe")
    with subprocess.Popen(["sh", "-c", "cat in.jsonl > pipe"]):
        assert run("batch", "pipe", "-o", "out.jsonl").code == 0
    assert len(lines()) == 10


USAGE = [
    (["--max-failures", "0"], "--max-failures"),
    (["--limit", "-1"], "--limit"),
    (["--concurrency", "0"], "neither auto nor a whole number"),
    (["--concurrency", "many"], "neither auto"),
    (["--concurrency", "9" * 5000], "neither auto"),
    (["-T", "-1"], "temperature"),
    (["--seed", "-3"], "seed"),
    (["--template", "{"], "without its other half"),
    (["--template", "{line}", "--input-format", "openai"], "--template goes with jsonl and txt"),
    (["--template", "{x}", "--input-format", "txt"], "{line}"),
    (["--schema", "{}", "--json-object"], "give one of them"),
    (["--base-url", "http://x"], "--base-url goes with --engine openai"),
    (["--workers", "2"], "--workers goes with --engine ray"),
    (["--engine", "openai", "-m", "smolmix"], "--model goes with --engine local or ray"),
    (["--engine", "openai", "--ram", "3G"], "--ram goes with --engine local or ray"),
    (["--engine", "openai"], "needs --base-url"),
    (["--order", "backwards"], "--order"),
]


@pytest.mark.parametrize(("options", "says"), USAGE, ids=range(len(USAGE)))
def test_2_usage(run, work: Path, double: Double, options: list[str], says: str) -> None:
    result = run(*BATCH, *options)
    assert (result.code, result.out) == (2, "")
    assert says in result.err
    assert not list(work.glob("out*"))


def test_2_paths(run, work: Path, double: Double) -> None:
    assert "is a folder" in run("batch", ".", "-o", "x").err
    assert "needs a file" in run("batch", "in.jsonl", "-o", "-").err
    assert "names no file" in run("batch", "in.jsonl", "-o", "").err
    before = (work / "in.jsonl").read_bytes()
    result = run("batch", "in.jsonl", "-o", "./in.jsonl", "--fresh")
    assert result.code == 2
    assert "is the input" in result.err
    assert (work / "in.jsonl").read_bytes() == before
    (work / "in.jsonl").write_bytes("a\n".encode("utf-16"))
    assert "is UTF-16" in run(*BATCH).err


def test_bytes_that_are_no_text(run, work: Path, double: Double) -> None:
    """In the name of a file, and in a system prompt: rows that get it fail."""
    name = os.fsdecode(b"caf\xe9")
    (work / name).write_bytes((work / "in.jsonl").read_bytes())
    assert run("batch", name, "-o", f"{name}.out").code == 0
    result = run(*BATCH, "-s", name)
    assert result.code == 10
    assert "without its other half" in lines()[0]["error"]["message"]


def test_3_not_found(run, work: Path, double: Double) -> None:
    assert run("batch", "nothing", "-o", "x").code == 3
    assert run("batch", "in.jsonl", "-o", "nowhere/x").code == 3
    assert run("batch", "in.jsonl", "-o", "x" * 300).code == 3
    assert run(*BATCH, "--template", "@nothing").code == 3


def test_3_no_such_model(run, work: Path) -> None:
    result = run(*BATCH, "-m", "nobody")
    assert (result.code, "no model is called nobody" in result.err) == (3, True)
    assert not (work / "out.jsonl.batch").exists()


def test_4_refused(run, work: Path, double: Double) -> None:
    run(*BATCH)
    result = run(*BATCH, "-T", "0.9")
    assert (result.code, "temperature was 0.5 and is 0.9" in result.err) == (4, True)
    assert run(*BATCH, "-T", "0.9", "--fresh").code == 0
    write(work, 2, '{"id": "r0", "prompt": ""}')
    result = run("batch", "in.jsonl", "-o", "other")
    assert (result.code, "lines 1 and 3 have the same id" in result.err) == (4, True)
    assert not list(work.glob("other*"))


def test_5_the_engine_gives_up(run, work: Path, double: Double) -> None:
    double.behaviour.raises_after = 4
    result = run(*BATCH)
    assert (result.code, result.out) == (5, "")
    assert "4 of 10 rows are done; go on with: mixlocal" in result.err
    assert "the double gave up" in result.err
    double.behaviour.raises_after = None
    assert run(*BATCH).code == 0
    assert len(lines()) == 10


def failing(wanted: str, number: int, at: int) -> Callable[[str, int], int]:
    calls = 0

    def on_call(name: str, nbytes: int) -> int:
        nonlocal calls
        calls += name == wanted and nbytes != 6
        if name == wanted and calls >= at:
            raise OSError(number, os.strerror(number))
        return nbytes

    return on_call


@pytest.mark.parametrize(("name", "number", "code"), [("write", errno.ENOSPC, 6), ("fsync", errno.EIO, 8)])
def test_6_and_8_the_disk(
    run, work: Path, double: Double, monkeypatch: pytest.MonkeyPatch, name: str, number: int, code: int
) -> None:
    """A full disk resumes; what a disk did not take is never counted as done."""
    with monkeypatch.context() as patched:
        patched.setattr(durable, "on_call", failing(name, number, 5))
        result = run(*BATCH)
    assert (result.code, result.out) == (code, "")
    assert "Traceback" not in result.err
    assert not Path("out.jsonl").exists()
    assert run(*BATCH).code == 0
    assert len({line["custom_id"] for line in lines()}) == len(lines()) == 10


def test_14_no_permission(run, work: Path, double: Double) -> None:
    (work / "out.jsonl.batch").symlink_to(work)
    assert run(*BATCH).code == 14
    assert sorted(path.name for path in work.iterdir()) == ["in.jsonl", "out.jsonl.batch"]


def test_terminal_controls_in_what_is_said(run, work: Path, double: Double) -> None:
    write(work, 1, '{"id": "\\u001b[31m", "prompt": "a"}', '{"id": "\\u001b[31m", "prompt": "b"}')
    result = run(*BATCH)
    assert (result.code, "\x1b" in result.err) == (4, False)


def test_no_torch_for_a_server_and_none_before_the_input_was_looked_at(work: Path) -> None:
    probe = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from batch_double import Double\n"
        "from mixlocal.app.batch import engines\n"
        "from mixlocal.cli import main\n"
        "engines.ENGINES['openai'] = lambda _: Double()\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )

    def torch_after(*arguments: str) -> str:
        words = [sys.executable, "-c", probe, str(DOUBLE.parent), *arguments]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    assert torch_after(*BATCH, "--engine", "openai", "--base-url", "http://127.0.0.1:1") == "0 False\n"
    write(work, 2, '{"id": "r0", "prompt": ""}')
    assert torch_after("batch", "in.jsonl", "-o", "other") == "4 False\n"


def test_a_real_model(run, work: Path) -> None:
    """What it answers to a row is what `prompt` answers with the row's seed; another variant is another batch."""
    rows = [{"id": f"r{n}", "prompt": f"text {n}", "raw": True, "max_tokens": 6} for n in range(5)]
    (work / "in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tiny = (*BATCH, "-m", "tiny:q4")
    assert run(*tiny, "-T", "0.9", "--concurrency", "3").code == 0
    found = {line["custom_id"]: line for line in lines()}
    for row in rows[:2]:
        seed = str(found[row["id"]]["seed"])
        alone = run("prompt", "-m", "tiny:q4", "--raw", "-T", "0.9", "-n", "6", "--seed", seed, "--json", row["prompt"])
        choice = found[row["id"]]["response"]["body"]["choices"][0]
        expected = json.loads(alone.out)
        assert (choice["text"], choice["finish_reason"]) == (expected["text"], expected["finish_reason"])
    assert run(*tiny, "-T", "0.9", "--ctx", "64").code == 0  # how fast and how much is not what
    other = run(*BATCH, "-m", "tiny:bf16", "-T", "0.9")
    assert (other.code, "variant was q4 and is bf16" in other.err) == (4, True)


def test_a_task_for_sky_is_printed(run, work: Path) -> None:
    result = run("batch", "--print-sky-task")
    assert (result.code, result.err) == (0, "")
    assert "mixlocal batch" in result.out


PROGRESS = [
    (Progress(1000, 412, 3, 400, 16, 210.5, 9000, 36_000, {"gpu": 0, "ram": 92, "disk": 8}),
     "412/1000 rows · 3 failed · 1.9 rows/s · 171 tok/s · experts RAM 92% disk 8% · ETA 5 min"),
    (Progress(10, 0, 0, 0, 4, 1.0), "0/10 rows"),
    (Progress(10, 2, 0, 2, 4, 100.0, 0, 50), "2/10 rows · a row every 50 s · 0 tok/s · ETA 7 min"),
    (Progress(10**6, 10, 0, 10, 4, 10.0, 0, 1000), "10/1000000 rows · 1.0 rows/s · 100 tok/s · ETA 277.8 h"),
    (Progress(10, 5, 0, 0, 4, 60.0), "5/10 rows · 0.0 rows/s · 0 tok/s"),
]  # fmt: skip


@pytest.mark.parametrize(("progress", "text"), PROGRESS, ids=range(len(PROGRESS)))
def test_the_line_of_progress(progress: Progress, text: str) -> None:
    assert line(progress) == text


def test_progress_off_a_terminal(run, work: Path, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain line now and then, without a control character."""
    monkeypatch.setattr(batch_progress, "PLAIN_PROGRESS_SECONDS", 0.05)
    double.behaviour.delay, double.behaviour.pulse = 0.1, 0.02
    err = run(*BATCH).err
    assert re.search(r"^\d+/10 rows", err, re.MULTILINE)
    assert "\x1b" not in err
    assert "\r" not in err


# --- the real program, which is sent signals


def child(*arguments: str, **behaviour: Any) -> subprocess.Popen[str]:
    environment = os.environ | {VARIABLE: json.dumps(behaviour)}
    return subprocess.Popen(
        [sys.executable, str(DOUBLE), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def wait_for_rows(count: int) -> None:
    journal, end = Path("out.jsonl.batch/journal"), time.monotonic() + 30
    while not journal.exists() or journal.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def log() -> list[str]:
    return Path("log").read_text().split()


@pytest.fixture
def many(work: Path) -> Iterator[Path]:
    write(work, 60)
    yield work
    with child(*BATCH, log="log") as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert [line["custom_id"] for line in lines()] == [f"r{n}" for n in range(60)]


def test_130_one_interrupt_finishes_what_is_in_flight(many: Path) -> None:
    with child(*BATCH, delay=0.2, log="log") as process:
        wait_for_rows(6)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert command.DRAINING in errors
    done = len(log())
    assert f"{done} of 60 rows are done; go on with: mixlocal batch in.jsonl -o out.jsonl" in errors
    assert "Traceback" not in errors
    assert 6 <= done < 20
    assert Path("out.jsonl.batch/journal").read_bytes().count(b"\n") == done  # none was given up


@pytest.mark.parametrize(
    ("signals", "code"), [((signal.SIGINT, signal.SIGINT), 130), ((signal.SIGTERM,), 143),
                          ((signal.SIGINT, signal.SIGTERM), 143)],
)  # fmt: skip
def test_130_and_143_at_once(many: Path, signals: tuple[signal.Signals, ...], code: int) -> None:
    """With rows in flight that take a minute: they are given up, and those that are done are kept."""
    with child(*BATCH, delay=0.02, log="log") as process:
        wait_for_rows(8)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    before = Path("out.jsonl.batch/journal").read_bytes().count(b"\n")
    with child(*BATCH, delay=60, pulse=5, log="log") as process:
        assert process.stderr is not None
        while "rows" not in process.stderr.readline():
            pass
        time.sleep(0.5)
        start = time.monotonic()
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        _, errors = process.communicate()
    assert time.monotonic() - start < 1.5
    assert process.returncode == code
    assert f"{before} of 60 rows are done; go on with: mixlocal batch in.jsonl -o out.jsonl" in errors
    assert "Traceback" not in errors
    assert len(set(log())) >= before == Path("out.jsonl.batch/journal").read_bytes().count(b"\n")


def test_an_interrupt_when_nothing_is_left_to_begin_ends_well(work: Path) -> None:
    write(work, 4)
    with child(*BATCH, delay=0.6, log="log") as process:
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(0.15)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert len(lines()) == 4


def test_interrupts_in_a_terminal(many: Path) -> None:
    """One line of progress, drawn in place; Ctrl-C, then Ctrl-C."""
    behaviour = json.dumps({"delay": 0.5, "pulse": 0.02, "log": "log"})
    program = (sys.executable, str(DOUBLE))
    with Terminal(*BATCH, home=many, columns=60, command=program, **{VARIABLE: behaviour}) as terminal:
        terminal.until(r"[1-9]/60 rows")
        terminal.type("\x03")
        terminal.until("Ctrl-C again stops at")
        terminal.type("\x03")
        assert terminal.end() == 130
        text = terminal.text()
    assert len(re.findall(r"/60 rows$|/60 rows ·", text, re.MULTILINE)) == 0  # the line is wiped at the end
    assert "of 60 rows are done; go on with:" in text
    assert "mixlocal: interrupted" in text
    assert all(len(line) <= 60 for line in terminal.display())


def test_13_two_at_once(many: Path) -> None:
    with child(*BATCH, delay=0.2, log="log") as process:
        wait_for_rows(1)
        with child(*BATCH, log="second") as other:
            _, errors = other.communicate()
        assert other.returncode == 13
        assert f"in use by process {process.pid}" in errors
        assert not Path("second").exists()
        process.send_signal(signal.SIGTERM)
        process.communicate()


def test_a_closed_pipe_on_stderr_is_no_traceback(work: Path) -> None:
    words = f"{sys.executable} {DOUBLE} {' '.join(BATCH)} --json 2>&1 >/dev/null | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", words], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stdout + done.stderr
