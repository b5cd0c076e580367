"""Which rows of a batch have answers, and where these lie in its journal. Three numbers a row are held in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Literal

from mixlocal.app.batch.source import Survey
from mixlocal.store.batch_journal import BatchJournal, Place

Order = Literal["input", "done"]
LEFT, FAILED, GOOD = range(3)  # what is known of a row


class Ledger:
    """done, failed: how many rows; failed ones are done too. strays: answers in the journal that are of no row."""

    def __init__(self, journal: BatchJournal, survey: Survey) -> None:
        self._journal, self._keys, self._bad = journal, survey.keys, survey.bad
        self.total = len(survey.keys)
        self.done = self.failed = self.strays = 0
        self._known = bytearray(self.total)
        self._offsets, self._sizes = (array("q", bytes(8 * self.total)) for _ in range(2))
        for place in journal.places():
            self._take_over(place)

    @property
    def left(self) -> int:
        return self.total - self.done

    def is_left(self, row: int) -> bool:
        return self._known[row] == LEFT

    def keep(self, key: bytes, *, good: bool, body: bytes) -> None:
        """A row has its answer, or its failure."""
        self._record(self._keys[key], self._journal.append(key, good, body))

    def retry(self) -> None:
        """Rows that failed are left again, but for those that nobody can ask."""
        for row in range(self.total):
            if self._known[row] == FAILED and row not in self._bad:
                self._set(row, LEFT)

    def lines(self, order: Order) -> Iterator[bytes]:
        """Of all rows; each must be done."""
        rows = range(self.total)
        for row in rows if order == "input" else sorted(rows, key=self._offsets.__getitem__):
            yield self._journal.read(self._offsets[row], self._sizes[row])

    def _take_over(self, place: Place) -> None:
        """Of several lines of one row the last counts, but an answer is final."""
        row = self._keys.get(place.key)
        if row is None:
            self.strays += 1
        elif self._known[row] != GOOD:
            self._record(row, place)

    def _record(self, row: int, place: Place) -> None:
        self._offsets[row], self._sizes[row] = place.offset, place.nbytes
        self._set(row, GOOD if place.good else FAILED)

    def _set(self, row: int, known: int) -> None:
        before, self._known[row] = self._known[row], known
        self.done += (known != LEFT) - (before != LEFT)
        self.failed += (known == FAILED) - (before == FAILED)
