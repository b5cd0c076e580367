"""What is told of a text's routing, against arithmetic by hand on made-up traces."""

from __future__ import annotations

from itertools import combinations
from math import log2
from pathlib import Path

import numpy as np
import pytest
import tiny
from stores import quantized

from mixlocal.app.expert_caches import REPLAYED_TOKENS, aged_hits, cache_hits, lru_hits
from mixlocal.app.expert_usage import Usage, router_figures, usage
from mixlocal.app.session import Session
from mixlocal.engine.params import SamplingParams
from mixlocal.experts.policies import AgedFrequency
from mixlocal.experts.recorder import NOTHING, RoutingRecord
from mixlocal.experts.residency import Residency
from mixlocal.experts.trace import Choices, RoutedStep, hit_rate

TRACE = ((0, 1), (0, 2), (3, 0), (1, 2), (2, 1))  # five tokens' experts, best first, of four


def choices(*layers: tuple[tuple[int, ...], ...]) -> Choices:
    return np.array(layers, dtype=np.int16)


def random_choices(layers: int, tokens: int, n_experts: int, top_k: int = 2) -> Choices:
    draw = np.random.default_rng(4)
    rows = [[draw.permutation(n_experts)[:top_k] for _ in range(tokens)] for _ in range(layers)]
    return np.array(rows, dtype=np.int16)


def test_loads() -> None:
    """Ten choices: 0 three times, 1 three times, 2 three times, 3 once."""
    found = usage(choices(TRACE, ((3, 2),) * 5), 4)
    assert found.load[0] == (0.3, 0.3, 0.3, 0.1)
    assert found.load[1] == (0.0, 0.0, 0.5, 0.5)
    assert (found.most(0), found.least(0), found.most(1), found.least(1)) == (0, 3, 2, 0)
    assert found.load_entropy == pytest.approx((-0.9 * log2(0.3) - 0.1 * log2(0.1), 1.0))
    assert (found.tokens, found.pairs, found.top_k, found.n_experts) == (5, 4, 2, 4)


def test_what_consecutive_tokens_share() -> None:
    """First choices 0 0 3 1 2: one of four pairs alike. {0 1} {0 2} share 0, {0 2} {3 0} share 0, {3 0} {1 2} nothing,
    {1 2} {2 1} both: three of four."""
    found = usage(choices(TRACE), 4)
    assert (found.first_same, found.shared) == ((0.25,), (0.75,))


def test_pairs_do_not_reach_over_the_end_of_a_piece() -> None:
    """Pieces (0 1) (0 2) and (3 0) (1 2) (2 1): of three pairs the first is alike, the first and the last share."""
    found = usage(choices(TRACE), 4, begins=(0, 2))
    assert found.pairs == 3
    assert (found.first_same, found.shared) == (pytest.approx((1 / 3,)), pytest.approx((2 / 3,)))
    assert found.load[0] == (0.3, 0.3, 0.3, 0.1)


def test_only_the_first_two_choices_are_compared() -> None:
    found = usage(choices(((0, 1, 2), (2, 3, 4), (3, 5, 0))), 6)
    assert found.shared == (0.5,)  # {0 1} {2 3} nothing, though 2 is chosen twice; {2 3} {3 5} share 3
    alone = usage(choices(((0,), (1,), (1,))), 2)
    assert alone.shared == alone.first_same == (0.5,)


@pytest.mark.parametrize(("n_experts", "top_k"), [(8, 2), (4, 2), (5, 1), (3, 2), (2, 2), (9, 4)])
def test_what_chance_would_share(n_experts: int, top_k: int) -> None:
    """Against counting all pairs of two sets."""
    found = Usage(n_experts, top_k, 0, 0, (), (), (), ())
    sets = [set(chosen) for chosen in combinations(range(n_experts), min(top_k, 2))]
    assert found.random_shared == pytest.approx(sum(bool(sets[0] & other) for other in sets) / len(sets))
    assert found.random_first_same == 1 / n_experts


def test_chance_for_mixtral_is_what_its_paper_says() -> None:
    assert round(100 * Usage(8, 2, 0, 0, (), (), (), ()).random_shared) == 46


