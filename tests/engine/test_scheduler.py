"""Many sequences at once give what each gives alone, in memory that cannot run out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from stores import open_model, quantized

from mixlocal.engine.generate import Prefilled, Token, generate
from mixlocal.engine.params import SamplingParams
from mixlocal.engine.sampling import Choice, Sampler
from mixlocal.engine.scheduler import Failed, Generation, Scheduler
from mixlocal.errors import ContextOverflowError, CorruptError, UsageError
from mixlocal.kernels import PAGE
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import KVPool, own_cache, page_count
from mixlocal.model.transformer import Transformer

CONTEXT = 300
STOPS = frozenset({3, 77})  # of 260 tokens: some sequences meet one
Model = tuple[Transformer, ModelConfig]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    root = tmp_path_factory.mktemp("scheduler")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=CONTEXT)
    return open_model(quantized(checkpoint, root / "store", "q4"))


@pytest.fixture(scope="module")
def singly(model: Model) -> list[list[Token]]:
    return [alone(model, text, seed) for seed, text in enumerate(prompts(16))]


def params(seed: int) -> SamplingParams:
    """Of every kind: greedy, seeded, cut off, penalised."""
    kinds = (
        SamplingParams(temperature=0), SamplingParams(temperature=1.3, top_p=0.9), SamplingParams(top_k=5, logprobs=3),
        SamplingParams(temperature=0, repeat_penalty=1.3), SamplingParams(min_p=0.05, temperature=2),
    )  # fmt: skip
    kind = kinds[seed % len(kinds)]
    return SamplingParams(
        kind.temperature, kind.top_p, kind.top_k, kind.min_p, kind.repeat_penalty, 1 + seed * 7 % 60, seed,
        logprobs=kind.logprobs,
    )  # fmt: skip


def prompts(count: int) -> list[list[int]]:
    dice = random.Random(count)
    lengths = [1, 2, 63, 64, 65, 130, CONTEXT - 3, CONTEXT - 1]
    return [[dice.randrange(260) for _ in range(lengths[n % len(lengths)])] for n in range(count)]


def alone(model: Model, prompt: list[int], seed: int) -> list[Token]:
    events = generate(model[0], prompt, own_cache(model[1], CONTEXT), Sampler(params(seed)), STOPS)
    return [event for event in events if isinstance(event, Token)]


def together(
    model: Model, work: list[Generation], pages: int, most_running: int, *, late: Callable[[int], bool] = bool
) -> dict[Generation, list[Token]]:
    """late: of a generation's number, whether it is added only while others run."""
    scheduler = Scheduler(model[0], pool := KVPool(model[1], pages), most_running)
    found: dict[Generation, list[Token]] = {generation: [] for generation in work}
    behind = [generation for number, generation in enumerate(work) if late(number)]
    for generation in work:
        if generation not in behind:
            scheduler.add(generation)
    while scheduler.busy or behind:
        if behind:
            scheduler.add(behind.pop())
        for event in scheduler.step():
            if isinstance(event.what, Token):
                found[event.generation].append(event.what)
        assert len(scheduler.running) <= most_running
        assert sum(page_count(generation.most_tokens) for generation in scheduler.running) <= pages
    assert pool.free == pages
    assert scheduler.generated == sum(map(len, found.values()))
    assert scheduler.read == sum(len(generation.prompt) for generation in work)
    return found


