"""What is kept of a model's routing from one run to the next: averages, in a small file that may be lost."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tiny
from stores import quantized

from mixlocal.app import model_run
from mixlocal.app.session import Session
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import DiskFullError
from mixlocal.experts.profile import (
    FEWEST_TOKENS,
    FORMAT,
    SETTLED_TOKENS,
    RoutingProfile,
    learn,
    load_profile,
    save_profile,
)
from mixlocal.experts.trace import RoutingTrace
from mixlocal.store import durable
from mixlocal.store.paths import Home, home

L, E = 3, 4


def traced(tokens: Iterable[tuple[int, ...]], layers: int = L, experts: int = E) -> RoutingTrace:
    """Every layer chooses the same experts of each token; all tokens are kept."""
    tokens = list(tokens)
    trace = RoutingTrace(layers, experts, len(tokens))
    for chosen in tokens:
        for layer in range(layers):
            trace.add(layer, list(chosen), 1)
    return trace


def profile(*row: float, tokens: int = 100, hits: tuple[float, ...] = ()) -> RoutingProfile:
    return RoutingProfile(FORMAT, tokens, (row,) * L, hits)


def learnt(trace: RoutingTrace, before: RoutingProfile | None = None) -> RoutingProfile:
    found = learn(trace, before)
    assert found is not None
    return found


def test_rates_are_the_shares_of_tokens_that_chose_an_expert() -> None:
    found = learnt(traced([(0, 1)] * 30 + [(0, 2)] * 10))
    assert found.rates == ((1.0, 0.75, 0.25, 0.0),) * L
    assert found.tokens == 40


def test_a_prompt_counts_as_many_tokens() -> None:
    trace = RoutingTrace(1, E)
    trace.add(0, [0] * 30 + [1] * 10 + [3] * 40, 40)
    assert learnt(trace).rates == ((0.75, 0.25, 0.0, 1.0),)
    assert learnt(trace).tokens == 40


def test_a_few_tokens_are_not_worth_a_file() -> None:
    assert learn(traced([]), None) is None
    assert learn(traced([(0, 1)] * (FEWEST_TOKENS - 1)), profile(0.5, 0.5, 0.5, 0.5)) is None
    assert learn(traced([(0, 1)] * FEWEST_TOKENS), None) is not None


def test_what_is_known_already_weighs_as_many_tokens_as_it_came_from() -> None:
    found = learnt(traced([(0, 1)] * 50), profile(0.4, 0.1, 0.7, 0.8, tokens=100))
    assert found.tokens == 150
    assert found.rates[0] == pytest.approx(((40 + 50) / 150, (10 + 50) / 150, 70 / 150, 80 / 150), abs=1e-5)


@pytest.mark.parametrize("tokens", [SETTLED_TOKENS, 10**12])
def test_much_experience_moves_slowly_and_never_stands_still(tokens: int) -> None:
    before = profile(0.0, 0.5, 0.5, 1.0, tokens=tokens)
    found = learnt(traced([(0, 1)] * 64), before)
    assert found.tokens == SETTLED_TOKENS
    assert found.rates[0][0] == pytest.approx(64 / (SETTLED_TOKENS + 64), abs=1e-5)


def test_no_sequence_is_kept() -> None:
    """Only how often, not in which order: from one a text could be guessed."""
    draw = random.Random(4)
    tokens = [tuple(draw.sample(range(E), 2)) for _ in range(200)]
    shuffled = draw.sample(tokens, len(tokens))
    assert tokens != shuffled
    assert learnt(traced(tokens)).rates == learnt(traced(shuffled)).rates


def test_a_file_for_mixtral_is_small_however_long_the_text(tmp_path: Path) -> None:
    """The 600 tokens alone would be 38400 choices."""
    draw = random.Random(5)
    trace = traced([tuple(draw.sample(range(8), 2)) for _ in range(600)], layers=32, experts=8)
    save_profile(tmp_path / "profile.json", learnt(trace))
    assert (tmp_path / "profile.json").stat().st_size < 20_000
    assert load_profile(tmp_path / "profile.json", 32, 8) == learnt(trace)


@pytest.mark.parametrize("hits", [(), (0.25, 0.5, 0.875)])
def test_what_is_saved_is_loaded(tmp_path: Path, hits: tuple[float, ...]) -> None:
    path = tmp_path / "not" / "there" / "yet.json"
    saved = profile(0.0, 0.12345, 1.0, 0.5, hits=hits)
    save_profile(path, saved)
    assert load_profile(path, L, E) == saved
    save_profile(path, profile(0.5, 0.5, 0.5, 0.5))
    assert load_profile(path, L, E) == profile(0.5, 0.5, 0.5, 0.5)


GOOD = b'{"format":1,"tokens":100,"rates":[[0,0.1,1,0.5],[0,0.1,1,0.5],[0,0.1,1,0.5]],"hits":[0.2,0.4,0.8]}'
DAMAGE: dict[str, bytes] = {
    "empty": b"",
    "cut": GOOD[:-20],
    "zeros": bytes(len(GOOD)),
    "no UTF-8": GOOD.replace(b"format", b"\xff\xfermat"),
    "a list": b"[" + GOOD + b"]",
    "a bomb": b"[" * 100_000,
    "a bomb where a rate should be": GOOD.replace(b"[0,0.1", b"[" * 100_000, 1),
    "a field more": GOOD.replace(b'"tokens"', b'"text":"secret","tokens"'),
    "a field less": GOOD.replace(b'"tokens":100,', b""),
    "another format": GOOD.replace(b'"format":1', b'"format":2'),
    "no tokens": GOOD.replace(b"100", b"0"),
    "negative tokens": GOOD.replace(b"100", b"-100"),
    "tokens as text": GOOD.replace(b"100", b'"100"'),
    "a layer less": GOOD.replace(b"[0,0.1,1,0.5],", b"", 1),
    "a layer more": GOOD.replace(b"[[", b"[[0,0.1,1,0.5],["),
    "an expert less": GOOD.replace(b"[0,0.1,1", b"[0,1", 1),
    "an expert more": GOOD.replace(b"[0,0.1,1", b"[0,0.1,0.2,1", 1),
    "NaN": GOOD.replace(b"0.1", b"NaN", 1),
    "infinite": GOOD.replace(b"0.1", b"1e999", 1),
    "huge": GOOD.replace(b"0.1", b"1e30", 1),
    "negative": GOOD.replace(b"0.1", b"-0.1", 1),
    "a little above one": GOOD.replace(b"0.1", b"1.0001", 1),
    "hits above one": GOOD.replace(b"0.8", b"8"),
    "negative hits": GOOD.replace(b"0.8", b"-0.8"),
    "hits for other shares": GOOD.replace(b"[0.2,", b"["),
}


@pytest.mark.parametrize("data", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(GOOD)
    assert load_profile(path, L, E) is not None
    assert data != GOOD
    path.write_bytes(data)
    assert load_profile(path, L, E) is None


def test_what_is_no_file_is_as_good_as_none(tmp_path: Path) -> None:
    assert load_profile(tmp_path / "nowhere.json", L, E) is None
    assert load_profile(tmp_path, L, E) is None
    (tmp_path / "file").write_bytes(GOOD)
    assert load_profile(tmp_path / "file" / "below.json", L, E) is None


def test_a_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(GOOD)
    os.truncate(path, 1 << 40)
    assert load_profile(path, L, E) is None


def test_the_hottest_come_first() -> None:
    rates = ((0.1, 0.9, 0.2), (0.8, 0.3, 0.05))
    assert RoutingProfile(FORMAT, 1, rates).hottest() == [1, 3, 4, 2, 0, 5]


def test_equally_hot_ones_come_from_each_layer_in_turns() -> None:
    assert RoutingProfile(FORMAT, 1, ((0.5,) * 3,) * 2).hottest() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0, 0), (0.125, 0.2), (0.25, 0.4), (0.375, 0.5), (0.5, 0.6), (0.75, 0.9), (0.9, 0.96), (1, 1)],
)
def test_hits_lie_on_lines_between_those_that_were_simulated(share: float, expected: float) -> None:
    assert profile(1, 1, 0, 0, hits=(0.4, 0.6, 0.9)).expected_hits(share) == pytest.approx(expected)
    assert profile(1, 1, 0, 0).expected_hits(share) is None


def test_hits_are_those_of_a_cache_of_that_size() -> None:
    """Half of the tokens' choices are always the same experts: more memory finds more, and the favourites at once."""
    draw = np.random.default_rng(6)
    found = learnt(traced([(0, int(draw.integers(1, 8))) for _ in range(80)], layers=8, experts=8))
    quarter, half, most = found.hits
    assert 0.5 <= quarter < half < most < 1


