"""A batch answered by workers on a Ray cluster: each owns the whole model and answers several requests at once.

Only the driver knows what was answered: workers keep nothing, and one that dies costs the answers it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial

from mixlocal.app.batch.engine import BatchEngine, Pulse, Reply, Request
from mixlocal.app.batch.ray_cluster import Cluster
from mixlocal.app.batch.ray_crew import Crew
from mixlocal.app.batch.ray_desk import capacity
from mixlocal.app.batch.ray_local import absolute, divided, local_engine
from mixlocal.app.batch.ray_places import Slot, places
from mixlocal.app.batch.ray_roll import Roll
from mixlocal.app.batch.ray_round import POLL_SECONDS, Round
from mixlocal.app.batch.ray_worker import Facts, Trouble
from mixlocal.app.budgets import RunOptions
from mixlocal.engine.params import SamplingParams
from mixlocal.store.paths import Home

PATIENCE_SECONDS = 60.0


class RayEngine:
    """A `BatchEngine`. To be made on a thread that lives as long as it, as Ray's processes do too."""

    def __init__(
        self,
        model: str,
        options: RunOptions,
        folders: Home,
        address: str | None = None,
        workers: int | None = None,
        concurrency: int | None = None,
        *,
        make_engine: Callable[[], BatchEngine] | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        """address: a Ray cluster's; None starts one here. workers: None for one to a GPU, or to a node if there is
        none. concurrency: of each worker; None leaves it to that. make_engine: what a worker has instead of the model.
        patience: seconds after which an idle worker does, at the end, what another has not answered.

        Raises `UsageError` if Ray is not installed or the cluster does not have what is asked for, `NetworkError` if
        it does not answer.
        """
        self._patience = patience
        self._cluster = Cluster(address, gpus=options.device != "cpu")
        try:
            slots = places(self._cluster.nodes(), options.device, workers)
            shares = {} if make_engine else self._shares(slots, options)
            local = partial(local_engine, absolute(model), folders, concurrency)
            self._crew = Crew(self._cluster, slots, lambda slot: make_engine or partial(local, shares[slot]))
            self._roll = Roll(self._crew, local=address is None, strict=workers is not None)
            self._crew.fill()
        except BaseException:
            self._cluster.close()
            raise

    @property
    def identity(self) -> Mapping[str, str]:
        """As the workers have it. Waits for the first of them; raises what keeps it from its model."""
        return self._first().identity

    @property
    def defaults(self) -> SamplingParams:
        return self._first().defaults

    @property
    def concurrency(self) -> int:
        """Of all workers, with those that are still to come and the requests that wait for a place in one."""
        return capacity(self._first().concurrency) * len(self._crew.slots)

    def answer(self, requests: Iterator[Request]) -> Generator[Reply | Pulse, None, None]:
        """See `BatchEngine`. Raises also `MixlocalError` if workers die of whatever they are asked, `RefusedError` if
        they do not have the same model."""
        try:
            yield from Round(self._crew, self._roll, requests, self._patience).events()
        finally:
            self._crew.dismiss_busy()

    def close(self) -> None:
        self._crew.close()
        self._cluster.close()

    def _first(self) -> Facts:
        while self._roll.facts is None:
            self._crew.fill()
            for event in self._crew.listen(POLL_SECONDS):
                match event.what:
                    case Facts() as facts:
                        self._roll.admit(facts)
                    case Trouble() as trouble:
                        self._roll.refuse(event.hand, trouble)
                    case Exception() as why:
                        self._roll.died(str(why))
        return self._roll.facts

    def _shares(self, slots: Sequence[Slot], options: RunOptions) -> dict[Slot, RunOptions]:
        """Options by slot. Looks at the machines before any worker has taken its memory."""
        crowded = {slot.node for slot in slots if slot.share > 1}
        machines = {node: self._cluster.machine(node) for node in crowded}
        shared = {slot: divided(options, slot.share, machines[slot.node]) for slot in slots if slot.node in crowded}
        return dict.fromkeys(slots, options) | shared
