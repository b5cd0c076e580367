"""What the two formats share: id ranges, control tokens, decoding, and names for what their libraries raise."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from mixlocal.app.text_stream import TextStream
from mixlocal.app.tokenizer import ControlSpan
from mixlocal.app.tokenizer_files import Ends, first_line
from mixlocal.errors import RefusedError, UsageError

SPACE = "\u2581"  # how sentencepiece writes a space inside a token


class Vocabulary(ABC):
    """A `Tokenizer` but for what each format does in its own way: the abstract methods, `byte_level`, `adds_bos`."""

    byte_level: bool
    adds_bos: bool

    def __init__(self, path: Path, size: int, ends: Ends, controls: dict[str, int]) -> None:
        self.path = path
        self.vocab_size = size
        self.bos_id = ends.bos_id
        self.eos_ids = ends.eos_ids
        self.controls = controls
        self.control_ids = {token_id: text for text, token_id in controls.items()}
        longest_first = sorted(controls, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first))) if controls else None

    def control_spans(self, text: str) -> list[ControlSpan]:
        if self._control_pattern is None:
            return []
        return [(m.start(), m.end(), self.controls[m.group()]) for m in self._control_pattern.finditer(text)]

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        stream = TextStream(self, continuation=continuation)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RefusedError(f"token id {token_id} is outside the tokenizer's {self.vocab_size} ids")

    def spell_controls(self, ids: list[int], allowed: int | None) -> list[int]:
        """Replace control ids that plain text ran into by their letters' bytes; `allowed` is the unknown token."""
        if self.control_ids.keys().isdisjoint(ids):
            return ids
        spelled: list[int] = []
        for token_id in ids:
            is_control = token_id in self.control_ids and token_id != allowed
            spelled += self._spell(self.control_ids[token_id]) if is_control else [token_id]
        return spelled

    def _spell(self, text: str) -> list[int]:
        ids = [self.byte_id(byte) for byte in text.encode()]
        known = [token_id for token_id in ids if token_id is not None]
        if len(known) < len(ids):
            raise UsageError(f"the text contains {text!r}, a control token that this tokenizer cannot write as text")
        return known

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> list[int]: ...
    @abstractmethod
    def is_text(self, token_id: int) -> bool: ...
    @abstractmethod
    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes: ...
    @abstractmethod
    def byte_id(self, byte: int) -> int | None:
        """The token that stands for one byte, None where there is none."""


def check_text(text: str) -> None:
    """Both libraries fail obscurely on half a surrogate pair, which Python makes of malformed input bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = f"U+{ord(text[error.start]):04X}"
        hint = "The input was not valid UTF-8 where it was read."
        raise UsageError(f"the text holds {bad}, half of a surrogate pair, at character {error.start}", hint) from error


class LibraryCall:
    """Names what `tokenizers` and `sentencepiece` raise after the file that caused it.

    `tokenizers` raises plain `Exception`, and a Rust panic arrives as a class that cannot be imported and derives from
    BaseException; so types are compared here, where an `except` would have to catch everything.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or kind is None:
            return
        listed = issubclass(kind, ValueError | RuntimeError | LookupError | ArithmeticError)
        if listed or kind is Exception or kind.__name__ == "PanicException":
            raise RefusedError(f"{self._path} is not a usable tokenizer: {first_line(error)}") from error
