"""Shows an answer as it comes: Markdown on a terminal, the text as it is elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Protocol

from mixlocal.cli.answer import PrefillMeter, summary
from mixlocal.cli.chat.interrupts import Interrupts
from mixlocal.cli.chat.terminal import silent_keys
from mixlocal.cli.options import Globals
from mixlocal.cli.render import console, say
from mixlocal.cli.safe_text import SafeStream
from mixlocal.errors import MixlocalError

if TYPE_CHECKING:
    from mixlocal.app.chat import Answer, Chat

KEEP_SECONDS = 2.0  # how much of an answer a crash may take


class _Paper(Protocol):
    def push(self, piece: str) -> None: ...
    def finish(self) -> None: ...


class _Plain:
    """safe: for a terminal."""

    def __init__(self, safe: bool) -> None:
        self._safe = SafeStream() if safe else None
        self._ended = True

    def push(self, piece: str) -> None:
        text = self._safe.push(piece) if self._safe else piece
        sys.stdout.write(text)
        sys.stdout.flush()
        self._ended = text.endswith("\n") if text else self._ended

    def finish(self) -> None:
        if not self._ended:
            sys.stdout.write("\n")
        sys.stdout.flush()


class Screen:
    """markdown: render it where stdout is a terminal."""

    def __init__(self, options: Globals, interrupts: Interrupts, *, stats: bool, markdown: bool) -> None:
        self.options, self.stats, self.markdown = options, stats, markdown
        self._interrupts = interrupts

    def show(self, chat: Chat, answer: Answer) -> None:
        """Print it to its end or to Ctrl-C, then the figures."""
        interrupted = False
        with silent_keys():
            with answer:
                try:
                    self._print(answer)
                except KeyboardInterrupt:
                    interrupted = True
            self._tell_end(chat, answer, interrupted)

    def page(self, text: str) -> None:
        """A text of before, all at once."""
        if self._renders():
            from mixlocal.cli.markdown import render_markdown

            render_markdown(console(self.options, sys.stdout), text)
        else:
            paper = self._paper()
            paper.push(text)
            paper.finish()

    def _print(self, answer: Answer) -> None:
        paper, meter = self._paper(), PrefillMeter(self.options)
        shown, kept = len(answer.text), time.monotonic()
        try:
            for chunk in self._interrupts.steps(answer):
                if chunk.prefilled is not None:
                    meter.show(chunk.prefilled)
                    continue
                meter.clear()
                paper.push(answer.text[shown:])
                shown = len(answer.text)
                if time.monotonic() - kept > KEEP_SECONDS:
                    with contextlib.suppress(MixlocalError):  # it will be said at the end, where it may be over
                        answer.keep()
                    kept = time.monotonic()
        finally:
            meter.clear()
            paper.push(answer.text[shown:])
            paper.finish()

    def _tell_end(self, chat: Chat, answer: Answer, interrupted: bool) -> None:
        if interrupted:
            say(self.options, _interrupted(answer))
        elif answer.finish == "length":
            full = chat.cache.length + 1 >= chat.cache.limit
            why = "the context is full" if full else f"max-tokens ({answer.params.max_tokens}) reached"
            say(self.options, f"{why}; /continue goes on")
        if self.stats and not interrupted and chat.stats is not None:
            say(self.options, summary(chat.stats, answer.params))

    def _renders(self) -> bool:
        return self.markdown and sys.stdout.isatty()

    def _paper(self) -> _Paper:
        if self._renders():
            from mixlocal.cli.markdown import MarkdownStream

            return MarkdownStream(console(self.options, sys.stdout))
        return _Plain(safe=sys.stdout.isatty())


def _interrupted(answer: Answer) -> str:
    if answer.count:
        return f"interrupted after {answer.count} tokens; /continue goes on"
    return "interrupted before the answer began; /continue begins it, /undo takes the message back"
