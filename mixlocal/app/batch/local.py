"""Answers requests with a model of this machine, many in one pass."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from mixlocal.app.batch.engine import Pulse, Reply, Request, TokenLogprob
from mixlocal.app.batch.engines import local_identity
from mixlocal.app.session import Session
from mixlocal.app.structured import JsonConstraint, TokenTable
from mixlocal.app.text_stream import AnswerText
from mixlocal.engine.generate import Finish, Prefilled, Token
from mixlocal.engine.params import SamplingParams
from mixlocal.engine.sampling import Choice, Sampler
from mixlocal.engine.scheduler import Event, Failed, Generation, Scheduler
from mixlocal.errors import MixlocalError, SchemaError
from mixlocal.experts.runtime import ExpertCounts

PULSE_SECONDS = 0.5


class LocalEngine:
    """A `BatchEngine`. A reply's text and tokens are those that `Session.stream` gives for its request."""

    def __init__(self, session: Session, concurrency: int | None = None) -> None:
        """session: stays the caller's to close. concurrency: at most what it has planned memory for."""
        self._session = session
        planned = session.run.plan.sequences
        self.concurrency = min(concurrency or planned, planned)

    @property
    def identity(self) -> Mapping[str, str]:
        """See `BatchEngine.identity`."""
        run = self._session.run
        return local_identity(run.store.manifest, run.options)

    @property
    def defaults(self) -> SamplingParams:
        """See `BatchEngine.defaults`."""
        return self._session.defaults

    def answer(self, requests: Iterator[Request]) -> Generator[Reply | Pulse, None, None]:
        """See `BatchEngine.answer`."""
        scheduler = Scheduler(self._session.model, self._session.run.new_pool(), self.concurrency)
        answers: dict[Generation, _Answer] = {}
        counts = self._session.model.experts.counts
        before, told = replace(counts), time.monotonic()
        while True:
            yield from self._take(requests, scheduler, answers)
            if not answers:
                return
            for event in scheduler.step():
                reply = answers[event.generation].add(event)
                if reply is not None:
                    scheduler.cancel(event.generation)
                    del answers[event.generation]
                    yield reply
            if time.monotonic() - told >= PULSE_SECONDS:
                told = time.monotonic()
                yield Pulse(len(answers), scheduler.read, scheduler.generated, _found(counts.since(before)))

    def close(self) -> None:
        """Nothing to let go of."""

    def _take(
        self, requests: Iterator[Request], scheduler: Scheduler, answers: dict[Generation, _Answer]
    ) -> Iterator[Reply]:
        """As many requests as there is room for; those that cannot be begun are replied to."""
        while len(answers) < self.concurrency and not scheduler.waiting:
            request = next(requests, None)
            if request is None:
                return
            answer = self._begin(request)
            if isinstance(answer, Reply):
                yield answer
            else:
                answers[answer.generation] = answer
                scheduler.add(answer.generation)

    def _begin(self, request: Request) -> _Answer | Reply:
        """Or at once a reply: why there is no answer, or an empty one where there is no room for a token."""
        try:
            answer = _Answer(self._session, request, self._constraint(request))
        except MixlocalError as error:
            return Reply(request.id, error=error)
        return answer.reply("length") if answer.generation.room <= 0 else answer

    def _constraint(self, request: Request) -> JsonConstraint | None:
        return None if request.form is None else JsonConstraint(request.form, self._table)

    @cached_property
    def _table(self) -> TokenTable:
        return TokenTable(self._session.tokenizer, self._session.config.vocab_size)


class _Answer:
    """A request on its way."""

    def __init__(self, session: Session, request: Request, constraint: JsonConstraint | None) -> None:
        self._session, self._request = session, request
        self._begun, self._first = time.perf_counter(), 0.0
        ids = session.encode(request.prompt, raw=request.raw)
        sampler = Sampler(request.params, constraint)
        self.generation = Generation(ids, sampler, session.tokenizer.eos_ids, session.context)
        self._answer = AnswerText(session.tokenizer, request.params.stop, continuation=request.raw)
        self._text = ""
        self._choices: list[Choice] = []

    def add(self, event: Event) -> Reply | None:
        """The reply, if that was all."""
        match event.what:
            case Prefilled():
                return None
            case Failed(error):
                return Reply(self._request.id, error=error)
            case Token(choice, finish):
                return self._add_token(choice, finish)

    def _add_token(self, choice: Choice, finish: Finish | None) -> Reply | None:
        self._first = self._first or time.perf_counter()
        if choice.id not in self._session.tokenizer.eos_ids:
            self._choices.append(choice)
        piece, stopped = self._answer.push(choice.id)
        self._text += piece
        if stopped or finish is None:
            return self.reply("stop") if stopped else None
        self._text += self._answer.rest()
        return self.reply(finish)

    def reply(self, finish: Finish) -> Reply:
        request, form = self._request, self._request.form
        now = time.perf_counter()
        error = None
        if form is not None and not form.accepts(self._text):
            error = SchemaError(
                f"the answer ended after {len(self._choices)} tokens, before its JSON was complete",
                "raise max_tokens or the context, or bound the schema: maxLength, maxItems",
            )
        return Reply(
            request.id,
            text=self._text,
            finish=finish,
            prompt_tokens=len(self.generation.prompt),
            completion_tokens=len(self._choices),
            token_ids=tuple(choice.id for choice in self._choices),
            logprobs=tuple(map(self._logprob, self._choices)) if request.params.logprobs else (),
            ttft_s=(self._first or now) - self._begun,
            total_s=now - self._begun,
            error=error,
        )

    def _logprob(self, choice: Choice) -> TokenLogprob:
        name = self._session.token_bytes
        return TokenLogprob(name(choice.id), choice.logprob, tuple((name(token), value) for token, value in choice.top))


def _found(counts: ExpertCounts) -> Mapping[str, int]:
    return {"gpu": counts.gpu_hits, "ram": counts.ram_hits, "disk": counts.disk_hits}