def test_router_figures() -> None:
    """Of four choices of the second layer the guess named 0 and 1 of the first token and 3 of the second: 3 of 4."""
    chosen = choices(((0, 1), (2, 3)), ((0, 1), (2, 3)))
    guessed = choices(((NOTHING, NOTHING),) * 2, ((1, 0), (3, 1)))
    found = router_figures(RoutingRecord(4, chosen, np.array([[1.0, 2.0], [0.5, 0.25]], np.float32), guessed))
    assert found.recall == (None, 0.75)
    assert found.entropy == (1.5, 0.375)


def test_lru_by_hand() -> None:
    """The last used before each token, latest first, the better of a token's two as the later:
    (0 1): nothing. (0 2): [0 1], so 0 is found from 1 slot on. (3 0): [0 2 1], 0 from 1 on. (1 2): [3 0 2 1], 2 from 3
    on, 1 from 4 on. (2 1): [1 2 3 0], 1 from 1 on, 2 from 2 on. With 1 slot 3 of 10, with 2 slots 4, with 3 slots 5."""
    assert lru_hits(choices(TRACE), 4) == (0.3, 0.4, 0.5)
    assert lru_hits(choices(TRACE, TRACE), 4) == (0.3, 0.4, 0.5)  # each layer has its own


def test_lru_against_a_cache_that_forgets() -> None:
    chosen = random_choices(3, 120, 8)
    for slots, share in enumerate(lru_hits(chosen, 8), start=1):
        hits = 0
        for layer in chosen.tolist():
            used: dict[int, int] = {}  # expert -> when
            for now, token in enumerate(layer):
                hits += sum(expert in used for expert in token)
                used |= {expert: 10 * now - rank for rank, expert in enumerate(token)}
                while len(used) > slots:
                    del used[min(used, key=lambda expert: used[expert])]
        assert share == pytest.approx(hits / chosen.size)


def test_aged_frequency_by_hand() -> None:
    """Ten tokens that all choose 0 and 1: with one slot for the one layer, which the first expert takes and keeps, 9 of
    20 look-ups are hits; with two slots 18."""
    assert aged_hits(choices(((0, 1),) * 10), 4) == (9 / 20, 18 / 20, 18 / 20)


def test_slots_are_shared_by_layers() -> None:
    """Layer 0 always needs expert 0, layer 1 needs 0, 1 and 2 in turns: four slots for both hold all four, while two
    slots a layer make LRU miss whenever layer 1 asks. 30 tokens, 60 look-ups, 4 first ones."""
    found = cache_hits(choices(((0,),) * 30, ((0,), (1,), (2,)) * 10), 3)
    assert found.slots == (1, 2)
    assert found.aged[1] == pytest.approx(56 / 60)
    assert found.lru[1] == pytest.approx(29 / 60)
    assert found.uniform == (1 / 3, 2 / 3)


def test_all_sizes_at_once_are_each_size_alone() -> None:
    chosen = random_choices(4, 80, 6)
    alone = []
    for slots in range(1, 6):
        policy = AgedFrequency(4, 6)
        steps = [
            RoutedStep(layer, np.bincount(chosen[layer, token], minlength=6), 1)
            for token in range(80) for layer in range(4)
        ]  # fmt: skip
        alone.append(hit_rate(steps, Residency(4, 6, slots * 4, policy), policy))
    assert aged_hits(chosen, 6) == tuple(alone)
    assert sorted(alone) == alone


def test_of_a_long_text_the_beginning_is_replayed() -> None:
    chosen = np.repeat(random_choices(1, 1, 4), REPLAYED_TOKENS + 50, axis=1)
    found = cache_hits(chosen, 4)
    assert found.tokens == REPLAYED_TOKENS
    assert found.lru[1] == found.aged[1] == (REPLAYED_TOKENS - 1) / REPLAYED_TOKENS


def test_a_session_tells_of_its_last_tokens(tmp_path: Path) -> None:
    store = quantized(tiny.write_checkpoint(tmp_path / "checkpoint"), tmp_path / "store")
    with Session.open(str(store.folder)) as session:
        assert session.expert_usage() is None
        params = SamplingParams(temperature=0, max_tokens=6)
        prompt = "where do experts live?"
        for _ in session.stream(prompt, params, raw=True):
            pass
        found = session.expert_usage()
        assert found is not None
        assert found.tokens == len(session.encode(prompt, raw=True)) + 5  # the last answer token is not read
        assert found == usage(session.model.experts.trace.choices(), 4)
