"""The text of a paragraph as it arrives: held back only from a delimiter on, until it closes or clearly does not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.common.utils import isMdAsciiPunct
from markdown_it.token import Token
from rich.style import Style

from mixlocal.cli.markdown.delimiters import Emphasis, Run, stand_in
from mixlocal.cli.markdown.spans import CODE, Sink, show_tokens

HOLD = 120  # characters a delimiter waits for its partner; then it is text
LINK_HOLD = 400  # the same of a link, once its text is followed by an address
LINK_TRIES = 4  # parentheses that may end an address, tried in turn
_PLAIN = re.compile(r"[^\\`*_~\[!<& \n]+")
_TICKS = re.compile(rf"`{{1,{HOLD}}}")
_AUTOLINK = re.compile(r"<[A-Za-z][^ \n<>]*")
_ENTITY = re.compile(r"&(?:#[xX]?[0-9a-fA-F]{0,7}|[A-Za-z][A-Za-z0-9]{0,31})?;?")
_BRACKETS = re.compile(r"\\.?|`+|[\[\]]", re.DOTALL)
_CLOSERS = {sign: re.compile(rf"\\.?|`+|{re.escape(sign)}+", re.DOTALL) for sign in "*_~"}
_RUNS = {sign: re.compile(rf"{re.escape(sign)}{{1,4}}") for sign in "*_~"}
_parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 200}).enable("strikethrough")


class _OpenError(Exception):
    """What follows decides, and it has not arrived."""


@dataclass(frozen=True)
class _Found:
    """A construct that is complete: where it ends, and its tokens."""

    end: int
    tokens: list[Token]


class Inline:
    """Shows text with emphasis, code and links; delimiters are matched here, what lies between by markdown-it.

    Every decision looks at a bounded number of characters and waits until they are there, so it does not depend on
    how the text was cut into pieces. Reference links and HTML are text.
    """

    def __init__(self, sink: Sink, style: Style) -> None:
        self._sink = sink
        self._style = style
        self._text = ""
        self._before = ""  # the character before the one looked at
        self._spaces = 0  # before it
        self._offset = 0  # characters before _text
        self._retry = -1  # where a run goes on that did not close as a whole
        self._is_complete = False

    def feed(self, text: str) -> None:
        self._text += text
        self._advance()

    def finish(self) -> None:
        self._is_complete = True
        self._advance()

    def _advance(self) -> None:
        at = 0
        try:
            while at < len(self._text):
                end = self._step(at)
                if self._text[at] != " ":
                    self._spaces = 0
                is_escape = self._text[at] == "\\" and end == at + 2
                self._before = "." if is_escape else self._text[end - 1]  # an escaped sign belongs to no run
                at = end
        except _OpenError:
            pass
        self._text = self._text[at:]
        self._offset += at

    def _step(self, at: int) -> int:
        """Show what begins at `at`; where it ends."""
        sign = self._text[at]
        if sign in " \n":
            return self._blank(at)
        if sign == "\\":
            return self._escape(at)
        if sign == "`":
            return self._code(at)
        if sign in _RUNS:
            return self._emphasis(at)
        found: _Found | None = None
        if sign in "[!":
            found = self._find_link(at)
        elif sign == "<":
            found = self._find_autolink(at)
        elif sign == "&":
            found = self._find_entity(at)
        elif plain := _PLAIN.match(self._text, at):
            return self._literal(at, plain.end())
        if found is None:
            return self._literal(at, at + 1)
        self._show(found.tokens)
        return found.end

    def _literal(self, at: int, end: int) -> int:
        self._sink.text(self._text[at:end], self._style)
        return end

    def _blank(self, at: int) -> int:
        """A newline is a space, or ends the line after two spaces; spaces before the end of a line are not seen."""
        if self._text[at] == " ":
            self._spaces += 1
            return self._literal(at, at + 1)
        if self._spaces >= 2:
            self._sink.line_break()
        elif not self._spaces:
            self._sink.text(" ", self._style)
        return at + 1

    def _escape(self, at: int) -> int:
        following = self._peek(at + 1)
        if following == "\n":
            self._sink.line_break()
            return at + 2
        if following and isMdAsciiPunct(ord(following)):
            self._literal(at + 1, at + 2)
            return at + 2
        return self._literal(at, at + 1)

    def _code(self, at: int) -> int:
        run = _match(_TICKS, self._text, at)
        end = self._code_end(run, at + HOLD)
        if end is None:
            return self._literal(at, run.end())
        code = self._text[run.end() : end - len(run[0])].replace("\n", " ")
        if code.startswith(" ") and code.endswith(" ") and code.strip(" "):
            code = code[1:-1]
        self._sink.text(code, self._style + CODE)
        return end

    def _code_end(self, run: re.Match[str], limit: int) -> int | None:
        """Where the code span ends that these backticks open; None where they open none before `limit`."""
        if run.end() == len(self._text):
            self._wait()
        ticks = re.compile(rf"(?<!`){run[0]}(?!`)").search(self._text, run.end(), limit + 1)
        if ticks and ticks.end() <= limit:
            self._peek(ticks.end())
            return ticks.end()
        self._wait_until(limit)
        return None

    def _emphasis(self, at: int) -> int:
        sign = self._text[at]
        run = _match(_RUNS[sign], self._text, at)
        after = self._peek(run.end()) if len(run[0]) < 4 else sign
        is_rest = self._before == sign and self._offset + at != self._retry
        first = Run.between(self._before, sign, len(run[0]), after)
        if after == sign or is_rest or (sign == "~" and len(run[0]) != 2) or not first.opens:
            return self._literal(at, run.end())
        for end in self._ends(first, at):
            if tokens := self._parse(at, end, ("em_open", "strong_open", "s_open")):
                self._show(tokens)
                self._retry = self._offset + end  # of "**a***b*" the last of three signs opens
                return end
        self._retry = self._offset + at + 1  # of "**a*" the second sign opens
        return self._literal(at, run.end() if sign == "~" else at + 1)

    def _ends(self, first: Run, start: int) -> Iterator[int]:
        """Where the emphasis that begins at `start` may end, in turn; code within is passed over."""
        emphasis = Emphasis(first)
        at, limit = start + first.length, start + HOLD
        while match := _CLOSERS[first.sign].search(self._text, at, limit + 1):
            at = match.end()
            if match[0][0] != first.sign:
                at = self._pass_over(match, limit)
            elif at <= limit:
                run = Run.between(self._text[match.start() - 1], first.sign, len(match[0]), self._peek(at))
                if emphasis.is_closed_by(run):
                    yield at - run.left
        self._wait_until(limit)

    def _pass_over(self, match: re.Match[str], limit: int) -> int:
        """Past a code span or an escaped character."""
        if match[0][0] == "`":
            return self._code_end(match, limit) or match.end()
        self._peek(match.end())
        return match.end()

    def _find_link(self, at: int) -> _Found | None:
        bracket = at + (self._text[at] == "!")
        if self._peek(bracket) != "[":
            return None
        text_end = self._bracket_end(bracket, at + HOLD)
        if text_end is None or self._peek(text_end) != "(":
            return None
        limit = at + LINK_HOLD
        end = text_end
        for _ in range(LINK_TRIES):
            end = self._text.find(")", end, limit) + 1
            if not end:
                self._wait_until(limit)
                return None
            if tokens := self._parse(at, end, ("link_open", "image")):
                return _Found(end, tokens)
        return None

    def _bracket_end(self, at: int, limit: int) -> int | None:
        depth = 0
        while match := _BRACKETS.search(self._text, at, limit + 1):
            at = match.end()
            if match[0] in ("[", "]"):
                depth += 1 if match[0] == "[" else -1
                if not depth:
                    return at if at <= limit else None
            else:
                at = self._pass_over(match, limit)
        self._wait_until(limit)
        return None

    def _find_autolink(self, at: int) -> _Found | None:
        if not self._peek(at + 1).isalpha():
            return None
        match = _AUTOLINK.match(self._text, at)
        if match is None or match.end() - at > HOLD or self._peek(match.end()) != ">":
            return None
        tokens = self._parse(at, match.end() + 1, ("link_open",))
        return _Found(match.end() + 1, tokens) if tokens else None

    def _find_entity(self, at: int) -> _Found | None:
        match = _match(_ENTITY, self._text, at)
        if match[0][-1] == ";":
            return _Found(match.end(), _parser.parseInline(match[0])[0].children or [])
        self._peek(match.end())
        return None

    def _parse(self, at: int, end: int, kinds: tuple[str, ...]) -> list[Token]:
        """The tokens of one construct that ends at `end`; none if that is not where it ends.

        Its neighbours decide whether a delimiter opens or closes, so stand-ins for them are parsed too.
        """
        before, after = stand_in(self._before), stand_in(self._peek(end))
        tokens = _parser.parseInline(before + self._text[at:end] + after)[0].children or []
        tokens = [token for token in tokens if token.type != "text" or token.content]
        if tokens[0].content != before or len(tokens) < 3 or tokens[1].type not in kinds:
            return []
        tokens[-1].content = tokens[-1].content[:-1]
        return tokens[1:]

    def _show(self, tokens: list[Token]) -> None:
        show_tokens(self._sink, tokens, self._style)

    def _peek(self, at: int) -> str:
        """The character there; "" behind the last one."""
        if at < len(self._text):
            return self._text[at]
        self._wait()
        return ""

    def _wait(self) -> None:
        if not self._is_complete:
            raise _OpenError

    def _wait_until(self, limit: int) -> None:
        """Nothing was found before `limit`: text that is still to come may change that."""
        if len(self._text) <= limit:
            self._wait()


def _match(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    match = pattern.match(text, at)
    assert match is not None
    return match
