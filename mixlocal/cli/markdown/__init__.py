"""Markdown to a terminal as a model writes it: append-only, never redrawn.

text -> SafeStream -> blocks (lines) -> leaves -> inline (emphasis, links) -> flow (words, wrapped) -> terminal
"""

from __future__ import annotations

from rich.console import Console

from mixlocal.cli.markdown.blocks import Blocks
from mixlocal.cli.markdown.flow import Flow
from mixlocal.cli.markdown.inert import show_inert
from mixlocal.cli.safe_text import SafeStream


class MarkdownStream:
    """Prints Markdown that arrives in pieces: append-only, never redrawn.

    Text is printed word by word, code line by line, a table when it is complete. What is printed depends on the text
    and on the console's width, not on the pieces: nothing is decided before what decides it has arrived. A new width
    is obeyed from the next word on, on a new line.
    """

    def __init__(self, console: Console) -> None:
        self._safe = SafeStream(show=show_inert)
        self._flow = Flow(console)
        self._blocks = Blocks(self._flow)

    def push(self, piece: str) -> None:
        """More of the model's text, as it came."""
        self._flow.resize()
        self._blocks.feed(self._safe.push(piece))
        self._flow.flush()

    def finish(self) -> None:
        """Print what was held back; the cursor is at the start of a line."""
        self._flow.resize()
        self._blocks.finish()
        self._flow.flush()


def render_markdown(console: Console, text: str) -> None:
    """A whole text, to the screen that a stream of it leaves."""
    stream = MarkdownStream(console)
    stream.push(text)
    stream.finish()
