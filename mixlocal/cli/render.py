"""stdout = what was asked for; stderr = talk.  Nothing from outside reaches a terminal as a control sequence."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

    from mixlocal.app.progress import Progress
    from mixlocal.cli.options import Globals

Result = TypeVar("Result")
PLAIN_PROGRESS_SECONDS = 10.0
UNWRAPPED_WIDTH = 1000
WHAT_WIDTH = 20
_KEPT = {"\n", "\t", "\u200d"}  # the joiner holds emoji together
_STAGES = {"download": "downloading", "build": "building", "quantize": "quantizing", "verify": "verifying"}


def safe_text(text: str) -> str:
    """`text` with every control, bidirectional and invisible format character made visible."""
    return "".join(
        c if c in _KEPT or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else _visible(c) for c in text
    )


def _visible(character: str) -> str:
    code = ord(character)
    return f"^{chr(code ^ 64)}" if code < 32 or code == 127 else f"<U+{code:04X}>"


def console(options: Globals, stream: TextIO) -> Console:
    """A rich console for one of the two streams; NO_COLOR, FORCE_COLOR and TERM=dumb are honoured by rich."""
    from rich.console import Console

    forced = {"always": True, "never": None, "auto": None}[options.color]
    return Console(
        file=stream, force_terminal=forced, no_color=True if options.color == "never" else None, highlight=False
    )


def print_table(options: Globals, table: Table) -> None:
    """A table on stdout; off a terminal no line is wrapped, and nowhere do spaces end a line."""
    out = console(options, sys.stdout)
    if not sys.stdout.isatty():
        out.width = UNWRAPPED_WIDTH
    with out.capture() as capture:
        out.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def say(options: Globals, text: str) -> None:
    """One line of talk, unless --quiet."""
    if not options.quiet:
        print(safe_text(text), file=sys.stderr, flush=True)


def warn(options: Globals, text: str) -> None:
    say(options, f"warning: {text}")


def print_error(message: str, hint: str, *, as_json: bool, code: str = "unexpected", exit_code: int = 1) -> None:
    """One line, and one more with what to do."""
    if as_json:
        error = {"code": code, "message": message, "hint": hint, "exit": exit_code}
        print(json.dumps({"error": error}), file=sys.stderr)
        return
    print(f"mixlocal: {safe_text(' '.join(message.split()))}", file=sys.stderr)
    if hint:
        print(f"  {safe_text(hint)}", file=sys.stderr)


def print_json(value: object) -> None:
    print(json.dumps(value))


def size(nbytes: float) -> str:
    """Decimal units, three digits: "340 MB", "1.37 GB"."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= divisor:
            number = nbytes / divisor
            return f"{number:.{0 if number >= 100 else 1 if number >= 10 else 2}f} {unit}"
    return f"{nbytes:.0f} B"


def count(number: float) -> str:
    """Billions or millions, as papers write them: "46.7 B", "135 M"."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"


def show_progress(options: Globals, work: Generator[Progress, None, Result]) -> Result:
    """Run long work to its end and return its result; a bar on a terminal, a line every 10 s elsewhere."""
    if options.quiet:
        return _consume(work, lambda _: None)
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return _consume(work, _PlainLines().show)
    with _bars(options) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: Progress) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(_STAGES[step.stage], total=step.total, what="")
            bars.update(tasks[step.stage], completed=step.done, total=step.total, what=safe_text(step.what))

        return _consume(work, show)


def _consume(work: Generator[Progress, None, Result], show: Callable[[Progress], None]) -> Result:
    while True:
        try:
            step = next(work)
        except StopIteration as end:
            result: Result = end.value
            return result
        show(step)


class _PlainLines:
    """One line when a stage begins and every 10 s of it."""

    def __init__(self) -> None:
        self._stage, self._said = "", 0.0

    def show(self, step: Progress) -> None:
        now = time.monotonic()
        if step.stage == self._stage and now - self._said < PLAIN_PROGRESS_SECONDS:
            return
        share = 100 * step.done // max(step.total, 1)
        print(f"{_STAGES[step.stage]} {share}% of {size(step.total)}", file=sys.stderr, flush=True)
        self._stage, self._said = step.stage, now


def _bars(options: Globals) -> Bars:
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    what = Column(no_wrap=True, max_width=WHAT_WIDTH, overflow="ellipsis")
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", table_column=what),
    )  # fmt: skip
    return Bars(*columns, console=console(options, sys.stderr))
