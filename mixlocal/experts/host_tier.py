"""The experts in a bounded part of this computer's memory, and their way there from disk.

Bookkeeping is done by the one thread that runs the model. It may be interrupted between any two steps: what follows is
a `recover`, after which only slots that were filled count.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Iterable, Iterator

import torch

from mixlocal.errors import MixlocalError
from mixlocal.experts.policies import Policy
from mixlocal.experts.residency import NOWHERE, Residency
from mixlocal.experts.runtime import ExpertCounts, Routing
from mixlocal.experts.slots import BoundSlots
from mixlocal.experts.transfer import QUEUE_DEPTH, ExpertReader, Read, Urgency
from mixlocal.kernels import Expert, Kernels
from mixlocal.store.expert_file import ExpertFile

FIRST = torch.zeros(1, dtype=torch.int64)
# The tokens that chose an expert, int64 [N], and what it adds to each of them, float32 [N, D].
Part = tuple[torch.Tensor, torch.Tensor]


class HostTier:
    """`memory` holds records side by side, in slots for the largest; `kernels` compute where they lie."""

    def __init__(
        self, file: ExpertFile, kernels: Kernels, memory: torch.Tensor, policy: Policy, counts: ExpertCounts
    ) -> None:
        """memory: uint8 [n * stride], n at least the experts of a layer, on whole pages."""
        manifest = file.manifest
        self.n_layers, self.n_experts, self._layouts = manifest.n_layers, manifest.n_experts, manifest.layouts
        self.slots = list(memory.view(-1, manifest.stride))
        self.most_prefetches = min(QUEUE_DEPTH, len(self.slots) - self.n_experts)
        self.residency = Residency(self.n_layers, self.n_experts, len(self.slots), policy)
        self._kernels, self._counts = kernels, counts
        self._bound = BoundSlots(self._layouts, self.slots, kernels.bind_expert)
        self._reader = ExpertReader(file)
        weakref.finalize(self, self._reader.close)  # who forgets to close leaves no threads behind
        self._preloads: dict[int, Read] = {}  # reads that nobody waits for, by key
        self._prefetches: dict[int, Read] = {}
        self._unchecked: list[Read] = []  # in use before their checksums were compared

    def preload(self, hottest: Iterable[int]) -> None:
        """Fill the slots but those that one layer and its reads ahead need, the most used experts first."""
        for key in hottest:
            if self.residency.free <= self.n_experts + self.most_prefetches:
                return
            read = self._start(key, (), Urgency.PRELOAD)
            assert read is not None
            self._preloads[key] = read

    def fetch(self, keys: list[int]) -> Iterator[int]:
        """Read `keys`, none of which is here; yields each as it comes."""
        reads = [self._start(key, keys, Urgency.DEMAND) for key in keys]
        yield from self.arrivals([read for read in reads if read is not None])

    def demand(self, keys: list[int]) -> list[Read]:
        """Begin, or go on with, the reads of all of `keys` that are not here."""
        self.settle(keys)
        reads = []
        for key in keys:
            if self.residency.find(key) != NOWHERE:
                self._counts.ram_hits += 1
                continue
            self._counts.disk_hits += 1
            read = self._prefetches.pop(key, None) or self._preloads.pop(key, None)
            if read is not None:
                self._reader.hurry(read)
            else:
                read = self._start(key, keys, Urgency.DEMAND)
                assert read is not None, "fewer slots than experts in use"
            reads.append(read)
        return reads

    def look_ahead(self, guessed: list[int], keep: Collection[int]) -> None:
        """Read what is thought to be needed next, likeliest first, as far as what is in use leaves slots."""
        keep = {*guessed, *keep}
        for key in guessed:
            if self.residency.slot(key) != NOWHERE:
                continue
            if len(self._prefetches) >= self.most_prefetches:
                return
            read = self._start(key, keep, Urgency.PREFETCH)
            if read is None:
                return
            self._counts.prefetches += 1
            self._prefetches[key] = read

    def arrivals(self, reads: list[Read]) -> Iterator[int]:
        """The keys of `reads` as they come, to be computed with while they are checked: see `confirm`.

        Raises what a read failed with.
        """
        while reads:
            start = time.perf_counter()
            arrived = self._reader.wait(reads)
            self._counts.stall_s += time.perf_counter() - start
            reads = [read for read in reads if read not in arrived]
            for read in arrived:
                if read.done and not read.loaded:
                    raise _failure(read)
                self._unchecked.append(read)
                self._took(read)
                yield read.key

    def confirm(self) -> None:
        """All that arrived was what the store promised; no token may leave before. Raises `CorruptError`."""
        if self._unchecked:
            self._reader.wait_done(self._unchecked)
            bad = next((read for read in self._unchecked if not read.loaded), None)
            if bad is not None:
                raise _failure(bad)
            self._unchecked.clear()

    def layer(self, x: torch.Tensor, routing: Routing, keys: list[int]) -> torch.Tensor:
        """The whole layer, all of whose chosen `keys` are here."""
        experts = {key % self.n_experts: self._bound.of(self.residency.find(key), key) for key in keys}
        return self._kernels.moe_ffn(x, routing.experts, routing.weights, experts)

    def part(self, key: int, x: torch.Tensor, routing: Routing) -> Part:
        """What one expert that is here adds."""
        return expert_part(
            self._kernels, key % self.n_experts, self._bound.of(self.residency.find(key), key), x, routing
        )

    def settle(self, keys: Collection[int]) -> None:
        """Take over what was read ahead of `keys`, which are chosen now; wrong guesses that have not begun end."""
        for key, read in list(self._prefetches.items()):
            if key in keys:
                self._counts.prefetches_used += 1
            if read.done or (key not in keys and self._reader.cancel(read)):
                self._finish(self._prefetches.pop(key))
        for key, read in list(self._preloads.items()):
            if read.done:
                self._finish(self._preloads.pop(key))

    def recover(self) -> None:
        """However it ended: no read goes on, and no slot is taken for full that a read did not fill."""
        self._reader.drain()
        for read in self._unchecked:
            if not read.loaded and self.residency.find(read.key) != NOWHERE:
                self.residency.release(read.key)
        self._unchecked.clear()
        self._preloads.clear()
        self._prefetches.clear()
        self.residency.repair()

    def close(self) -> None:
        self._reader.close()

    def _start(self, key: int, keep: Collection[int], urgency: Urgency) -> Read | None:
        """None if every slot is in use."""
        if not self.residency.free:
            self._give_up_preload()
        in_check = [read for read in self._unchecked if not read.done]  # what is compared must not be overwritten
        slot = self.residency.place(key, {*keep, *(read.key for read in in_check)})
        if slot == NOWHERE and in_check and urgency is Urgency.DEMAND:
            self._reader.wait_done(in_check)
            slot = self.residency.place(key, keep)
        return None if slot == NOWHERE else self._reader.start(Read(key, self.slots[slot], urgency))

    def _finish(self, read: Read) -> None:
        """Its slot may be found, or is free. An error comes again when its expert is asked for."""
        if read.loaded:
            self._took(read)
        else:
            self.residency.release(read.key)

    def _took(self, read: Read) -> None:
        self._counts.reads += 1
        self._counts.bytes_read += self._layouts.stride(read.key)
        self.residency.fill(read.key)

    def _give_up_preload(self) -> None:
        """Free the slot of the least used expert whose preload has not begun."""
        for key, read in reversed(self._preloads.items()):
            if self._reader.cancel(read):
                del self._preloads[key]
                self._finish(read)
                return


def _failure(read: Read) -> MixlocalError:
    assert read.error is not None, "a reader thread died"
    return read.error


def expert_part(kernels: Kernels, expert: int, bound: Expert, x: torch.Tensor, routing: Routing) -> Part:
    """Of one expert of the layer: the same bits as its summand in `Kernels.moe_ffn`."""
    if x.shape[0] == 1:  # decoding: no indexing
        rank = routing.experts[0].tolist().index(expert)
        own = slice(rank, rank + 1)
        return FIRST, kernels.moe_ffn(x, routing.experts[:, own], routing.weights[:, own], {expert: bound})
    tokens, ranks = (routing.experts == expert).nonzero(as_tuple=True)
    ids = torch.full((len(tokens), 1), expert, device=x.device)
    weights = routing.weights[tokens, ranks].unsqueeze(1)
    return tokens, kernels.moe_ffn(x[tokens], ids, weights, {expert: bound})


def add_up(x: torch.Tensor, parts: dict[int, Part]) -> torch.Tensor:
    """In the order of keys, whatever order they came in: the bits of one `Kernels.moe_ffn`."""
    out = torch.zeros_like(x)
    for key in sorted(parts):
        tokens, part = parts[key]
        if x.shape[0] == 1:
            out += part
        else:
            out.index_add_(0, tokens, part)
    return out
