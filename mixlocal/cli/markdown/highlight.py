"""Code in colour, a line at a time: a line's colours depend on the lines before it only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.style import Style
from rich.syntax import Syntax

CONTEXT = 800  # characters that are parsed again for each line, at most; then half of them are forgotten
# Outside of strings and comments a line of these needs no context. Of others, CSS for one, it does.
_LINE_LANGUAGES = frozenset({
    "Bash", "C", "C#", "C++", "Go", "Java", "JavaScript", "JSON", "Julia", "Kotlin", "Lua", "Perl", "PowerShell",
    "Python", "Ruby", "Rust", "S", "SQL", "Swift", "TypeScript",
})  # fmt: skip
_PLAIN = Style()
_NAME = re.compile(r"[A-Za-z0-9_+#.-]{1,32}")
_theme = Syntax.get_theme("ansi_dark")


class Highlighter:
    """language: as a fence names it; an unknown one, like none, gives plain text"""

    def __init__(self, language: str) -> None:
        self._lexer = Syntax("", language.lower()).lexer if _NAME.fullmatch(language) else None
        self._context = ""
        self._is_between_statements = False

    def line(self, line: str) -> Sequence[tuple[str, Style]]:
        if self._lexer is None:
            return [(line, _PLAIN)]
        if len(self._context) + len(line) > CONTEXT:
            kept = self._context[-CONTEXT // 2 :]
            self._context = kept[kept.find("\n") + 1 :]
        start = len(self._context)
        self._context += line + "\n"
        fragments = self._fragments(start)
        if self._is_between_statements:
            self._context = ""
        is_whole = "".join(text for text, _ in fragments) == line
        return fragments if is_whole else [(line, _PLAIN)]

    def _fragments(self, start: int) -> Sequence[tuple[str, Style]]:
        """The context from `start` on."""
        assert self._lexer is not None
        fragments, at, kind = [], 0, ()
        for kind, text in self._lexer.get_tokens(self._context):
            at += len(text)
            if at > start and (part := text[-(at - start) :].rstrip("\n")):
                fragments.append((part, _theme.get_style_for_token(kind)))
        in_text = "String" in kind or ("Comment" in kind and "Single" not in kind)
        self._is_between_statements = self._lexer.name in _LINE_LANGUAGES and not in_text
        return fragments