def test_prompts_alone_teach_no_hits_and_do_not_unlearn_them() -> None:
    trace = RoutingTrace(1, E)
    trace.add(0, [0, 1] * 50, 50)
    assert learnt(trace).hits == ()
    before = RoutingProfile(FORMAT, 100, ((0.5,) * E,), (0.2, 0.4, 0.8))
    assert learnt(trace, before).hits == before.hits


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 2)])
def test_the_smallest_models_are_learnt_too(shape: tuple[int, int]) -> None:
    """A quarter of their experts is none, or fewer than a token chooses."""
    layers, experts = shape
    found = learnt(traced([tuple(range(experts))] * 40, layers, experts))
    assert found.rates == ((1.0,) * experts,) * layers
    assert all(0 <= hits <= 1 for hits in found.hits)


TEXT, GREEDY = "Forty characters and more, so that one run is enough.", SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture
def folders(tmp_path: Path) -> Home:
    """A home with one model in it."""
    quantized(tiny.write_checkpoint(tmp_path / "checkpoint"), tmp_path / "models" / "tiny" / "q4")
    return home(tmp_path)


def answer(session: Session) -> list[int]:
    return [chunk.choice.id for chunk in session.stream(TEXT, GREEDY, raw=True) if chunk.choice]


def test_a_session_keeps_what_it_learnt_for_the_next(folders: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[RoutingProfile | None] = []
    open_experts = model_run.open_experts
    monkeypatch.setattr(
        model_run, "open_experts", lambda *args, **more: (used.append(args[2]), open_experts(*args, **more))[1]
    )
    path = folders.profile("tiny", "q4")
    with Session.open("tiny", folders=folders, device="cpu") as session:
        first = answer(session)
        assert not path.exists()
    saved = load_profile(path, 2, 4)
    assert saved is not None
    assert saved.tokens == len(TEXT) + len(first) - 1
    with Session.open("tiny", folders=folders, device="cpu") as session:
        assert answer(session) == first
    merged = load_profile(path, 2, 4)
    assert used == [None, saved]
    assert merged is not None
    assert merged.tokens == 2 * saved.tokens
    assert merged.rates == saved.rates  # the same text again


def test_a_damaged_profile_is_written_anew(folders: Home) -> None:
    path = folders.profile("tiny", "q4")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{")
    with Session.open("tiny", folders=folders, device="cpu") as session:
        answer(session)
    assert load_profile(path, 2, 4) is not None


def test_a_session_that_said_nothing_keeps_nothing(folders: Home) -> None:
    with Session.open("tiny", folders=folders, device="cpu"):
        pass
    assert not folders.cache.exists()


def test_a_full_disk_at_the_end_is_a_named_error_and_leaves_what_was(
    folders: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folders.profile("tiny", "q4")
    save_profile(path, RoutingProfile(FORMAT, 50, ((0.5,) * 4,) * 2))
    before = path.read_bytes()

    def full(name: str, nbytes: int) -> int:
        raise OSError(28, "No space left on device")

    session = Session.open("tiny", folders=folders, device="cpu")
    answer(session)
    monkeypatch.setattr(durable, "on_call", full)
    with pytest.raises(DiskFullError, match="no space left"):
        session.close()
    session.close()  # nothing is left to do
    assert [file.read_bytes() for file in path.parent.iterdir()] == [before]
