"""Where messages are written: line editing on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

from mixlocal.cli.chat.interrupts import Interrupts
from mixlocal.cli.chat.terminal import restored
from mixlocal.cli.prompt_input import decode_text

PROMPT = "> "
NEXT_LINE = "  "


class Reader(Protocol):
    def read(self, draft: str = "") -> str:
        """The next message, with line ends as \\n. draft: what is in the line to begin with.

        Raises EOFError at the end of the input, KeyboardInterrupt for Ctrl-C on an empty line.
        """


class Lines:
    """A message a line, from a pipe or a file."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def read(self, draft: str = "") -> str:
        with self._interrupts.raising():
            line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return decode_text(line, "standard input").rstrip("\r\n")


class Editor:
    """Enter sends, Alt-Enter and Ctrl-J begin a new line, Ctrl-G opens $VISUAL or $EDITOR, Tab completes."""

    def __init__(
        self,
        interrupts: Interrupts,
        history: Path | None,
        complete: Callable[[str], Iterable[str]],
        status: Callable[[], str],
    ) -> None:
        """history: None keeps it in memory. complete: what may stand instead of the last word of a line. status: what
        the bottom line shows."""
        self._interrupts = interrupts
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: signal.Signals | None = None
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
        with self._ends_are_heard(), self._interrupts.heard_by(self._wake), restored():
            text = self._session.prompt(PROMPT, default=draft, pre_run=self._begin, handle_sigint=False)
        self._hear_late_key()
        return text.replace("\r\n", "\n").replace("\r", "\n")

    @contextmanager
    def _ends_are_heard(self) -> Iterator[None]:
        """SIGTERM and SIGHUP end the editor first: an exception within its event loop would leave the terminal torn."""
        former = {number: signal.signal(number, self._hear_end) for number in (signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
            if self._ended is not None:
                signal.raise_signal(self._ended)

    def _begin(self) -> None:
        """In the event loop, before the first key: also for a signal that was faster."""
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._attend)

    def _hear_end(self, number: int, frame: FrameType | None) -> None:
        self._ended = signal.Signals(number)
        self._wake()

    def _wake(self) -> None:
        """In a signal's handler: what there is to do is done in the event loop."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._attend)

    def _attend(self) -> None:
        """An interrupt that comes when the line is sent already is left for the answer."""
        app = self._session.app
        if app.is_done or not app.is_running:
            return
        if self._ended is not None:
            app.exit(exception=EOFError())
        elif self._interrupts.heard:
            self._interrupts.forget()
            app.key_processor.send_sigint()

    def _hear_late_key(self) -> None:
        """Ctrl-C as a key, behind the one that sent the line."""
        keys = get_typeahead(self._session.app.input)
        last = max((n for n, key in enumerate(keys) if key.key == Keys.ControlC), default=-1)
        if last >= 0:
            self._interrupts.heard = True
        store_typeahead(self._session.app.input, keys[last + 1 :])


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
