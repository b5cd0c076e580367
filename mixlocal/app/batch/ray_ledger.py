"""Where the requests of a batch are while workers come and go. Bookkeeping only: nothing here knows Ray.

A worker that dies takes down what it had at hand, and one of these may have been the reason. They go to other workers.
What was at hand at two deaths is suspected: it waits until nothing else does and is then asked alone, so that nothing
innocent shares its fate. What a third worker dies of that had only it is given up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from mixlocal.app.batch.engine import Request

SUSPECT_AFTER = 2  # deaths of workers that had a request, perhaps among others
GIVE_UP_AFTER = 3  # deaths of workers that had nothing else


@dataclass(slots=True)
class Row:
    """A request on its way. holders: the workers that have it. since: when the last of them got it."""

    request: Request
    deaths: int = 0
    lone_deaths: int = 0
    holders: set[int] = field(default_factory=set)
    since: float = 0.0

    @property
    def suspected(self) -> bool:
        return self.deaths >= SUSPECT_AFTER


class Ledger:
    """Requests that wait, and those that workers have. Workers are numbers; a new one never has an old one's."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self._fresh = requests
        self._ended = False
        self._again: deque[Row] = deque()
        self._suspects: deque[Row] = deque()
        self._held: dict[int, dict[str, Row]] = {}

    @property
    def running(self) -> int:
        """Requests that a worker has."""
        return len({id for rows in self._held.values() for id in rows})

    @property
    def waiting(self) -> bool:
        """Whether there is, or may be, something to give to a worker."""
        return bool(self._again or self._suspects) or not self._ended

    @property
    def finished(self) -> bool:
        return not self.waiting and not any(self._held.values())

    def take(self, worker: int, now: float, *, idle: bool) -> Request | None:
        """What a worker with room is to do next; None if there is nothing for it now. idle: it has nothing at all."""
        if any(row.suspected for row in self._held.get(worker, {}).values()):
            return None
        row = self._next()
        if row is None and idle and self._suspects:
            row = self._suspects.popleft()
        return None if row is None else self._give(row, worker, now)

    def take_copy(self, worker: int, now: float, patience: float) -> Request | None:
        """For an idle worker with nothing else to do: what another has had for `patience` seconds, as it may hang."""
        rows = (row for rows in self._held.values() for row in rows.values())
        late = [row for row in rows if len(row.holders) == 1 and not row.deaths and now - row.since >= patience]
        oldest = min(late, key=lambda row: row.since, default=None)
        return None if oldest is None else self._give(oldest, worker, now)

    def answered(self, worker: int, id: str) -> bool:
        """Whether this is the first answer to it. Any further one is not to be used."""
        row = self._held.get(worker, {}).get(id)
        if row is None:
            return False
        for holder in row.holders:
            del self._held[holder][id]
        return True

    def lost(self, worker: int, begun: int) -> list[Request]:
        """A worker died; it had begun at most the first `begun` of what it had. Returns what is given up for that."""
        rows = list(self._held.pop(worker, {}).values())
        again, given_up = [], []
        for place, row in enumerate(rows):
            row.holders.discard(worker)
            row.lone_deaths += row.suspected
            row.deaths += place < begun
            if row.holders:
                continue
            if row.lone_deaths >= GIVE_UP_AFTER:
                given_up.append(row.request)
            elif row.suspected:
                self._suspects.append(row)
            else:
                again.append(row)
        self._again.extendleft(reversed(again))
        return given_up

    def _next(self) -> Row | None:
        if self._again:
            return self._again.popleft()
        request = None if self._ended else next(self._fresh, None)
        self._ended = request is None
        return Row(request) if request else None

    def _give(self, row: Row, worker: int, now: float) -> Request:
        row.holders.add(worker)
        row.since = now
        self._held.setdefault(worker, {})[row.request.id] = row
        return row.request
