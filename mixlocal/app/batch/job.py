"""A batch on its way: rows go to an engine, answers into the journal, and when all are there they are the output.

    with batch_folder(out) as folder, Batch(folder, source, source.survey(), terms) as batch:
        for progress in batch.run(engine):
            ...
        if not batch.left:
            batch.publish("input")

Killed at any moment, it goes on from what is in the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Self

from mixlocal.app.batch.answers import answer_line, failed_line
from mixlocal.app.batch.engine import BatchEngine, Pulse, Reply
from mixlocal.app.batch.feed import Feed
from mixlocal.app.batch.fingerprint import check_identity
from mixlocal.app.batch.ledger import Ledger, Order
from mixlocal.app.batch.opening import Terms, open_manifest, own_output
from mixlocal.app.batch.source import Source, Survey
from mixlocal.store.batch_folder import BatchFolder

Events = Iterator[Reply | Pulse]


@dataclass(frozen=True, slots=True)
class Progress:
    """total, done, failed: rows, of all runs; failed ones are done too. What follows is of this run. answered: rows.
    running: rows in flight. read, generated: tokens. found: as of a `Pulse`. note: something for the user to know."""

    total: int
    done: int
    failed: int
    answered: int = 0
    running: int = 0
    seconds: float = 0.0
    read: int = 0
    generated: int = 0
    found: Mapping[str, int] | None = None
    note: str = ""


class Batch:
    """progress: how far it is. seed: of the rows that have none of their own. notes: for the user, of what was found
    at the beginning. unaskable: rows that cannot be asked. stop: asks no more rows; a signal's handler may call it."""

    def __init__(self, folder: BatchFolder, source: Source, survey: Survey, terms: Terms) -> None:
        """Begin it or go on with it. Raises `RefusedError` if it was begun otherwise, or if the output is not this
        batch's to replace. Rows that cannot be asked have failed when this returns."""
        self._folder, self._terms = folder, terms
        self._manifest = open_manifest(folder, source, survey, terms)
        self.seed = self._manifest.seed
        self._failures = self._read = self._generated = 0  # of this run
        self._journal = folder.open_journal()
        try:
            self._ledger = Ledger(self._journal, survey)
            self._feed = Feed(source, survey, self._ledger)
            if terms.retry:
                self._ledger.retry()
            for row in self._feed.bad_rows():
                assert row.error is not None
                self._keep(row.key, good=False, body=failed_line(row.id, row.key, row.error))
        except BaseException:
            self._journal.close()
            raise
        self.notes = (*self._strange_lines(), *_other_models(survey, terms))
        self.progress = Progress(self._ledger.total, self._ledger.done, self._ledger.failed)
        self.unaskable = len(survey.bad)
        self.stop = self._feed.stop

    @property
    def left(self) -> int:
        """Rows that have no answer yet."""
        return self._ledger.left

    @property
    def stopped(self) -> bool:
        return self._feed.stopped

    def run(self, engine: BatchEngine, guard: Callable[[Events], Events] = iter) -> Iterator[Progress]:
        """Ask the rows that are left, and keep each answer. guard: around the engine's events; may raise instead of
        waiting for the next one. Raises what concerns all rows, and what writing can raise."""
        check_identity(self._terms.identity, engine.identity)
        start = time.monotonic()
        events = engine.answer(self._feed.requests(self._terms.defaults, self.seed))
        try:
            for event in guard(events):
                if isinstance(event, Reply):
                    self._commit(event)
                self._journal.sync_if_due()
                self._tell(event, time.monotonic() - start)
                yield self.progress
        finally:
            events.close()
            self._journal.sync()
        if self._feed.trouble is not None:
            raise self._feed.trouble
        assert self.stopped or not self.left, f"the engine left {self.left} rows without a reply"

    def publish(self, order: Order) -> bool:
        """Make the answers of all rows the output; False if they are already."""
        self._journal.sync()
        self._manifest = own_output(self._folder, self._manifest)
        return self._folder.publish(lambda: self._ledger.lines(order))

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _commit(self, reply: Reply) -> None:
        key, asked = self._feed.take(reply.id)
        if reply.error is None:
            self._keep(key, good=True, body=answer_line(asked, reply, key, self._terms.model))
        else:
            self._keep(key, good=False, body=failed_line(reply.id, key, reply.error))

    def _keep(self, key: bytes, *, good: bool, body: bytes) -> None:
        self._ledger.keep(key, good=good, body=body)
        self._failures += not good
        if self._terms.max_failures is not None and self._failures >= self._terms.max_failures:
            self._feed.stop()

    def _tell(self, event: Reply | Pulse, seconds: float) -> None:
        now = replace(
            self.progress, done=self._ledger.done, failed=self._ledger.failed, running=self._feed.running,
            seconds=seconds, note="",
        )  # fmt: skip
        if isinstance(event, Pulse):
            self.progress = replace(now, found=event.found or now.found, note=event.note)
            self._count(event.read, event.generated)
            return
        self._read += event.prompt_tokens
        self._generated += event.completion_tokens
        self.progress = replace(now, answered=now.answered + 1)
        self._count(self._read, self._generated)

    def _count(self, read: int, generated: int) -> None:
        """Tokens of rows that are done, or of those in flight too where the engine tells."""
        now = self.progress
        self.progress = replace(now, read=max(now.read, read), generated=max(now.generated, generated))

    def _strange_lines(self) -> Iterator[str]:
        damaged, strays = self._journal.damaged, self._ledger.strays
        if damaged:
            yield f"lines of {self._folder.path.name} that somebody has changed: {damaged}; their rows are asked again"
        if strays:
            yield f"answers to rows that are gone from the input or were changed there: {strays}; left out"


def _other_models(survey: Survey, terms: Terms) -> Iterator[str]:
    others = [name for name in survey.models if name not in (terms.model, terms.identity.get("model"))]
    if others:
        yield f"rows name the model {', '.join(others)[:200]}; {terms.model} answers all of them"
