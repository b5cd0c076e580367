"""The real program in a terminal: keys in, a screen with its history out."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import pexpect
import pyte

PATIENCE_SECONDS = 60.0


class Terminal:
    """What `mixlocal ARGUMENTS` shows in `columns` x `lines`. `raw` is every byte it wrote, `last_modes` how it left
    the terminal."""

    def __init__(
        self, *arguments: str, home: Path, columns: int = 80, lines: int = 24, command: tuple[str, ...] = (), **env: str
    ) -> None:
        program = command or (sys.executable, "-m", "mixlocal")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("MIXLOCAL_")}
        self.screen = pyte.HistoryScreen(columns, lines, history=100_000, ratio=1)
        self.screen.write_process_input = lambda data: self.child.send(data)  # answers to "where is the cursor?"
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.last_modes: list[object] | None = None
        self.child = pexpect.spawn(
            program[0], [*program[1:], *arguments], dimensions=(lines, columns), timeout=PATIENCE_SECONDS,
            env=clean | {"MIXLOCAL_HOME": str(home), "TERM": "xterm-256color", "LANG": "C.UTF-8"} | env,
        )  # fmt: skip
        self.child.delaybeforesend = None

    def type(self, keys: str) -> None:
        self.child.send(keys.encode(errors="surrogateescape"))

    def say(self, text: str) -> None:
        """A message or command, and Enter."""
        self.type(text)
        self.type("\r")

    def read(self, seconds: float = 0.02) -> bool:
        """Take what has been written; False at the end of the program."""
        try:
            data = self.child.read_nonblocking(1 << 16, timeout=seconds)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += data
        self._stream.feed(data)
        return True

    def until(self, wanted: str | Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> float:
        """Read until a text (a regular expression) or a condition is there; returns the seconds it took."""
        start = time.monotonic()
        while not self._is_there(wanted):
            alive = self.read()
            if not alive and not self._is_there(wanted):
                raise AssertionError(f"it ended before {wanted!r} was there:\n{self.text()}")
            if time.monotonic() - start > seconds:
                raise AssertionError(f"{wanted!r} did not come in {seconds} s:\n{self.text()}")
        return time.monotonic() - start

    def ready(self, prompts: int = 1, seconds: float = PATIENCE_SECONDS) -> float:
        """Read until the line editor waits for keys for the `prompts`-th time; returns the seconds it took."""
        return self.until(lambda: self.prompts() >= prompts and self._shows_prompt(), seconds)

    def prompts(self) -> int:
        """How often the line editor has begun: it asks for bracketed paste then."""
        return self.raw.count(b"\x1b[?2004h")

    def _shows_prompt(self) -> bool:
        """The status line is there, and the prompt above it."""
        lines = [line for line in self.display() if line.strip()]
        return len(lines) > 1 and " tok (" in lines[-1] and any(line.startswith(">") for line in lines[:-1])

    def _is_there(self, wanted: str | Callable[[], bool]) -> bool:
        return bool(re.search(wanted, self.text())) if isinstance(wanted, str) else wanted()

    def display(self) -> list[str]:
        """The lines of the screen."""
        return [line.rstrip() for line in self.screen.display]

    def text(self) -> str:
        """What scrolled away and what is on the screen."""
        above = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip()

    def modes(self) -> list[object]:
        return termios.tcgetattr(self.child.fileno())

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        self.child.setwinsize(lines, columns)

    def interrupt(self) -> None:
        """As Ctrl-C does it where the terminal makes a signal of it."""
        self.child.kill(signal.SIGINT)

    def end(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Read to the end; the exit code, or 128 + the signal."""
        start = time.monotonic()
        while self.read(0.05):
            assert time.monotonic() - start < seconds, self.text()
        with contextlib.suppress(termios.error):
            self.last_modes = self.modes()
        self.child.close(force=False)
        return self.child.exitstatus if self.child.exitstatus is not None else 128 + self.child.signalstatus

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.child.close(force=True)
