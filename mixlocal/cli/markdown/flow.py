"""Words to a terminal: wrapped greedily, indented by the open containers, appended and never redrawn."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, get_character_cell_size
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from mixlocal.cli.markdown.inert import revive
from mixlocal.cli.safe_text import SafeStream

NARROW = 10  # columns; where margins leave less for the text there are none
_PLAIN = Style()
_BLANKS_OR_WORD = re.compile(r"[ \t\n]+|[^ \t\n]+")
_NO_START = frozenset("ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ")  # of a line, like closing punctuation
_SKIN_TONES = range(0x1F3FB, 0x1F400)


@dataclass
class Margin:
    """What a container puts before its lines: `first` once, and `rest`, which is as wide, from then on."""

    first: str
    rest: str
    style: Style
    shown: bool = False


@dataclass
class _Cluster:
    """A character and what combines with it; a line never breaks within."""

    text: str
    style: Style
    cells: int

    def takes(self, character: str) -> bool:
        joins = self.text[-1] == "\u200d" or ord(character) in _SKIN_TONES
        return joins or not get_character_cell_size(character)

    def parts_from(self, character: str) -> bool:
        """Whether a line may break between this cluster and the next: around ideographs and emoji, no space needed."""
        if self.cells < 2 and get_character_cell_size(character) < 2:
            return False
        closes = character in _NO_START or unicodedata.category(character) in ("Pe", "Pf", "Po")
        return not closes and unicodedata.category(self.text[0]) not in ("Ps", "Pi")

    def add(self, character: str) -> None:
        self.text += character
        # The sum is the width on a terminal that does not join emoji; nowhere is a cluster wider.
        self.cells += get_character_cell_size(character) or (character == "\ufe0f" and self.cells == 1)


class Flow:
    """The one place that writes. Everything passes a second SafeStream here: Markdown's `&#x202e;` is text only now.

    A word is printed when it ends, and one that is wider than a whole line as it comes. What is printed depends on
    the characters and on the width alone, never on how they were cut into calls.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.has_colour = bool(console.color_system) and not console.no_color
        self._safe = SafeStream()
        self._out: list[tuple[str, Style]] = []
        self._margins: Sequence[Margin] = ()
        self._above: Sequence[Margin] = ()  # the margins of the last line
        self._blank = False  # a blank line is due before the next line
        self._width = self._line_width = max(1, console.width)
        self._open = False  # the cursor is within a line
        self._column = self._start = 0
        self._spaces: tuple[int, Style] = (0, _PLAIN)
        self._word: list[_Cluster] = []
        self._word_cells = 0
        self._is_folding = False

    def resize(self) -> None:
        """Read the terminal's size anew."""
        self._width = max(1, self._console.width)

    def begin(self, margins: Sequence[Margin], *, blank: bool) -> None:
        """A block begins, after a blank line or not."""
        self._margins = margins
        self._blank = self._blank or blank

    def text(self, text: str, style: Style) -> None:
        for match in _BLANKS_OR_WORD.finditer(self._safe.push(revive(text))):
            run = match[0]
            if run[0] in " \t\n":
                self._end_word()
                self._spaces = (min(self._spaces[0] + len(run), self._width), style)
            else:
                self._extend_word(run, style)

    def line_break(self) -> None:
        self._end_word()
        if self._open:
            self._new_line()

    def end(self) -> None:
        """The block is complete: the cursor is at the start of a line."""
        self.line_break()
        self._spaces = (0, _PLAIN)

    def room(self) -> int:
        """Columns a line of this block has for text."""
        indent = sum(cell_len(margin.rest) for margin in self._margins)
        return self._width if self._is_narrow(indent) else self._width - indent

    def row(self, fragments: Sequence[tuple[str, Style]]) -> None:
        """A line that was laid out for `room()` columns."""
        self.mark()
        self._open_line()
        self._write_stripped([(self._safe.push(revive(text)), style) for text, style in fragments])
        self._new_line()

    def raw(self, fragments: Sequence[tuple[str, Style]], *, ends: bool = True) -> None:
        """A line of code as it is, at the margin of the screen, so that it can be copied; the terminal wraps it."""
        if not self._open:
            self.mark()
            self._write_blank()
        for text, style in fragments:
            self._write(self._safe.push(revive(text)), style)
        self._open = True
        if ends:
            self._new_line()

    def mark(self) -> None:
        """Show the markers that wait for a first word on a line of their own."""
        if any(not margin.shown and margin.first.strip() for margin in self._margins):
            self._open_line(stripped=True)
            self._new_line()

    def flush(self) -> None:
        if not self._out:
            return
        if self.has_colour:
            segments = [Segment(text, style) for text, style in self._out]
        else:
            segments = [Segment("".join(text for text, _ in self._out))]
        self._out.clear()
        self._console.print(Segments(segments), end="", soft_wrap=True)

    def _extend_word(self, run: str, style: Style) -> None:
        for character in run:
            if self._word and self._word[-1].takes(character):
                before = self._word[-1].cells
                self._word[-1].add(character)
                self._word_cells += self._word[-1].cells - before
                continue
            if self._word and self._word[-1].parts_from(character):
                self._end_word()
            cluster = _Cluster(character, style, get_character_cell_size(character))
            self._word.append(cluster)
            self._word_cells += cluster.cells
            if self._is_folding or self._word_cells > self._width:
                self._fold()

    def _fold(self) -> None:
        """The word is wider than a line: print what is there, but for the last cluster, which may still grow."""
        if not self._is_folding:
            self._start_word(self._word_cells)
            self._is_folding = True
        for cluster in self._word[:-1]:
            self._put(cluster)
        del self._word[:-1]

    def _end_word(self) -> None:
        if self._word:
            if not self._is_folding:
                self._start_word(self._word_cells)
            for cluster in self._joined_word():
                self._put(cluster)
        self._word.clear()
        self._word_cells = 0
        self._is_folding = False

    def _joined_word(self) -> list[_Cluster]:
        """In as few parts as it has styles, if it stays on one line."""
        if self._column + self._word_cells > self._width:
            return self._word
        joined: list[_Cluster] = []
        for cluster in self._word:
            if joined and joined[-1].style == cluster.style:
                joined[-1].text += cluster.text
                joined[-1].cells += cluster.cells
            else:
                joined.append(cluster)
        return joined

    def _start_word(self, cells: int) -> None:
        """Go where a word of so many cells begins: after the spaces, or on a new line."""
        self._leave_resized_line()
        if not self._open:
            self._open_line()
        spaces, style = self._spaces
        if self._column > self._start and self._column + spaces + cells > self._width:
            self._new_line()
            self._open_line()
        elif self._column > self._start:
            self._write(" " * spaces, style)
            self._column += spaces
        self._spaces = (0, _PLAIN)

    def _put(self, cluster: _Cluster) -> None:
        self._leave_resized_line()
        if not self._open or (self._column + cluster.cells > self._width and self._column > self._start):
            if self._open:
                self._new_line()
            self._open_line()
        self._write(cluster.text, cluster.style)
        self._column += cluster.cells

    def _leave_resized_line(self) -> None:
        if self._open and self._line_width != self._width:
            self._new_line()

    def _open_line(self, *, stripped: bool = False) -> None:
        self._write_blank()
        leads = [(margin.rest if margin.shown else margin.first, margin.style) for margin in self._margins]
        due = [margin for margin in self._margins if not margin.shown and margin.first != margin.rest]
        for margin in self._margins:
            margin.shown = True
        self._open, self._line_width = True, self._width
        self._column = self._start = 0
        indent = sum(cell_len(text) for text, _ in leads)
        if self._is_narrow(indent):
            self._write_markers(due, stripped=stripped)
        elif stripped:
            self._write_stripped(leads)
        else:
            for text, style in leads:
                self._write(text, style)
            self._column = self._start = indent

    def _write_markers(self, due: Sequence[Margin], *, stripped: bool) -> None:
        """Where there is no room for margins, markers are words."""
        for index, margin in enumerate(due):
            if index and self._column < self._width:
                self._write(" ", margin.style)
                self._column += 1
            for character in margin.first.strip():
                self._put(_Cluster(character, margin.style, 1))
        if due and not stripped:
            self._spaces = (1, _PLAIN)

    def _is_narrow(self, indent: int) -> bool:
        return self._width - indent < min(NARROW, self._width)

    def _write_blank(self) -> None:
        if self._blank:
            above = {id(margin) for margin in self._above}
            common = [margin for margin in self._margins if id(margin) in above]
            if not self._is_narrow(sum(cell_len(margin.rest) for margin in common)):
                self._write_stripped([(margin.rest, margin.style) for margin in common])
            self._write("\n", _PLAIN)
        self._blank = False
        self._above = self._margins

    def _write_stripped(self, fragments: Sequence[tuple[str, Style]]) -> None:
        """Without the spaces at the end of the line."""
        kept = list(fragments)
        while kept and not kept[-1][0].strip(" "):
            kept.pop()
        for text, style in kept[:-1]:
            self._write(text, style)
        if kept:
            self._write(kept[-1][0].rstrip(" "), kept[-1][1])

    def _new_line(self) -> None:
        self._write("\n", _PLAIN)
        self._open = False
        self._column = self._start = 0

    def _write(self, text: str, style: Style) -> None:
        if text:
            self._out.append((text, style))
