"""One batch's way through a crew: give out requests, hear answers, give out again what a dead worker had."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import replace

from mixlocal.app.batch.engine import Pulse, Reply, Request
from mixlocal.app.batch.ray_crew import Crew, Event, Hand
from mixlocal.app.batch.ray_ledger import GIVE_UP_AFTER, Ledger
from mixlocal.app.batch.ray_roll import Roll
from mixlocal.app.batch.ray_tally import plus
from mixlocal.app.batch.ray_worker import Facts, Trouble
from mixlocal.errors import NetworkError, RefusedError

POLL_SECONDS = 0.1  # no signal is heard while Ray waits
PULSE_SECONDS = 1.0


class Round:
    def __init__(self, crew: Crew, roll: Roll, requests: Iterator[Request], patience: float) -> None:
        """patience: seconds after which an idle worker does what another has not answered, as it may hang."""
        self._crew, self._roll, self._patience = crew, roll, patience
        self._ledger = Ledger(requests)
        self._total = Pulse()
        self._told: set[str] = set()  # notes of workers, who have much the same to say

    def events(self) -> Generator[Reply | Pulse, None, None]:
        pulse_at = time.monotonic() + PULSE_SECONDS
        while not self._ledger.finished:
            self._staff()
            self._feed()
            yield from self._listen(POLL_SECONDS)
            if time.monotonic() >= pulse_at:
                self._crew.ask_news()
                yield self._pulse()
                pulse_at = time.monotonic() + PULSE_SECONDS
        self._crew.ask_news()
        yield from self._last_news()
        yield self._pulse()

    def _staff(self) -> None:
        if self._ledger.waiting:
            self._crew.fill()
        if not self._crew.slots:
            raise NetworkError("no node of the Ray cluster is left", "what was answered is kept; run it again")

    def _feed(self) -> None:
        """One request after the other to whoever has fewest."""
        hungry = [hand for hand in self._crew.hands if hand.room > 0]
        while hungry:
            hand = min(hungry, key=lambda hand: len(hand.asked))
            request = self._next_for(hand)
            if request is not None:
                hand.ask(request)
            else:
                hand.no_more()
            if request is None or hand.room <= 0:
                hungry.remove(hand)

    def _next_for(self, hand: Hand) -> Request | None:
        now, idle = time.monotonic(), not hand.asked
        request = self._ledger.take(hand.number, now, idle=idle)
        if request is None and idle and not self._ledger.waiting:
            return self._ledger.take_copy(hand.number, now, self._patience)
        return request

    def _listen(self, seconds: float) -> Iterator[Reply | Pulse]:
        for event in self._crew.listen(seconds):
            yield from self._handle(event)

    def _last_news(self) -> Iterator[Reply | Pulse]:
        """So that the counts at the end are whole, unless a worker keeps us waiting."""
        end = time.monotonic() + PULSE_SECONDS
        while any(hand.news is not None for hand in self._crew.hands) and time.monotonic() < end:
            yield from self._listen(POLL_SECONDS)

    def _handle(self, event: Event) -> Iterator[Reply | Pulse]:
        hand = event.hand
        match event.what:
            case Reply() as reply:
                self._roll.answered()
                if self._ledger.answered(hand.number, reply.id):
                    yield reply
            case list() as pulses:
                for pulse in pulses:
                    self._total = plus(self._total, pulse)
                fresh = {pulse.note: None for pulse in pulses if pulse.note and pulse.note not in self._told}
                self._told.update(fresh)
                yield from map(self._pulse, fresh)
            case Facts() as facts:
                self._roll.admit(facts)
            case Trouble() as trouble:
                yield self._pulse(self._roll.refuse(hand, trouble))
            case Exception() as why:
                yield from self._lose(hand, str(why))

    def _lose(self, hand: Hand, why: str) -> Iterator[Reply | Pulse]:
        for request in self._ledger.lost(hand.number, hand.begun):
            yield Reply(request.id, error=_deadly(why))
            self._roll.gave_up()
        yield self._pulse(self._roll.died(why))

    def _pulse(self, note: str = "") -> Pulse:
        return replace(self._total, running=self._ledger.running, note=note)


def _deadly(why: str) -> RefusedError:
    return RefusedError(
        f"{GIVE_UP_AFTER} workers that had only this request died of it: {why}", "--retry-errors asks it again"
    )
