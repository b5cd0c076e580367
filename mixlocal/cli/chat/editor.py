"""Where messages are written: line editing on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mixlocal.cli.chat.terminal import restored
from mixlocal.cli.prompt_input import decode_text

PROMPT = "> "
NEXT_LINE = "  "
_ENDS = (signal.SIGTERM, signal.SIGHUP)


class Reader(Protocol):
    def read(self, draft: str = "") -> str:
        """The next message, with line ends as \\n. draft: what is in the line to begin with.

        Raises EOFError at the end of the input, KeyboardInterrupt for Ctrl-C on an empty line.
        """


class Lines:
    """A message a line, from a pipe or a file."""

    def read(self, draft: str = "") -> str:
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode_text(line, "standard input").rstrip("\r\n")


class Editor:
    """Enter sends, Alt-Enter and Ctrl-J begin a new line, Ctrl-G opens $VISUAL or $EDITOR, Tab completes."""

    def __init__(
        self, history: Path | None, complete: Callable[[str], Iterable[str]], status: Callable[[], str]
    ) -> None:
        """history: None keeps it in memory. complete: what may stand instead of the last word of a line. status: what
        the bottom line shows."""
        self._session: PromptSession[str] = PromptSession(
            history=FileHistory(str(history)) if history else InMemoryHistory(),
            completer=_Words(complete),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=lambda width, number, wraps: NEXT_LINE,
            key_bindings=_keys(),
            bottom_toolbar=status,
            enable_open_in_editor=False,
            tempfile_suffix=".md",
        )

    def read(self, draft: str = "") -> str:
        former = {number: signal.getsignal(number) for number in _ENDS}
        try:
            with restored():
                text = self._session.prompt(PROMPT, default=draft, pre_run=self._listen)
        except _EndedError as end:
            handler = former[end.number]
            if not callable(handler):
                raise KeyboardInterrupt from end
            handler(end.number, None)
            raise EOFError from end
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _listen(self) -> None:
        """Let the event loop hear of the end: an exception of a signal's handler would tear it apart."""
        loop = asyncio.get_running_loop()
        for number in _ENDS:
            loop.add_signal_handler(number, self._end, number)

    def _end(self, number: signal.Signals) -> None:
        self._session.app.exit(exception=_EndedError(number))


class _EndedError(BaseException):
    """A signal that ends the program arrived."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number)
        self.number = number


class _Words(Completer):
    def __init__(self, complete: Callable[[str], Iterable[str]]) -> None:
        self._complete = complete

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        word = before.rpartition(" ")[2]
        for choice in self._complete(before):
            yield Completion(choice, -len(word))


def _keys() -> KeyBindings:
    keys = KeyBindings()
    writing = has_focus(DEFAULT_BUFFER)  # and not searching, where these keys mean other things

    @keys.add("enter", filter=writing)
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=writing)
    @keys.add("c-j", filter=writing)
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-g", filter=writing)
    def _open_editor(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    @keys.add("c-c", filter=writing)
    @keys.add("<sigint>", filter=writing)
    def _leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys
