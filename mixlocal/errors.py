"""Every error a user, a disk or a network can cause.

MixlocalError               1   anything below; the only type the command line catches
├── UsageError              2   an option or argument makes no sense, or needs --yes
├── NotFoundError           3   no such model, file or folder
├── RefusedError            4   bad config, unsupported or unsafe model, manifest mismatch
├── NetworkError            5   the network gave up; running the command again resumes
├── DiskFullError           6   not enough disk
├── MemoryBudgetError       7   not enough memory
├── CorruptError            8   data on disk is damaged
├── ContextOverflowError    9   the text does not fit the context
├── AccessError            11   the Hub does not give it to us: gated, private, or a bad token
├── SchemaError            12   the answer ended before it was the JSON that was asked for
├── LockedError            13   another process holds the store
└── PermissionDeniedError  14   read-only, or not ours

The number is the exit code. `hint` is what to do next, in one sentence.
"""

from __future__ import annotations

from typing import ClassVar


class MixlocalError(Exception):
    """Base of every expected failure: one line of `message`, an optional `hint`, an exit code."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "unexpected"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MixlocalError):
    exit_code = 2
    code = "usage"


class NotFoundError(MixlocalError):
    exit_code = 3
    code = "not_found"


class RefusedError(MixlocalError):
    exit_code = 4
    code = "refused"


class NetworkError(MixlocalError):
    exit_code = 5
    code = "network"


class DiskFullError(MixlocalError):
    exit_code = 6
    code = "disk_full"


class MemoryBudgetError(MixlocalError):
    exit_code = 7
    code = "not_enough_memory"


class CorruptError(MixlocalError):
    exit_code = 8
    code = "corrupt"


class ContextOverflowError(MixlocalError):
    exit_code = 9
    code = "context_overflow"


class AccessError(MixlocalError):
    exit_code = 11
    code = "no_access"


class SchemaError(MixlocalError):
    exit_code = 12
    code = "schema_not_satisfied"


class LockedError(MixlocalError):
    exit_code = 13
    code = "locked"


class PermissionDeniedError(MixlocalError):
    exit_code = 14
    code = "no_permission"
