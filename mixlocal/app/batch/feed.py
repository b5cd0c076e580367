"""The rows that an engine is still to answer, read from the input as it has room for them."""

from __future__ import annotations

from collections.abc import Iterator

from mixlocal.app.batch.engine import Request
from mixlocal.app.batch.ledger import Ledger
from mixlocal.app.batch.row import Row, request
from mixlocal.app.batch.source import Source, Survey
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import MixlocalError, RefusedError


class Feed:
    """trouble: what went wrong with the input while an engine read it; the engine only sees it end."""

    def __init__(self, source: Source, survey: Survey, ledger: Ledger) -> None:
        self._source, self._survey, self._ledger = source, survey, ledger
        self._in_flight: dict[str, tuple[bytes, Request]] = {}
        self.stopped = False
        self.trouble: MixlocalError | None = None

    @property
    def running(self) -> int:
        """Requests in flight."""
        return len(self._in_flight)

    def stop(self) -> None:
        """Give out no more. May be called at any time, by a signal's handler too."""
        self.stopped = True

    def requests(self, defaults: SamplingParams, seed: int) -> Iterator[Request]:
        """One for each row that is left. Runs in whatever thread the engine likes."""
        try:
            for row in self._rows_left():
                asked = request(row, defaults, seed)
                self._in_flight[asked.id] = row.key, asked
                yield asked
        except MixlocalError as error:
            self.trouble = error

    def take(self, name: str) -> tuple[bytes, Request]:
        """(key of its row, what was asked) of one that has its reply."""
        assert name in self._in_flight, f"a second reply, or one that nobody asked for: {name}"
        return self._in_flight.pop(name)

    def bad_rows(self) -> Iterator[Row]:
        """Those that nobody can ask, and that are left."""
        if any(map(self._ledger.is_left, self._survey.bad)):
            yield from (row for row in self._rows_left() if row.error is not None)

    def _rows_left(self) -> Iterator[Row]:
        """Raises `RefusedError` if the rows are not what they were when the input was looked at."""
        count = 0
        for place, row in enumerate(self._source.rows()):
            if self.stopped:
                return
            if self._survey.keys.get(row.key) != place:
                raise self._changed()
            if self._ledger.is_left(place):
                yield row
            count += 1
        if count != self._ledger.total:
            raise self._changed()

    def _changed(self) -> RefusedError:
        return RefusedError(f"{self._source.name} was changed while it was read", "run the same command again")
