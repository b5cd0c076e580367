"""The hashes by which the Hub names a file's content."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Digest:
    """sha256 of a large file's bytes (64 hex), or git's hash of a small one (40 hex): sha1 over a header and them."""

    value: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", self.value):
            raise ValueError("neither a sha256 nor a git hash")

    @property
    def sha256(self) -> str | None:
        return self.value if len(self.value) == 64 else None

    def start(self, nbytes: int) -> Hasher:
        """A hash that is to be fed `nbytes`."""
        if self.sha256:
            return Hasher(hashlib.sha256())
        return Hasher(hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False))

    def matches(self, data: bytes) -> bool:
        hasher = self.start(len(data))
        hasher.update(data)
        return hasher.value == self.value


class Hasher:
    def __init__(self, state: hashlib._Hash) -> None:
        self._state = state

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._state.update(data)

    @property
    def value(self) -> str:
        return self._state.hexdigest()
