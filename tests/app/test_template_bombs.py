"""Templates that want all the time or memory there is: each is refused in time, and costs this process nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import pytest
from conversations import SMOLLM2, user

from mixlocal.app.template import ChatML
from mixlocal.app.template_jinja import JinjaTemplate
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.errors import RefusedError

Result = TypeVar("Result")
MANY = "{% for a in range(99999) %}"
RANGES = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set ns = namespace(s='ab') %}{% for n in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
TIME, MEMORY, FLOOD, DEEP = "took more than 2 s", "needs too much memory", "writes more than", "cannot be used"
BOMBS = {
    # time: each takes its two seconds, so there are not too many
    RANGES: TIME,
    "{{ 9 ** (9 ** 9) }}": TIME,  # jinja2 computes what it can while it compiles
    "{% set n = messages | length %}{{ (8 + n) ** (9 ** (8 + n)) }}": TIME,
    MANY + "{{ '' if ('a' * 99999).replace('a', 'b') else '' }}{% endfor %}": TIME,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}": TIME,
    # memory
    "{{ 'a' * 10 ** 9 }}": MEMORY,
    "{{ [0] * 10 ** 9 }}": MEMORY,
    "{{ ('a' * 10 ** 6) | center(10 ** 9) }}": MEMORY,
    "{{ 'a'.ljust(10 ** 9) }}": MEMORY,
    "{{ '{:>9999999999}'.format(1) }}": MEMORY,
    "{{ '{0:>{1}}'.format(1, 9999999999) }}": MEMORY,
    "{{ '{0:>{1}}'.format_map({'0': 1, '1': 9999999999}) }}": DEEP,
    "{{ '%9999999999d' % 1 }}": MEMORY,
    "{{ '%999999999d' % messages | length }}": MEMORY,
    "{{ '%*d' | format(999999999, 1) }}": MEMORY,
    "{{ '%.999999999f' | format(1.5) }}": MEMORY,
    DOUBLE: MEMORY,
    "{% set ns = namespace(l=[1]) %}" + MANY + "{% set ns.l = ns.l + ns.l %}{% endfor %}": MEMORY,
    "{% set ns = namespace(l=[1]) %}{% for a in ns.l %}{% set ns.l = ns.l + [a] * 10 ** 8 %}{% endfor %}": MEMORY,
    "{% set x = 'x' * 3000000 %}{{ x.split('x') | join(x) | length }}": MEMORY,
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}": MEMORY,
    "{{ range(99999) | join('x' * 99999) }}": MEMORY,
    "{{ ('a\n' * 9999) | indent(99999) }}": MEMORY,
    "{{ {'a': 1} | tojson(indent=10 ** 9) }}": MEMORY,
    "{{ [1] | batch(10 ** 9, 'x') | list }}": MEMORY,
    "{% set x %}" + MANY + "{{ 'a' * 99999 }}{% endfor %}{% endset %}{{ x }}": MEMORY,
    # output
    MANY + "{{ 'a' * 400 }}{% endfor %}": FLOOD,
    "{{ 'a' * 10 ** 7 }}": FLOOD,
    "{{ '\U0001f600' * 300000 }}": FLOOD,
    "{{ strftime_now('%A' * 99999) }}": FLOOD,
    # depth
    "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}": DEEP,
    "{{ " + "[" * 30000 + "]" * 30000 + " }}": DEEP,
    "{{ " + "-" * 60000 + "1 }}": DEEP,
    "{{ 1" + " + 1" * 15000 + " }}": DEEP,
    "{{ x" + "[0]" * 20000 + " }}": DEEP,
    "{{ x" + "|e" * 30000 + " }}": DEEP,
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000: DEEP,
    "{% for a in [1] %}" * 21 + "{% endfor %}" * 21: DEEP,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": DEEP,
    "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}": DEEP,
}  # fmt: skip


@dataclass
class Outcome:
    """made, rendered: the seconds of each."""

    made: float
    rendered: float
    message: str
    next_works: bool


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """The most bytes that this process had in memory, at the end beside those at the beginning."""
    process, stop = psutil.Process(), threading.Event()
    seen = [process.memory_info().rss] * 2

    def watch() -> None:
        while not stop.wait(0.01):
            seen[1] = max(seen[1], process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    stop.set()
    thread.join()


def attempt(action: Callable[[], Result]) -> tuple[Result | None, float, str]:
    """(what came of it, the seconds it took, why it was refused)"""
    began = time.monotonic()
    try:
        return action(), time.monotonic() - began, ""
    except RefusedError as error:
        return None, time.monotonic() - began, error.message


@dataclass
class Field:
    """What became of all bombs. growth: bytes of this process. left: child processes."""

    outcomes: dict[str, Outcome]
    growth: int
    left: int


@pytest.fixture(scope="module")
def field(smol: Tokenizer) -> Field:
    harmless = JinjaTemplate(SMOLLM2)
    wanted = ChatML().encode([user("A")], smol)

    def drop(source: str) -> Outcome:
        template, made, message = attempt(lambda: JinjaTemplate(source, origin="f.jinja"))
        rendered = 0.0
        if template is not None:
            _, rendered, message = attempt(lambda: template.encode([user("A")], smol))
        return Outcome(made, rendered, message, harmless.encode([user("A")], smol) == wanted)

    harmless.encode([user("A")], smol)
    children = set(psutil.Process().children())
    with watched_memory() as seen, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        outcomes = dict(zip(BOMBS, pool.map(drop, BOMBS), strict=True))
    left = set(psutil.Process().children()) - children
    return Field(outcomes, seen[1] - seen[0], len(left))


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_is_refused_in_time(field: Field, bomb: str) -> None:
    outcome = field.outcomes[bomb]
    assert outcome.rendered < 3.5
    assert outcome.made < 3.5 + 1  # a busy machine may need a second to start a process
    assert BOMBS[bomb] in outcome.message
    assert outcome.message.startswith("f.jinja")
    assert len(outcome.message) < 400
    assert outcome.next_works


def test_no_bomb_costs_this_process_memory(field: Field) -> None:
    assert field.growth < 50 << 20


def test_no_bomb_leaves_a_process(field: Field) -> None:
    """Nor a zombie."""
    assert field.left == 0
