"""Experts in a bounded part of memory; the others are read from disk when they are chosen."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

from mixlocal.experts.residency import NOWHERE, Residency
from mixlocal.experts.runtime import ExpertCounts, Routing
from mixlocal.kernels import Expert, Kernels
from mixlocal.quant.packing import read_record
from mixlocal.store.expert_file import ExpertFile

READERS = 4  # reads at once
PAGE = 4096


class TieredExperts:
    """`n_slots` records in memory, allocated once. Reads of all that is missing start as soon as the router has chosen;
    what is here is computed meanwhile, then what arrives. Each distinct expert is read at most once per pass."""

    def __init__(self, file: ExpertFile, kernels: Kernels, n_slots: int) -> None:
        manifest = file.manifest
        assert manifest.n_experts <= n_slots
        self.counts = ExpertCounts()
        self._file, self._kernels, self._n_experts = file, kernels, manifest.n_experts
        self._residency = Residency(manifest.n_layers, manifest.n_experts, n_slots)
        memory = torch.empty(n_slots * manifest.stride + PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % PAGE
        self._slots = memory[start : start + n_slots * manifest.stride].view(n_slots, manifest.stride)
        self._bound: list[Expert] = [kernels.bind_expert(read_record(manifest.layout, slot)) for slot in self._slots]
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="experts")

    def apply(self, layer: int, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """See `ExpertRuntime.apply`."""
        first = layer * self._n_experts
        keys = [first + expert for expert in sorted(set(routing.experts.flatten().tolist()))]
        self._residency.use(keys)
        missing = [key for key in keys if self._residency.slot(key) == NOWHERE]
        self.counts.ram_hits += len(keys) - len(missing)
        if not missing:
            experts = {key - first: self._bound[self._residency.slot(key)] for key in keys}
            return self._kernels.moe_ffn(x, routing.experts, routing.weights, experts)
        reads = self._start_reads(layer, missing, keys)
        try:
            return self._compute(layer, x, routing, keys, reads)
        finally:
            self._settle(reads)

    def close(self) -> None:
        """See `ExpertRuntime.close`."""
        self._readers.shutdown(cancel_futures=True)
        self._file.close()

    def _start_reads(self, layer: int, missing: list[int], keep: list[int]) -> dict[Future[None], int]:
        reads = {}
        for key in missing:
            slot = self._slots[self._residency.assign(key, keep)]
            reads[self._readers.submit(self._file.read, layer, key - layer * self._n_experts, slot)] = key
        self.counts.disk_reads += len(missing)
        self.counts.bytes_read += len(missing) * self._file.manifest.stride
        return reads

    def _compute(
        self, layer: int, x: torch.Tensor, routing: Routing, keys: list[int], reads: dict[Future[None], int]
    ) -> torch.Tensor:
        """Every expert as soon as it is here; their parts add up in the order of ids: the bits of one `moe_ffn`."""
        parts = {key: self._part(layer, key, x, routing) for key in keys if key not in reads.values()}
        waiting = set(reads)
        while waiting:
            start = time.perf_counter()
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            self.counts.stall_s += time.perf_counter() - start
            for read in done:
                read.result()
                parts[reads[read]] = self._part(layer, reads[read], x, routing)
        out = torch.zeros_like(x)
        for key in keys:
            tokens, part = parts[key]
            out.index_add_(0, tokens, part)
        return out

    def _part(self, layer: int, key: int, x: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that chose an expert [N], and what it adds to each of them, [N, D]."""
        expert = key - layer * self._n_experts
        tokens, ranks = (routing.experts == expert).nonzero(as_tuple=True)
        ids = torch.full((len(tokens), 1), expert)
        weights = routing.weights[tokens, ranks].unsqueeze(1)
        bound = {expert: self._bound[self._residency.slot(key)]}
        return tokens, self._kernels.moe_ffn(x[tokens], ids, weights, bound)

    def _settle(self, reads: dict[Future[None], int]) -> None:
        """However it ended: no read goes on, and no slot is taken for full that a read did not fill."""
        wait(reads)
        for read, key in reads.items():
            if read.cancelled() or read.exception() is not None:
                self._residency.release(key)
