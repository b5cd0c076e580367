"""CommonMark's block structure, line by line, decided as early in each line as it can be.

What would reach back over text already shown is left out: underlined headings, reference definitions, a list's
looseness, tables that do not begin with "|". HTML is text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.style import Style

from mixlocal.cli.markdown.flow import Flow, Margin
from mixlocal.cli.markdown.leaves import Code, Heading, Leaf, Paragraph, Rule, TableRows
from mixlocal.cli.markdown.line import Line, OpenLineError
from mixlocal.cli.markdown.starts import (
    CODE_INDENT,
    LONGEST_HEADER,
    Fence,
    Marker,
    closes,
    fence,
    heading_level,
    is_rule,
    marker,
)
from mixlocal.cli.markdown.table import is_header

MOST_CONTAINERS = 12  # nested quotes and lists; deeper markers are text
TAB = 4
_QUOTE = Style(dim=True)
_MARKER = Style(bold=True)


@dataclass
class Container:
    """A block quote, or a list's item. offset: columns to an item's text; kind, number: see Marker."""

    margin: Margin
    kind: str = ">"
    offset: int = 0
    number: int = 0
    has_content: bool = True


@dataclass
class _Start:
    """What a line begins: containers, and the block within them. kind "": nothing, the line is blank from here on."""

    containers: list[Container] = field(default_factory=list)
    kind: str = "text"
    fence: Fence | None = None
    level: int = 0


class Blocks:
    """Takes text in any pieces, and gives each block's text to its leaf as it comes."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._containers: list[Container] = []
        self._leaf: Leaf | None = None
        self._fence: Fence | None = None  # that the open leaf waits for
        self._header: str | None = None  # a line that the next one may make a table's header
        self._line = ""
        self._column = 0
        self._sink: Leaf | None = None  # where the rest of the line goes, once that is known
        self._is_decided = False
        self._ended: tuple[int, Container] | None = None  # by a blank line, at this depth; its list may go on
        self._has_gap = False  # a blank line was read
        self._last_kind = ""

    def feed(self, text: str) -> None:
        lines = text.split("\n")
        for line in lines[:-1]:
            self._feed_part(line)
            self._end_line()
        self._feed_part(lines[-1])

    def finish(self) -> None:
        if self._line or self._sink:
            self._end_line()
        self._keep_header()
        self._close_containers(0)

    def _feed_part(self, part: str) -> None:
        if not part:
            return
        part = self._expand_tabs(part)
        if self._sink:
            self._sink.feed(part)
        elif not self._is_decided:
            self._line += part
            self._try_decide(is_complete=False)

    def _end_line(self) -> None:
        if not self._is_decided:
            self._try_decide(is_complete=True)
        if self._sink:
            self._sink.end_line()
        self._line, self._column, self._sink, self._is_decided = "", 0, None, False

    def _expand_tabs(self, part: str) -> str:
        if "\t" not in part:
            self._column += len(part)
            return part
        start = self._column % TAB
        expanded = (" " * start + part).expandtabs(TAB)[start:]
        self._column += len(expanded)
        return expanded

    def _try_decide(self, *, is_complete: bool) -> None:
        try:
            self._decide(Line(self._line, is_complete))
        except OpenLineError:
            return
        self._is_decided = True

    def _decide(self, line: Line) -> None:
        matched = self._match_containers(line)
        is_inside = matched == len(self._containers)
        if self._fence and is_inside:
            self._continue_code(line, self._fence)
        elif not line.peek(line.spaces()):
            self._end_blocks(matched)
        elif not (is_inside and self._continue_table(line)):
            self._keep_header()
            self._begin(line, matched)
            self._ended = None

    def _match_containers(self, line: Line) -> int:
        """How many of the open containers the line belongs to; the cursor goes behind their marks."""
        for index, container in enumerate(self._containers):
            indent = line.spaces()
            sign = line.peek(indent)
            if container.kind == ">":
                if sign != ">" or indent >= CODE_INDENT:
                    return index
                _pass_quote(line, indent)
            elif indent < container.offset if sign else not container.has_content:
                return index
            else:
                line.at += min(indent, container.offset)
        return len(self._containers)

    def _continue_code(self, line: Line, opened: Fence) -> None:
        if closes(line, opened):
            self._close_leaf()
            return
        line.at += min(line.spaces(), opened.indent)
        self._send(line)

    def _end_blocks(self, matched: int) -> None:
        """A blank line."""
        self._keep_header()
        if isinstance(self._leaf, Code) and matched == len(self._containers):
            self._leaf.blank()
        else:
            self._close_leaf()
            if matched < len(self._containers):
                self._ended = matched, self._containers[matched]
            self._close_containers(matched)
        self._has_gap = True

    def _continue_table(self, line: Line) -> bool:
        """Whether the line is a table's second or later one."""
        indent = line.spaces()
        sign = line.peek(indent)
        if isinstance(self._leaf, TableRows):
            if sign != "|" or indent >= CODE_INDENT:
                return False
            self._leaf.feed(line.rest() or "")
            return True
        if self._header is None or sign not in ("|", ":", "-") or indent >= CODE_INDENT:
            return False
        delimiters = line.rest(LONGEST_HEADER)
        if delimiters is None or not is_header(self._header, delimiters):
            return False
        self._close_leaf()
        self._open_leaf(TableRows(self._flow, self._header, delimiters), "table")
        self._header = None
        return True

    def _keep_header(self) -> None:
        """The line held back is no header, but text."""
        if self._header is not None:
            header, self._header = self._header, None
            if self._leaf is None:
                self._open_leaf(Paragraph(self._flow), "text")
            assert self._leaf is not None
            self._leaf.feed(header)
            self._leaf.end_line()

    def _begin(self, line: Line, matched: int) -> None:
        is_inside = matched == len(self._containers)
        is_text_open = isinstance(self._leaf, Paragraph)
        start = self._find_start(line, matched)
        if start.kind == "header":
            self._hold_header(line, matched, start)
            return
        if not start.containers and is_text_open and start.kind == "text":
            self._send(line)  # the paragraph goes on, even where a container's mark is missing
            return
        if not start.containers and is_inside and isinstance(self._leaf, Code) and start.kind == "code":
            self._has_gap = False
            self._send(line)
            return
        self._open(start, matched)
        if start.kind in ("text", "heading", "code"):
            self._send(line)

    def _hold_header(self, line: Line, matched: int, start: _Start) -> None:
        text = line.rest()
        is_inside = matched == len(self._containers) and not start.containers
        if not (is_inside and isinstance(self._leaf, Paragraph)):
            self._open_containers(start, matched)
        self._header = text

    def _find_start(self, line: Line, matched: int) -> _Start:
        """The containers and the block that begin at the cursor, which goes on to the block's text."""
        start = _Start()
        is_text_open = isinstance(self._leaf, Paragraph)
        while True:
            indent = line.spaces()
            interrupts = is_text_open and matched == len(self._containers) and not start.containers
            if not line.peek(indent):
                start.kind = ""
                return start
            if indent >= CODE_INDENT:
                is_code = start.containers or not is_text_open
                start.kind = "code" if is_code else "text"
                line.at += CODE_INDENT if is_code else indent
                return start
            line.at += indent
            if not self._find_container(line, indent, matched, start, interrupts=interrupts):
                is_lazy = is_text_open and not interrupts and not start.containers
                self._find_leaf(line, indent, start, is_lazy=is_lazy)
                return start

    def _find_container(self, line: Line, indent: int, matched: int, start: _Start, *, interrupts: bool) -> bool:
        if matched + len(start.containers) >= MOST_CONTAINERS or is_rule(line):
            return False
        if line.peek() == ">":
            _pass_quote(line, 0)
            start.containers.append(Container(Margin("│ ", "│ ", _QUOTE)))
            return True
        found = marker(line, indent)
        if not found or (interrupts and (found.is_empty or (found.kind in ".)" and found.number != 1))):
            return False
        line.at = min(len(line.text), line.at + found.offset - indent)
        start.containers.append(_item(found, None if start.containers else self._item_before(matched)))
        return True

    def _item_before(self, depth: int) -> Container | None:
        if depth < len(self._containers):
            return self._containers[depth]
        return self._ended[1] if self._ended and self._ended[0] == depth else None

    def _find_leaf(self, line: Line, indent: int, start: _Start, *, is_lazy: bool) -> None:
        start.level = heading_level(line)
        if start.level:
            start.kind = "heading"
            line.at += start.level
            line.at += line.spaces()
        elif is_rule(line):
            start.kind = "rule"
        elif found := fence(line, indent):
            start.kind, start.fence = "fence", found
        elif line.peek() == "|" and not is_lazy and line.rest(LONGEST_HEADER) is not None:
            start.kind = "header"

    def _open(self, start: _Start, matched: int) -> None:
        self._open_containers(start, matched)
        if start.kind == "heading":
            self._open_leaf(Heading(self._flow, start.level), "heading")
        elif start.kind == "rule":
            self._open_leaf(Rule(self._flow), "rule")
        elif start.fence:
            self._open_leaf(Code(self._flow, start.fence.language), "code")
            self._fence = start.fence
        elif start.kind == "code":
            self._open_leaf(Code(self._flow), "code")
        elif start.kind:
            self._open_leaf(Paragraph(self._flow), "text")

    def _open_containers(self, start: _Start, matched: int) -> None:
        self._close_leaf()
        self._close_containers(matched)
        self._containers += start.containers
        for container in self._containers if start.kind else self._containers[:-1]:
            container.has_content = True

    def _open_leaf(self, leaf: Leaf, kind: str) -> None:
        self._begin_block(kind)
        self._leaf = leaf

    def _begin_block(self, kind: str) -> None:
        """A blank line parts it from the block before where one was read, and around all but text."""
        is_parted = self._last_kind != "" and (self._has_gap or kind != "text" or self._last_kind != "text")
        self._flow.begin([container.margin for container in self._containers], blank=is_parted)
        self._last_kind = kind
        self._has_gap = False

    def _close_leaf(self) -> None:
        leaf, self._leaf, self._fence = self._leaf, None, None
        if leaf:
            leaf.close()

    def _close_containers(self, kept: int) -> None:
        """From the innermost on; an item without text shows its marker now."""
        self._close_leaf()
        while len(self._containers) > kept:
            margin = self._containers[-1].margin
            if not margin.shown and margin.first != margin.rest:
                self._begin_block("text")
                self._flow.mark()
            self._containers.pop()

    def _send(self, line: Line) -> None:
        """The rest of the line goes to the open leaf, as it comes."""
        assert self._leaf is not None
        self._sink = self._leaf
        if isinstance(self._leaf, Code) or line.at < len(line.text):
            self._sink.feed(line.text[line.at :])


def _pass_quote(line: Line, indent: int) -> None:
    line.at += indent + 1
    if line.peek() == " ":
        line.at += 1


def _item(found: Marker, sibling: Container | None) -> Container:
    number = sibling.number + 1 if sibling and sibling.kind == found.kind else found.number
    first = f"{number}{found.kind} ".rjust(4) if found.kind in ".)" else " • "
    return Container(Margin(first, " " * len(first), _MARKER), found.kind, found.offset, number, not found.is_empty)
