"""What markdown-it found within a line, in styles."""

from __future__ import annotations

from typing import Protocol

from markdown_it.token import Token
from rich.style import Style

CODE = Style(color="cyan")
LINK = Style(color="blue", underline=True)
ADDRESS = Style(color="blue")
_STYLES = {"em": Style(italic=True), "strong": Style(bold=True), "s": Style(strike=True), "a": LINK}


class Sink(Protocol):
    """Where text goes; a break ends its line."""

    def text(self, text: str, style: Style) -> None: ...
    def line_break(self) -> None: ...


def show_tokens(sink: Sink, tokens: list[Token], style: Style) -> None:
    """An address is told after its text unless it is the text: a model chose both, so both are seen."""
    styles = [style]
    address, shown = "", ""
    for token in tokens:
        if token.type == "hardbreak":
            sink.line_break()
        elif token.type == "image":
            sink.text(token.content, styles[-1] + LINK)
            _show_address(sink, str(token.attrs.get("src", "")), token.content, styles[-1])
        elif token.nesting > 0:
            styles.append(styles[-1] + _STYLES[token.tag])
            if token.type == "link_open":
                address, shown = str(token.attrs.get("href", "")), ""
        elif token.nesting < 0:
            styles.pop()
            if token.type == "link_close":
                _show_address(sink, address, shown, styles[-1])
        else:
            content = " " if token.type == "softbreak" else token.content
            shown += content
            sink.text(content, styles[-1] + CODE if token.type == "code_inline" else styles[-1])


def _show_address(sink: Sink, address: str, shown: str, style: Style) -> None:
    if address and shown not in (address, address.removeprefix("mailto:")):
        sink.text((" " if shown else "") + f"({address})", style + ADDRESS)
