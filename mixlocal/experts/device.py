"""A processor with memory of its own, as the expert runtime sees it.

`CudaDevice` is a GPU. Tests put a simulated one in its place, with a byte budget, slow copies, and poison where nothing
may be read.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

from mixlocal.errors import MemoryBudgetError
from mixlocal.kernels import Expert, Kernels
from mixlocal.kernels.cuda import CudaKernels, check_device
from mixlocal.quant.format import ExpertWeights, QuantSpec
from mixlocal.store.memory import page_memory


class Copy(Protocol):
    """One record on its way to the device."""

    def await_on_device(self) -> None:
        """What is computed from now on waits until it is there; the caller does not."""

    def finish(self) -> None:
        """The caller waits: afterwards its source may be overwritten."""


class Device(Protocol):
    def computes_as(self, kernels: Kernels, spec: QuantSpec) -> bool:
        """Whether `expert` gives the bits of this computer's `kernels` for experts of that format."""

    def bind(self, weights: ExpertWeights) -> Expert:
        """An expert in a slot of `memory`, whose bytes are read at every use."""

    def expert(self, x: torch.Tensor, expert: Expert) -> torch.Tensor:
        """w2(silu(w1 x) * (w3 x)), float32 [N, D] -> [N, D], computed there; the caller does not wait."""

    def memory(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of the device. Raises `MemoryBudgetError`."""

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of this computer, on whole pages, from which copies run beside all else."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """Begin to copy a record of `host_memory` into a slot of `memory`, behind what still reads that slot."""

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        """A copy in the device's memory."""

    def synchronize(self) -> None:
        """The caller waits until nothing is being computed or copied."""


class CudaDevice:
    """One GPU: computing and copying run on two streams, events order them."""

    def __init__(self, name: str) -> None:
        """name: "cuda" or "cuda:N". Raises `UsageError` if there is none."""
        check_device(name)
        self._kernels = CudaKernels(name)
        self._device = torch.device(name)
        self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def computes_as(self, kernels: Kernels, spec: QuantSpec) -> bool:
        """See `Device.computes_as`."""
        return self._kernels.computes_as(kernels, spec)

    def bind(self, weights: ExpertWeights) -> Expert:
        """See `Device.bind`."""
        return self._kernels.bind_expert(weights)

    def expert(self, x: torch.Tensor, expert: Expert) -> torch.Tensor:
        """See `Device.expert`."""
        return self._kernels.expert(x, expert)

    def memory(self, nbytes: int) -> torch.Tensor:
        """See `Device.memory`."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError as error:
            raise _no_memory("the GPU", "--vram", nbytes) from error

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """See `Device.host_memory`: pinned as long as this device lives. PyTorch's own would take a power of two."""
        memory = page_memory(nbytes)
        runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(memory.data_ptr(), nbytes, 0)):
            raise _no_memory("the system", "--ram", nbytes)
        weakref.finalize(self, _unpin, memory)
        return memory

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """See `Device.copy`."""
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._copies)
        return _CudaCopy(event, self._device)

    def upload(self, x: torch.Tensor) -> torch.Tensor:
        """See `Device.upload`; the caller does not wait for what is being computed."""
        return x.to(self._device, non_blocking=True)

    def synchronize(self) -> None:
        """See `Device.synchronize`."""
        torch.cuda.synchronize(self._device)


class _CudaCopy:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def await_on_device(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def finish(self) -> None:
        self._event.synchronize()


def _unpin(memory: torch.Tensor) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(memory.data_ptr())


def _no_memory(what: str, option: str, nbytes: int) -> MemoryBudgetError:
    return MemoryBudgetError(
        f"{what} does not give {nbytes / 1e9:.2f} GB of memory", f"give a smaller {option}, or close other programs"
    )
