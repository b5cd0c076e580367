"""Every expert in memory: the simplest runtime, and the one others are compared with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from mixlocal.experts.runtime import ExpertCounts, Routing
from mixlocal.kernels import Expert, Kernels
from mixlocal.quant.packing import read_record
from mixlocal.store.expert_file import ExpertFile

READERS = 2


class ResidentExperts:
    """Reads and checks all records of a store at once; `layers[layer][expert]` lie in one buffer."""

    def __init__(self, file: ExpertFile, kernels: Kernels) -> None:
        manifest = file.manifest
        layout, per_layer = manifest.layout, manifest.n_experts
        self._kernels = kernels
        self.counts = ExpertCounts()
        buffer = torch.empty((len(manifest.records), manifest.stride), dtype=torch.uint8)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda i: file.read(i // per_layer, i % per_layer, buffer[i]), range(len(buffer))))
        experts = [kernels.bind_expert(read_record(layout, record)) for record in buffer]
        self.layers: list[dict[int, Expert]] = [
            dict(enumerate(experts[first : first + per_layer])) for first in range(0, len(experts), per_layer)
        ]

    def apply(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """See `ExpertRuntime.apply`."""
        self.counts.ram_hits += len(set(routing.experts.flatten().tolist()))
        return self._kernels.moe_ffn(x, routing.experts, routing.weights, self.layers[layer])

    def close(self) -> None:
        """See `ExpertRuntime.close`."""
