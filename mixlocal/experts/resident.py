"""Every expert in memory: the simplest runtime, and the one others are compared with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

from mixlocal.experts.runtime import ExpertCounts, Guess, Routing
from mixlocal.experts.trace import RoutingTrace
from mixlocal.experts.transfer import QUEUE_DEPTH
from mixlocal.kernels import Expert, Kernels
from mixlocal.quant.packing import read_record
from mixlocal.store.expert_file import ExpertFile
from mixlocal.store.memory import page_memory


class ResidentExperts:
    """Reads and checks all records of a store at once; `layers[layer][expert]` lie in one buffer."""

    def __init__(self, file: ExpertFile, kernels: Kernels) -> None:
        manifest = file.manifest
        layouts, per_layer = manifest.layouts, manifest.n_experts
        self._kernels = kernels
        self.counts = ExpertCounts()
        self.trace = RoutingTrace(manifest.n_layers, per_layer)
        buffer = page_memory(layouts.nbytes)
        records = [buffer[start:end] for start, end in pairwise(layouts.offsets)]
        with ThreadPoolExecutor(QUEUE_DEPTH) as pool:
            list(pool.map(lambda i: file.read(i // per_layer, i % per_layer, records[i]), range(len(records))))
        experts = [kernels.bind_expert(read_record(layouts[i], record)) for i, record in enumerate(records)]
        self.layers: list[dict[int, Expert]] = [
            dict(enumerate(experts[first : first + per_layer])) for first in range(0, len(experts), per_layer)
        ]

    def apply(self, layer: int, x: torch.Tensor, routing: Routing, guess: Guess | None = None) -> torch.Tensor:
        """See `ExpertRuntime.apply`."""
        chosen = routing.experts.flatten().tolist()
        self.counts.ram_hits += len(set(chosen))
        self.trace.add(layer, chosen, len(x))
        return self._kernels.moe_ffn(x, routing.experts, routing.weights, self.layers[layer])

    def close(self) -> None:
        """See `ExpertRuntime.close`."""
