"""Whether to read ahead: tried, measured, kept for a while, and tried again."""

from __future__ import annotations

import pytest

from mixlocal.experts.prefetch import BLOCK, GAIN, HELD, PAIRS, Lookahead

TRIAL = 2 * BLOCK * PAIRS


def run(lookahead: Lookahead, passes: int, seconds: dict[bool, float], tokens: int = 1) -> list[bool]:
    """Passes that take `seconds` with and without it; whether each looked ahead."""
    on = []
    for _ in range(passes):
        lookahead.begin(tokens)
        on.append(lookahead.on)
        lookahead.end(seconds[on[-1]])
    return on


@pytest.mark.parametrize(("with_it", "kept"), [(1.2, False), (1.0, False), (GAIN + 0.005, False), (0.9, True)])
def test_the_faster_way_is_kept_after_a_trial_of_both(with_it: float, kept: bool) -> None:
    """About as fast is not faster: then nothing is read in vain."""
    lookahead = Lookahead(wanted=True)
    assert run(lookahead, TRIAL, {True: with_it, False: 1.0}) == ([True] * BLOCK + [False] * BLOCK) * PAIRS
    assert run(lookahead, HELD, {True: with_it, False: 1.0}) == [kept] * HELD


def test_it_is_tried_again_after_a_while_and_may_end_otherwise() -> None:
    lookahead = Lookahead(wanted=True)
    slower, faster = {True: 2.0, False: 1.0}, {True: 1.0, False: 2.0}
    for seconds, kept in ((slower, False), (faster, True), (slower, False)):
        assert set(run(lookahead, TRIAL, seconds)) == {True, False}
        assert set(run(lookahead, HELD, seconds)) == {kept}
    assert lookahead.on  # the next trial begins


def test_a_few_slow_passes_do_not_decide() -> None:
    """One block of each trial is disturbed by something else: the median does not hear of it."""
    lookahead = Lookahead(wanted=True)
    run(lookahead, BLOCK, {True: 50.0, False: 50.0})
    run(lookahead, TRIAL - BLOCK, {True: 0.9, False: 1.0})
    assert set(run(lookahead, HELD, {True: 0.9, False: 1.0})) == {True}


def test_never_when_it_is_not_wanted() -> None:
    lookahead = Lookahead(wanted=False)
    for tokens in (1, 40):
        assert not any(run(lookahead, TRIAL + HELD, {True: 0.1, False: 1.0}, tokens))


def test_always_for_several_tokens_and_those_are_no_part_of_a_trial() -> None:
    lookahead = Lookahead(wanted=True)
    assert all(run(lookahead, TRIAL, {True: 9.0, False: 1.0}, tokens=40))
    run(lookahead, TRIAL // 2, {True: 0.5, False: 1.0})
    assert all(run(lookahead, 1000, {True: 9.0, False: 1.0}, tokens=2))
    run(lookahead, TRIAL // 2, {True: 0.5, False: 1.0})
    assert set(run(lookahead, HELD, {True: 0.5, False: 1.0})) == {True}
    lookahead = Lookahead(wanted=True)
    run(lookahead, TRIAL, {True: 2.0, False: 1.0})
    assert not lookahead.on
    assert all(run(lookahead, 3, {True: 2.0, False: 1.0}, tokens=40))
    assert not any(run(lookahead, 3, {True: 2.0, False: 1.0}))
