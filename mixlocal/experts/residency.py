"""Which expert lies in which slot of one tier. Pure bookkeeping on numbers: no tensor and no file.

An expert's key is layer * n_experts + expert. One pool of slots serves all layers.

    slot = residency.place(key, keep)  # its own now, and nobody's to read: something is being written there
    residency.fill(key)                # it may be found, and evicted
    residency.release(key)             # forgotten
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from mixlocal.experts.policies import Policy

NOWHERE = -1


class Residency:
    """When no slot is free, `policy`'s farthest filled expert goes. With `floor` no layer is robbed of its last slot
    while another has more. Finding is one read of an array.
    """

    def __init__(self, n_layers: int, n_experts: int, n_slots: int, policy: Policy, *, floor: bool = True) -> None:
        self._n_layers, self._n_experts, self._policy, self._floor = n_layers, n_experts, policy, floor
        self._key_in = np.full(n_slots, NOWHERE, dtype=np.int64)
        self._filled = np.zeros(n_slots, dtype=bool)
        self._barred = np.full(n_slots, -np.inf)  # 0 where filled: added to a distance, so that no other slot is taken
        self._slot_of: list[int] = []  # by key, as what follows; plain lists, for they are asked one by one
        self._found: list[int] = []  # the same, of filled slots only
        self._held: list[int] = []  # slots that each layer has
        self._free: list[int] = []
        self.repair()

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def find(self, key: int) -> int:
        """The slot that holds `key`, or NOWHERE."""
        return self._found[key]

    def slot(self, key: int) -> int:
        """The slot that is `key`'s, filled or not, or NOWHERE."""
        return self._slot_of[key]

    def place(self, key: int, keep: Collection[int]) -> int:
        """A slot for `key`, which has none: a free one, or that of an expert that goes and is not in `keep`.

        NOWHERE if every slot is being written to or in `keep`.
        """
        slot = self._free.pop() if self._free else self._evict(keep)
        if slot == NOWHERE:
            return NOWHERE
        self._key_in[slot] = key
        self._slot_of[key] = slot
        self._held[key // self._n_experts] += 1
        return slot

    def fill(self, key: int) -> None:
        """What was written into `key`'s slot is `key`."""
        slot = self._slot_of[key]
        self._filled[slot], self._barred[slot] = True, 0.0
        self._found[key] = slot

    def release(self, key: int) -> None:
        """Forget `key`, whose slot holds nothing that may be used."""
        slot = self.slot(key)
        self._forget(slot)
        self._free.append(slot)

    def held(self) -> list[int]:
        """All that may be found."""
        keys: list[int] = self._key_in[self._filled].tolist()
        return keys

    def farthest(self, handicapped: Collection[int], handicap: float) -> int:
        """The filled key that is thought to be needed last; those `handicapped` count as so many times farther."""
        distance = self._policy.distance(self._key_in)
        for key in handicapped:
            if self._slot_of[key] != NOWHERE:
                distance[self._slot_of[key]] *= handicap
        return int(self._key_in[(distance + self._barred).argmax()])

    def repair(self) -> None:
        """After an interrupt between any two steps of the above: only filled slots count, the others are free."""
        self._slot_of = [NOWHERE] * (self._n_layers * self._n_experts)
        self._held, self._free = [0] * self._n_layers, []
        for slot in reversed(range(len(self._key_in))):
            key = int(self._key_in[slot])
            if self._filled[slot] and key != NOWHERE and self._slot_of[key] == NOWHERE:
                self._slot_of[key] = slot
                self._held[key // self._n_experts] += 1
            else:
                self._filled[slot], self._key_in[slot] = False, NOWHERE
                self._free.append(slot)
        self._barred = np.where(self._filled, 0.0, -np.inf)
        self._found = self._slot_of.copy()

    def _evict(self, keep: Collection[int]) -> int:
        distance = self._policy.distance(self._key_in)
        if self._floor and min(self._held) <= 1:
            robbed = np.array(self._held)[self._key_in // self._n_experts] <= 1
            distance[robbed] = -1 - 1 / (2 + distance[robbed])  # behind all others, in their own order
        distance += self._barred
        for key in keep:
            if self._slot_of[key] != NOWHERE:
                distance[self._slot_of[key]] = -np.inf
        slot = int(distance.argmax())
        if not self._filled[slot] or int(self._key_in[slot]) in keep:
            return NOWHERE
        self._forget(slot)
        return slot

    def _forget(self, slot: int) -> None:
        key = int(self._key_in[slot])
        self._filled[slot], self._barred[slot] = False, -np.inf
        self._key_in[slot], self._slot_of[key], self._found[key] = NOWHERE, NOWHERE, NOWHERE
        self._held[key // self._n_experts] -= 1
