"""Signs that Markdown cannot see: the "^[" that stands for an escape character never opens a link.

Private-use characters stand in for them while Markdown is parsed; none can come from a model, SafeStream shows those.
"""

from __future__ import annotations

import string

from mixlocal.cli.safe_text import visible

_FIRST = 0xE000
_HIDE = {ord(sign): chr(_FIRST + ord(sign)) for sign in string.punctuation}
_REVIVE = {_FIRST + ord(sign): sign for sign in string.punctuation}


def show_inert(character: str) -> str:
    """An unsafe character made visible, in signs without a meaning to Markdown."""
    return visible(character).translate(_HIDE)


def revive(text: str) -> str:
    return text if text.isascii() else text.translate(_REVIVE)
