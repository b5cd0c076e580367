"""What strikes at the k-th call that changes the disk. Loads no torch, so that a fork costs little."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

from mixlocal.errors import CorruptError, DiskFullError

KINDS = ("KILL", "EIO", "ENOSPC", "SHORT")
CODES = {"EIO": CorruptError.exit_code, "ENOSPC": DiskFullError.exit_code, "SHORT": DiskFullError.exit_code}
OnCall = Callable[[str, int], int]


def fault(kind: str, at: int, struck: int) -> OnCall:
    """An `on_call` that strikes at the `at`-th durable call, and says so by a byte on the descriptor `struck`.

    A short write is followed by a full disk.
    """
    calls = 0

    def on_call(name: str, nbytes: int) -> int:
        nonlocal calls
        calls += 1
        if calls < at or (calls > at and kind != "SHORT"):
            return nbytes
        os.write(struck, b".")
        if kind == "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "SHORT" and calls == at and nbytes:
            return nbytes // 2
        number = errno.EIO if kind == "EIO" else errno.ENOSPC
        raise OSError(number, os.strerror(number))

    return on_call


def exit_code(pid: int) -> int:
    """Exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
