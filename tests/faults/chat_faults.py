"""Interrupts a chat at random times, and looks whether it is as it should be afterwards.

    .venv/bin/python tests/faults/chat_faults.py MODEL [--count 100] [--seed 1]

A chat in a real terminal is sent SIGINT while it reads a prompt, while it answers, between two answers, twice in a row,
and while it loads. The line editor must be back within a second, the terminal's modes must be what they were, and what
was answered until then must be in the database; while loading, the program must end with 130 within a second.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from terminal import Terminal

from mixlocal.app.installed import find_store
from mixlocal.store.paths import home
from mixlocal.store.session_db import SessionDb

LIMIT_SECONDS = 1.0
LONG = "the tide comes in and the tide goes out, and nobody asks the harbour what it thinks of that; " * 12
FRESH = 20  # interrupts to one program
OPTIONS = ("-T", "1.2", "-n", "400", "--ctx", "4096")


@dataclass
class Report:
    """loading, answering: seconds until the program ended, or the line editor was back. struck: how many interrupts hit
    an answer."""

    loading: list[float] = field(default_factory=list)
    answering: list[float] = field(default_factory=list)
    struck: int = 0
    faults: list[str] = field(default_factory=list)

    def judge(self, what: str, good: bool) -> None:
        if not good:
            self.faults.append(what)


def campaign(model: str, place: Path, count: int, seed: int) -> Report:
    """A quarter of the interrupts while loading, the others in chats of `FRESH` each."""
    rng, report = random.Random(seed), Report()
    loads = count // 4
    for _ in range(loads):
        interrupt_load(model, place, rng, report)
    for start in range(0, count - loads, FRESH):
        interrupt_chat(model, place, rng, report, min(FRESH, count - loads - start))
    return report


def interrupt_load(model: str, place: Path, rng: random.Random, report: Report) -> None:
    with Terminal("chat", "-m", model, *OPTIONS, home=place) as terminal:
        before = terminal.modes()
        wait(terminal, rng.uniform(0.3, 2.5))  # before that, Python itself is not up yet
        greeted = terminal.prompts() > 0
        start = time.monotonic()
        terminal.interrupt()
        if greeted or not ended_within(terminal, LIMIT_SECONDS):
            report.judge(f"no prompt after an interrupt while loading:\n{terminal.text()}", terminal.prompts() > 0)
            terminal.ready()
            wait(terminal, 0.3)
            terminal.type("\x04")
        report.loading.append(time.monotonic() - start if not greeted else 0.0)
        code = terminal.end()
        report.judge(f"exit {code} after an interrupt while loading:\n{terminal.text()}", code in (0, 130))
        report.judge(f"traceback:\n{terminal.text()}", "Traceback" not in terminal.text())
        report.judge("modes after loading", terminal.last_modes in (None, before))


def interrupt_chat(model: str, place: Path, rng: random.Random, report: Report, count: int) -> None:
    with Terminal("chat", "-m", model, *OPTIONS, home=place) as terminal:
        before = terminal.modes()
        terminal.ready()
        waiting = terminal.modes()
        for n in range(count):
            interrupt_answer(terminal, rng, report, f"{n}: {LONG * 6 if n % 3 == 0 else 'Tell me a long story.'}")
            report.judge(f"modes while it waits, after {n}", terminal.modes() == waiting)
            prompts = terminal.prompts()
            terminal.say("/clear" if n % 4 == 3 else "/ctx")
            terminal.ready(prompts + 1)
        terminal.say("/quit")
        code = terminal.end()
        report.judge(f"exit {code} at the end:\n{terminal.text()}", code == 0)
        report.judge(f"traceback:\n{terminal.text()}", "Traceback" not in terminal.text())
        report.judge("modes at the end", terminal.last_modes in (None, before))


def interrupt_answer(terminal: Terminal, rng: random.Random, report: Report, text: str) -> None:
    prompts = terminal.prompts()
    terminal.type(f"\x1b[200~{text}\x1b[201~\r")
    wait(terminal, rng.uniform(0.0, 1.6))
    over = terminal.prompts() > prompts
    terminal.interrupt()
    if rng.random() < 0.25:
        time.sleep(0.02)
        terminal.interrupt()
    try:
        report.answering.append(terminal.ready(prompts + 1, seconds=10))
    except AssertionError as error:
        report.faults.append(f"the prompt did not come back: {error}")
        return
    report.struck += not over
    wait(terminal, 0.1)  # the second signal's hint


def wait(terminal: Terminal, seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and terminal.read(min(left, 0.02)):
        pass


def ended_within(terminal: Terminal, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not terminal.read(0.02):
            return True
        if terminal.prompts():
            return False
    return False


def kept_answers(place: Path) -> tuple[int, int]:
    """(answers in the database, interrupted ones among them that have a text)."""
    with SessionDb(home(place).sessions_db) as db:
        turns = [turn for saved in db.list() for turn in db.turns(saved.id) if turn.role == "assistant"]
    return len(turns), sum(turn.interrupted and bool(turn.content) for turn in turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an installed one, by name")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    store = find_store(arguments.model, home())
    with tempfile.TemporaryDirectory() as folder:
        report = campaign(str(store), Path(folder), arguments.count, arguments.seed)
        answers, partial = kept_answers(Path(folder))
    late = [seconds for seconds in report.loading + report.answering if seconds > LIMIT_SECONDS]
    print(
        f"{len(report.loading)} interrupts while loading, the program ended after {max(report.loading):.2f} s at most\n"
        f"{len(report.answering)} later, {report.struck} of them struck an answer, the line editor was back after "
        f"{max(report.answering):.2f} s at most\n"
        f"{answers} answers kept, {partial} of them partial; {len(late)} took longer than {LIMIT_SECONDS:.0f} s; "
        f"{len(report.faults)} faults"
    )
    for fault in report.faults:
        print(fault)
    sys.exit(bool(late or report.faults))


if __name__ == "__main__":
    main()
