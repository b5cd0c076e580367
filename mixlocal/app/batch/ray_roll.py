"""Which workers may go on: they agree about the model, and they do not die of whatever they are asked."""

from __future__ import annotations

from mixlocal.app.batch.ray_crew import Crew, Hand
from mixlocal.app.batch.ray_worker import Facts, Trouble
from mixlocal.errors import MemoryBudgetError, MixlocalError, RefusedError

DEATHS_PER_SLOT = 8  # in a row, nothing answered between; a single request can be the reason of five
GIVEN_UP_IN_A_ROW = 5  # requests, nothing answered between; it is hardly the requests then


class Roll:
    """facts: those of the first worker, which all others must share."""

    def __init__(self, crew: Crew, *, local: bool, strict: bool) -> None:
        """strict: the user wants so many workers and no fewer."""
        self._crew, self._local, self._strict = crew, local, strict
        self.facts: Facts | None = None
        self._deaths = self._given_up = 0

    def admit(self, facts: Facts) -> None:
        """Raises `RefusedError` naming what is not as it is with the first worker."""
        first = self.facts = self.facts or facts
        if difference := _difference(first, facts):
            name, one, other = difference
            raise RefusedError(
                f"two workers do not have the same model: {name} is {one} on {first.host} and {other} on {facts.host}",
                "all nodes need the same mixlocal and the same model",
            )

    def refuse(self, hand: Hand, trouble: Trouble) -> str:
        """A node without the memory is left out, unless it is needed; returns what to tell. Any other error is raised,
        with the node it comes from."""
        error = trouble.error
        spare = isinstance(error, MemoryBudgetError) and hand.facts is None and len(self._crew.slots) > 1
        if spare and not self._strict:
            self._crew.give_up(hand)
            return f"{trouble.host} does not take part: {error.message}"
        raise error if self._local else type(error)(f"{trouble.host}: {error.message}", error.hint)

    def answered(self) -> None:
        self._deaths = self._given_up = 0

    def gave_up(self) -> None:
        """A request that its workers died of. Raises `MixlocalError` if that is true of all."""
        self._deaths, self._given_up = 0, self._given_up + 1
        if self._given_up >= GIVEN_UP_IN_A_ROW:
            raise _hopeless(f"workers died of {self._given_up} requests one after another")

    def died(self, why: str) -> str:
        """What to tell. Raises `MixlocalError` if workers do nothing but die."""
        self._deaths += 1
        if self._deaths >= DEATHS_PER_SLOT * len(self._crew.slots):
            raise _hopeless(f"workers died {self._deaths} times and answered nothing between: {why}")
        return f"a worker died and is replaced: {why}"


def _difference(one: Facts, other: Facts) -> tuple[str, object, object] | None:
    pairs: list[tuple[str, object, object]] = [("mixlocal's version", one.version, other.version)]
    names = dict.fromkeys([*one.identity, *other.identity])
    pairs += [(name, one.identity.get(name, "nothing"), other.identity.get(name, "nothing")) for name in names]
    pairs += [("default sampling", one.defaults, other.defaults)]
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def _hopeless(what: str) -> MixlocalError:
    return MixlocalError(what, "--engine local shows what they die of")
