"""Workers as the driver sees them: actors that come, answer, tell how it goes, and die."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixlocal.app.batch.engine import BatchEngine, Pulse, Reply, Request
from mixlocal.app.batch.ray_cluster import Cluster
from mixlocal.app.batch.ray_desk import capacity
from mixlocal.app.batch.ray_places import Slot
from mixlocal.app.batch.ray_worker import Facts, Trouble, Worker

EngineFor = Callable[[Slot], Callable[[], BatchEngine]]
CLOSE_SECONDS = 3.0  # for a worker to keep what it learnt


@dataclass(eq=False, slots=True)
class Hand:
    """One worker. number: it is no other's. asked: what it was asked and has not answered, by Ray's reference.

    opening, news: references to what it has not said yet. sent: requests so far; told: how many of these it knows to
    be all for now.
    """

    slot: Slot
    number: int
    actor: Any
    opening: Any
    facts: Facts | None = None
    news: Any = None
    asked: dict[Any, str] = field(default_factory=dict)
    sent: int = 0
    told: int = 0

    @property
    def begun(self) -> int:
        """The most requests that it can be at."""
        return self.facts.concurrency if self.facts else 0

    @property
    def room(self) -> int:
        """Requests that it can be sent now."""
        return capacity(self.facts.concurrency) - len(self.asked) if self.facts else 0

    def ask(self, request: Request) -> None:
        self.asked[self.actor.ask.remote(request)] = request.id
        self.sent += 1

    def no_more(self) -> None:
        if self.told != self.sent:
            self.actor.no_more.remote(self.sent)
            self.told = self.sent

    def references(self) -> list[Any]:
        return [*self.asked, *(reference for reference in (self.opening, self.news) if reference is not None)]


@dataclass(frozen=True, slots=True)
class Event:
    """What a worker said; `Exception`: why it is no more, one line."""

    hand: Hand
    what: Facts | Trouble | Reply | list[Pulse] | Exception


class Crew:
    """A worker for each slot, or fewer while some are replaced."""

    def __init__(self, cluster: Cluster, slots: Sequence[Slot], engine_for: EngineFor) -> None:
        """engine_for: what a worker in that slot makes its engine with."""
        self._cluster, self._ray = cluster, cluster.ray
        self._actor = self._ray.remote(Worker)
        self._engine_for = engine_for
        self._numbers = itertools.count()
        self.slots = list(slots)
        self.hands: list[Hand] = []

    def fill(self) -> None:
        """Put a worker into every slot without one. A slot whose node is no more is given up."""
        missing = Counter(self.slots) - Counter(hand.slot for hand in self.hands)
        if not missing:
            return
        alive = {node.id for node in self._cluster.nodes()}
        for slot in missing.elements():
            if slot.node.id in alive:
                self._hire(slot)
            else:
                self.slots.remove(slot)

    def listen(self, seconds: float) -> Iterator[Event]:
        """What the workers said, after waiting for it at most so long."""
        owners = {reference: hand for hand in self.hands for reference in hand.references()}
        if not owners:
            return
        self._ray.wait(list(owners), num_returns=1, timeout=seconds)
        ready, _ = self._ray.wait(list(owners), num_returns=len(owners), timeout=0)
        for reference in ready:
            if owners[reference] in self.hands:  # and was not dismissed meanwhile
                yield from self._hear(owners[reference], reference)

    def ask_news(self) -> None:
        for hand in self.hands:
            if hand.facts is not None and hand.news is None:
                hand.news = hand.actor.news.remote()

    def dismiss(self, hand: Hand) -> None:
        """End a worker, whatever it is doing."""
        self.hands.remove(hand)
        self._ray.kill(hand.actor)

    def dismiss_busy(self) -> None:
        """End those that are at something: nobody wants it any more."""
        for hand in [hand for hand in self.hands if hand.asked]:
            self.dismiss(hand)

    def give_up(self, hand: Hand) -> None:
        """End a worker and have none in its place."""
        self.dismiss(hand)
        self.slots.remove(hand.slot)

    def close(self) -> None:
        """Idle workers end in peace, the others at once."""
        ending = [hand.actor.close.remote() for hand in self.hands if hand.facts is not None and not hand.asked]
        if ending:
            self._ray.wait(ending, num_returns=len(ending), timeout=CLOSE_SECONDS)
        for hand in list(self.hands):
            self.dismiss(hand)

    def _hire(self, slot: Slot) -> None:
        where = self._cluster.on(slot.node)
        actor = self._actor.options(num_cpus=slot.cpus, num_gpus=int(slot.gpu), scheduling_strategy=where).remote()
        opening = actor.open.remote(self._engine_for(slot))
        self.hands.append(Hand(slot, next(self._numbers), actor, opening))

    def _hear(self, hand: Hand, reference: Any) -> Iterator[Event]:
        try:
            what = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:
            raise  # a bug of ours, in a worker
        except self._ray.exceptions.RayError as error:
            yield from self._bury(hand, error)
            return
        self._forget(hand, reference)
        if isinstance(what, Facts):
            hand.facts = what
        yield Event(hand, what)

    def _bury(self, hand: Hand, error: Exception) -> Iterator[Event]:
        """What a dead worker had answered already, and that it is dead; it may be only out of reach, so it is ended."""
        self.dismiss(hand)
        done, _ = self._ray.wait(list(hand.asked), num_returns=len(hand.asked), timeout=0) if hand.asked else ([], [])
        for reference in done:
            with contextlib.suppress(self._ray.exceptions.RayError):
                yield Event(hand, self._ray.get(reference))
        yield Event(hand, RuntimeError(reason(str(error))))

    def _forget(self, hand: Hand, reference: Any) -> None:
        if reference == hand.opening:
            hand.opening = None
        elif reference == hand.news:
            hand.news = None
        else:
            del hand.asked[reference]


def reason(text: str) -> str:
    """The line that matters in what Ray says of a dead worker."""
    for line in text.splitlines():
        _, mark, detail = line.partition("Worker exit detail: ")
        if mark:
            return detail.partition(" Some common causes")[0]
    return next(iter(text.splitlines()), "")[:300]
