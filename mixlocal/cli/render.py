"""stdout = what was asked for; stderr = talk.  Nothing from outside reaches a terminal as a control sequence."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, TextIO, TypeVar

from mixlocal.cli.safe_text import safe_text as safe_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.table import Table

    from mixlocal.app.progress import Progress, Step
    from mixlocal.cli.options import Globals

Result = TypeVar("Result")
PLAIN_PROGRESS_SECONDS = 10.0
UNWRAPPED_WIDTH = 1000
WHAT_WIDTH = 20
_STAGES = {
    "download": "downloading", "build": "building", "quantize": "quantizing", "verify": "verifying",
    "measure": "measuring this machine", "calibrate": "calibrating",
}  # fmt: skip


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


def pace(tokens_per_s: float) -> str:
    """ "12.3 tokens/s", or of a slow one the time of each."""
    if tokens_per_s < 1:
        return f"a token every {1 / tokens_per_s:.1f} s"
    return f"{tokens_per_s:.{1 if tokens_per_s < 20 else 0}f} tokens/s"


def show_progress(options: Globals, work: Generator[Step, None, Result], *, events: bool = False) -> Result:
    """Run long work to its end and return its result; a bar on a terminal, a line every 10 s elsewhere.

    events: with --json, tell on stdout too how it goes, an object a line.
    """
    shows: list[Callable[[Step], None]] = [_JsonLines().show] if events and options.as_json else []
    if options.quiet:
        return _consume(work, shows)
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return _consume(work, [*shows, _PlainLines().show])
    with _bars(options) as bars:
        return _consume(work, [*shows, _Bars(bars).show])


def _consume(work: Generator[Step, None, Result], shows: list[Callable[[Step], None]]) -> Result:
    try:
        while True:
            step = next(work)
            for show in shows:
                show(step)
    except StopIteration as end:
        result: Result = end.value
        return result
    finally:
        work.close()  # an interrupt may have struck between two steps


class _Bars:
    """A bar for each stage, and one for each file that is on its way."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def show(self, step: Step) -> None:
        from mixlocal.app.progress import FileProgress, Notice

        if isinstance(step, Notice):
            self._bars.console.print(safe_text(step.text), markup=False)
        elif isinstance(step, FileProgress):
            self._update(step.name, "  file", step.done, step.total, step.name.removesuffix(".safetensors"))
            if step.done == step.total:
                self._bars.remove_task(self._tasks.pop(step.name))
        elif step.total <= 1:  # nothing to count
            self._bars.console.print(_STAGES[step.stage])
        else:
            self._update(step.stage, _STAGES[step.stage], step.done, step.total, step.what)

    def _update(self, key: str, label: str, done: int, total: int, what: str) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(label, total=total, what="")
        self._bars.update(self._tasks[key], completed=done, total=total, what=safe_text(what))


class _PlainLines:
    """One line when a stage begins and every 10 s of it, and what happens meanwhile."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def show(self, step: Step) -> None:
        from mixlocal.app.progress import FileProgress, Notice

        if isinstance(step, Notice):
            print(safe_text(step.text), file=sys.stderr, flush=True)
        elif not isinstance(step, FileProgress):
            self._show_stage(step)

    def _show_stage(self, step: Progress) -> None:
        now = time.monotonic()
        if now - self._said.get(step.stage, -PLAIN_PROGRESS_SECONDS) < PLAIN_PROGRESS_SECONDS:
            return
        share = f" {100 * step.done // step.total}% of {size(step.total)}" if step.total > 1 else ""
        print(f"{_STAGES[step.stage]}{share}", file=sys.stderr, flush=True)
        self._said[step.stage] = now


class _JsonLines:
    """An object a line: each stage once a second, and what happens meanwhile."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[float, Progress]] = {}

    def show(self, step: Step) -> None:
        from mixlocal.app.progress import FileProgress, Notice

        if isinstance(step, Notice):
            print_json({"event": "notice", "text": step.text})
        elif not isinstance(step, FileProgress) and self._is_news(step):
            print_json({"event": "progress", "stage": step.stage, "done": step.done, "total": step.total})
            sys.stdout.flush()
            self._said[step.stage] = time.monotonic(), step

    def _is_news(self, step: Progress) -> bool:
        last = self._said.get(step.stage)
        if last is None:
            return True
        return last[1] != step and (step.done == step.total or time.monotonic() - last[0] >= 1)


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
