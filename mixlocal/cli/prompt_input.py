"""Texts that a prompt is made of: what is piped in, files, the command line."""

from __future__ import annotations

import codecs
import contextlib
import re
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mixlocal.cli.options import Globals
from mixlocal.cli.render import say
from mixlocal.cli.safe_text import safe_text
from mixlocal.errors import MixlocalError, NotFoundError, PermissionDeniedError, UsageError

MAX_TEXT_BYTES = 64 << 20  # some 15 million tokens, beyond any context
SILENCE_SECONDS = 3.0
STDIN = "standard input"


@dataclass(frozen=True, slots=True)
class Source:
    """A text to go before the question. name: of its file; empty where it needs none."""

    text: str
    name: str = ""

    def render(self, dropped: int = 0) -> str:
        """As the model sees it, without the first `dropped` characters."""
        text = self.text[dropped:]
        return named(self.name, text) if self.name else text


def join(*parts: str) -> str:
    """With a blank line between two."""
    return "\n\n".join(part for part in parts if part)


def named(name: str, text: str) -> str:
    """A file for a model to read: its name, then a fenced block whose fence is not in it."""
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{safe_text(name)}:\n{fence}\n{text.removesuffix(chr(10))}\n{fence}"


def read_system(given: dict[str, Any]) -> str:
    """The text of --system or --system-file; of both, the one on the command line, for the other was set before.

    Raises `UsageError` if both are, and as `read_file`.
    """
    text, file = given["system"], given["system_file"]
    if text and file:
        origin = click.get_current_context().get_parameter_source
        typed = [origin(name) is ParameterSource.COMMANDLINE for name in ("system", "system_file")]
        if typed[0] == typed[1]:
            raise UsageError("--system and --system-file: give one of them")
        text, file = (text, None) if typed[0] else (None, file)
    return read_file(file) if file else text or ""


def attach(name: str) -> str:
    """A file as part of a message. Raises as `read_file`."""
    return named(name, read_file(name))


def read_file(name: str) -> str:
    """A text file. Raises `NotFoundError`, `PermissionDeniedError`, or `UsageError` for what is no text."""
    return decode_text(read_file_bytes(name), name)


def read_file_bytes(name: str) -> bytes:
    """As `read_file`; at most one byte more than a text may have."""
    if name == "-":
        raise UsageError("standard input is read without being named", "leave the - out")
    try:
        with Path(name).open("rb") as file:
            return file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> MixlocalError:
    if isinstance(error, IsADirectoryError):
        return UsageError(f"{name} is a folder, not a file")
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFoundError(f"{name}: no such file")
    if isinstance(error, PermissionError):
        return PermissionDeniedError(f"{name}: permission denied", "check its owner and mode")
    return UsageError(f"{name} cannot be read: {(error.strerror or str(error)).lower()}")


def read_piped(options: Globals) -> str:
    """What is piped in, without the newlines at its end; nothing from a terminal. Raises `UsageError` for no text."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    _tell_silence(options)
    try:
        data = sys.stdin.buffer.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{STDIN} cannot be read: {(error.strerror or str(error)).lower()}") from error
    return decode_text(data, STDIN).rstrip("\n")


def _tell_silence(options: Globals) -> None:
    """Who started us may have left a pipe open that nobody writes to."""
    with contextlib.suppress(OSError, ValueError):  # a stand-in without a descriptor
        if not select.select([sys.stdin.buffer], [], [], SILENCE_SECONDS)[0]:
            say(options, f"waiting for {STDIN}; start it with < /dev/null if there is nothing to come")


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 as text, with line ends as \\n and no byte-order mark. Raises `UsageError` naming the first byte that is
    none."""
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(f"{where} is larger than {MAX_TEXT_BYTES >> 20} MiB")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        hint = "convert it: iconv -f UTF-16 -t UTF-8"
        raise UsageError(f"{where} is UTF-16, not UTF-8: bytes 0 and 1 are 0x{data[0]:02x} 0x{data[1]:02x}", hint)
    nul = data.find(0)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if not 0 <= nul < error.start:
            raise UsageError(f"{where} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error
    if nul >= 0:
        raise UsageError(f"{where} has a NUL byte at {nul}: that is no text")
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def total(sources: Sequence[Source]) -> int:
    """Characters."""
    return sum(len(source.text) for source in sources)


def render_all(sources: Sequence[Source], dropped: int = 0) -> str:
    """All of them, without the first `dropped` characters."""
    parts = []
    for source in sources:
        gone = min(dropped, len(source.text))
        dropped -= gone
        if gone < len(source.text):
            parts.append(source.render(gone))
    return join(*parts)
