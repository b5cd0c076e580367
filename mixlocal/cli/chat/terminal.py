"""The terminal's modes: quiet while an answer is printed, as they were in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
from collections.abc import Iterator
from types import FrameType

ECHO_FIELD = 3  # of what tcgetattr gives: the local modes
PLAIN_SCREEN = "\x1b[?2004l\x1b[?25h\x1b[0m"  # no bracketed paste, a cursor, no colours


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Whatever happens inside, a signal's exception in the middle of an editor's work too, the modes are put back."""
    modes = _modes()
    try:
        yield
    finally:
        if modes is not None and _modes() != modes:
            _set(modes)
            sys.stdout.write(PLAIN_SCREEN)
            sys.stdout.flush()


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """What is typed while an answer is printed does not show in it; it is there for the next line. Ctrl-Z hands the
    terminal back as it was, and coming back silences it again."""
    modes = _modes()
    if modes is None:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        _set(modes)
        os.kill(os.getpid(), signal.SIGSTOP)
        _silence(modes)  # here again: the shell has said SIGCONT

    former = signal.signal(signal.SIGTSTP, leave)
    _silence(modes)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, former)
        _set(modes)


def _modes() -> list[int | list[bytes | int]] | None:
    """None if standard input is no terminal."""
    try:
        return termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, OSError, ValueError):
        return None


def _silence(modes: list[int | list[bytes | int]]) -> None:
    local = modes[ECHO_FIELD]
    assert isinstance(local, int)
    _set([*modes[:ECHO_FIELD], local & ~termios.ECHO, *modes[ECHO_FIELD + 1 :]])


def _set(modes: list[int | list[bytes | int]]) -> None:
    with contextlib.suppress(termios.error, OSError):  # the terminal may be gone
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, modes)
