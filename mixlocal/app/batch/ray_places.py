"""Who works where in a Ray cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mixlocal.errors import UsageError


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster. cpus, gpus: what Ray may hand out there."""

    id: str
    cpus: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one worker. share: how many there are on that node."""

    node: Node
    share: int
    gpu: bool

    @property
    def cpus(self) -> int:
        return self.node.cpus // self.share


def places(nodes: Sequence[Node], device: str, workers: int | None) -> list[Slot]:
    """Where workers go: one to a GPU if there are any and `device` does not forbid it, else one to a node. More than
    that share the nodes' cores and memory.

    Raises `UsageError` for a device or a number of workers that the cluster does not have.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: at least one must do the work")
    if device.startswith("cuda:"):
        raise UsageError(f"--device {device}: Ray hands out the GPUs", "use --device cuda")
    gpus = [] if device == "cpu" else [node for node in nodes for _ in range(node.gpus)]
    if device == "cuda" and not gpus:
        raise UsageError("--device cuda, and no node of the Ray cluster has a GPU", "use --device cpu")
    if gpus and (workers or 0) > len(gpus):
        raise UsageError(f"--workers {workers}, and the Ray cluster has {len(gpus)} GPUs", "with --device cpu more can")
    seats = gpus or [node for node in nodes if node.cpus] or list(nodes)
    chosen = [seats[n % len(seats)] for n in range(workers or len(seats))]
    share = Counter(node.id for node in chosen)
    return [Slot(node, share[node.id], bool(gpus)) for node in chosen]
