"""A GPU that is none: its own byte budget, copies that come late, and poison where nothing may be read.

It computes with this machine's own kernels, so that results can be compared bit for bit.
"""

from __future__ import annotations

import time

import torch

from mixlocal.errors import MemoryBudgetError
from mixlocal.kernels import Expert, Kernels, select
from mixlocal.quant.format import ExpertWeights, QuantSpec, QuantTensor
from mixlocal.store.memory import page_memory

POISON = 0xFF  # as a 16-bit float a NaN, so one wrong byte of scales spoils a token


class SimulatedDevice:
    """budget: bytes.  seconds_per_copy: until a copy has arrived, whoever waits for it.  as_host: with its bits."""

    def __init__(self, budget: int, seconds_per_copy: float = 0.0, *, as_host: bool = True) -> None:
        self._kernels: Kernels = select("cpu")
        self._budget, self._seconds, self._as_host = budget, seconds_per_copy, as_host
        self._under_way: list[SimulatedCopy] = []
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.copies = 0

    def computes_as(self, kernels: Kernels, spec: QuantSpec) -> bool:
        return self._as_host

    def bind(self, weights: ExpertWeights) -> Expert:
        assert isinstance(weights.w1, QuantTensor)
        self._check(weights.w1.codes, mine=True)
        return self._kernels.bind_expert(weights)

    def expert(self, x: torch.Tensor, expert: Expert) -> torch.Tensor:
        ids = torch.zeros(len(x), 1, dtype=torch.int64)
        return self._kernels.moe_ffn(x, ids, torch.ones(len(x), 1), {0: expert})

    def memory(self, nbytes: int) -> torch.Tensor:
        self._budget -= nbytes
        if self._budget < 0:
            raise MemoryBudgetError("the GPU does not give that")
        self._memory = page_memory(nbytes).fill_(POISON)
        return self._memory

    def host_memory(self, nbytes: int) -> torch.Tensor:
        return page_memory(nbytes)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> SimulatedCopy:
        """What was in the slot is gone at once, and what comes is there when it was waited for."""
        self._check(source, mine=False)
        self._check(target, mine=True)
        target.fill_(POISON)
        self.copies += 1
        copy = SimulatedCopy(source, target, time.perf_counter() + self._seconds)
        self._under_way.append(copy)
        return copy

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def synchronize(self) -> None:
        for copy in self._under_way:
            copy.finish()
        self._under_way.clear()

    def poison(self, slot: torch.Tensor) -> None:
        """Nobody may read this any more."""
        self._check(slot, mine=True)
        slot.fill_(POISON)

    def _check(self, tensor: torch.Tensor, *, mine: bool) -> None:
        first = self._memory.data_ptr()
        assert (first <= tensor.data_ptr() < first + max(1, len(self._memory))) == mine


class SimulatedCopy:
    def __init__(self, source: torch.Tensor, target: torch.Tensor, arrives: float) -> None:
        self._source: torch.Tensor | None = source
        self._target, self._arrives = target, arrives

    def await_on_device(self) -> None:
        self.finish()

    def finish(self) -> None:
        if self._source is not None:
            time.sleep(max(0.0, self._arrives - time.perf_counter()))
            self._target.copy_(self._source)
            self._source = None