@pytest.mark.parametrize(
    ("pages", "most_running", "chunk"), [(200, 32, 512), (200, 32, 16), (page_count(CONTEXT), 32, 64), (12, 5, 100)]
)
def test_each_answers_as_if_it_were_alone(
    model: Model, singly: list[list[Token]], pages: int, most_running: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens, log probabilities and finish, to the bit, in any company, memory and cut of the prompts."""
    monkeypatch.setattr(model[0], "chunk", chunk)
    texts = prompts(len(singly))
    work = [Generation(text, Sampler(params(seed)), STOPS, CONTEXT) for seed, text in enumerate(texts)]
    found = together(model, work, pages, most_running, late=lambda number: number % 3 == 0)
    finishes = set()
    for seed, (tokens, generation) in enumerate(zip(singly, work, strict=True)):
        assert found[generation] == tokens, seed
        finishes.add(found[generation][-1].finish)
    assert finishes == {"stop", "length"}


def test_short_ones_overtake_in_the_same_pass(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for another's answer, only for a place; and a long prompt holds up nobody's next token."""
    monkeypatch.setattr(model[0], "chunk", 16)
    scheduler = Scheduler(model[0], KVPool(model[1], 20), 2)
    quick, slow, third = (
        Generation([n] * size, Sampler(SamplingParams(0, max_tokens=count)), (), CONTEXT)
        for n, size, count in ((1, 3, 12), (2, 150, 5), (4, 2, 1))
    )
    for generation in (quick, slow, third):
        scheduler.add(generation)
    order = []
    passes: list[dict[Generation, type]] = []
    while scheduler.busy:
        events = scheduler.step()
        passes.append({event.generation: type(event.what) for event in events})
        order += [e.generation for e in events if isinstance(e.what, Token) and e.what.finish]
    assert order == [quick, third, slow] or order == [quick, slow, third]
    assert all(step[quick] is Token for step in passes[:12])
    assert Prefilled in {step.get(slow) for step in passes[:12]}
    assert not any(third in step for step in passes[:12])


def test_pages_are_taken_as_sequences_grow(model: Model) -> None:
    """A promise is not a page: what is taken follows what is written."""
    pool = KVPool(model[1], 40)
    scheduler = Scheduler(model[0], pool, 8)
    for seed in range(4):
        scheduler.add(Generation([seed + 5] * 60, Sampler(SamplingParams(0, max_tokens=200)), (), CONTEXT))
    scheduler.step()
    assert 40 - pool.free == 4
    for _ in range(5):
        scheduler.step()
    assert 40 - pool.free == 4 * page_count(65) == 8
    assert page_count(65) == 2
    assert PAGE == 64


def test_cancelling_frees_and_disturbs_nobody(model: Model) -> None:
    texts = prompts(6)
    work = [Generation(text, Sampler(params(seed)), STOPS, CONTEXT) for seed, text in enumerate(texts)]
    pool = KVPool(model[1], 60)
    scheduler = Scheduler(model[0], pool, 4)
    for generation in work:
        scheduler.add(generation)
    found: dict[Generation, list[Token]] = {generation: [] for generation in work}
    for number in range(200):
        if number == 2:
            for victim in (work[1], work[5]):  # one that runs, one that waits
                scheduler.cancel(victim)
                scheduler.cancel(victim)
        for event in scheduler.step():
            if isinstance(event.what, Token):
                found[event.generation].append(event.what)
    assert not scheduler.busy
    assert pool.free == 60
    assert found[work[5]] == []
    for seed in (0, 2, 3, 4):
        assert found[work[seed]] == alone(model, texts[seed], seed)


class Refuses:
    """Allows one token, and nothing from the third on."""

    def __init__(self, size: int) -> None:
        self._allowed = torch.zeros(size, dtype=torch.bool)
        self._allowed[9] = True

    def allowed(self) -> torch.Tensor:
        return self._allowed

    def accept(self, token: int) -> None:
        assert token == 9
        self._count = getattr(self, "_count", 0) + 1
        if self._count == 3:
            raise CorruptError("no more")


def test_one_that_fails_fails_alone(model: Model) -> None:
    texts = prompts(3)
    bad = Generation([8, 8], Sampler(SamplingParams(0, max_tokens=20), Refuses(model[1].vocab_size)), (), CONTEXT)
    work = [Generation(text, Sampler(params(seed)), STOPS, CONTEXT) for seed, text in enumerate(texts)]
    scheduler = Scheduler(model[0], pool := KVPool(model[1], 40), 8)
    for generation in (work[0], bad, *work[1:]):
        scheduler.add(generation)
    found: dict[Generation, list[object]] = {generation: [] for generation in (bad, *work)}
    for event in drain(scheduler):
        found[event[0]].append(event[1])
    assert [type(what) for what in found[bad]] == [Token, Token, Failed]
    assert isinstance(found[bad][-1], Failed)
    assert found[bad][-1].error.message == "no more"
    assert pool.free == 40
    for seed, (text, generation) in enumerate(zip(texts, work, strict=True)):
        assert [what for what in found[generation] if isinstance(what, Token)] == alone(model, text, seed)


def drain(scheduler: Scheduler) -> Iterator[tuple[Generation, object]]:
    while scheduler.busy:
        for event in scheduler.step():
            yield event.generation, event.what


def test_prompts_that_do_not_fit() -> None:
    sampler = Sampler(SamplingParams(max_tokens=5))
    with pytest.raises(UsageError, match="empty"):
        Generation([], sampler, (), 10)
    with pytest.raises(ContextOverflowError, match="11 tokens and the context holds 10"):
        Generation([1] * 11, sampler, (), 10)
    assert Generation([1] * 10, sampler, (), 10).room == 0
    assert Generation([1] * 8, sampler, (), 10).most_tokens == 10


def test_a_choice_is_a_value() -> None:
    """What the comparisons above rest on."""
    assert Token(Choice(1, -0.5)) == Token(Choice(1, -0.5)) != Token(Choice(1, -0.25))


def test_one_cannot_be_let_in_without_a_pool_that_holds_it(tmp_path: Path, model: Model) -> None:
    scheduler = Scheduler(model[0], KVPool(model[1], 1), 4)
    with pytest.raises(AssertionError):
        scheduler.add(Generation([1] * 60, Sampler(SamplingParams(max_tokens=50)), (), CONTEXT))
