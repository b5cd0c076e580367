"""Which expert lies in which slot of memory. Pure bookkeeping on numbers: no tensor and no file.

An expert's key is layer * n_experts + expert. One pool of slots serves all layers.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

NOWHERE = -1


class Residency:
    """Aged frequency: the expert with the least uses / (age + 1) goes first (LFRU; age in applied layers since its last
    use). Uses are remembered of experts that are gone. No layer is robbed of its last slot while another has more.

    Looking up is one read of an array.
    """

    def __init__(self, n_layers: int, n_experts: int, n_slots: int) -> None:
        keys = n_layers * n_experts
        self._n_experts = n_experts
        self._slot_of = np.full(keys, NOWHERE, dtype=np.int64)
        self._key_in = np.full(n_slots, NOWHERE, dtype=np.int64)
        self._uses = np.zeros(keys)
        self._last = np.zeros(keys)
        self._held = np.zeros(n_layers, dtype=np.int64)  # slots that each layer has
        self._free = list(range(n_slots))[::-1]
        self._clock = 0

    def slot(self, key: int) -> int:
        """Where `key` lies, or NOWHERE."""
        return int(self._slot_of[key])

    def use(self, keys: Collection[int]) -> None:
        """These are used now, wherever they lie."""
        self._clock += 1
        for key in keys:
            self._uses[key] += 1
            self._last[key] = self._clock

    def assign(self, key: int, keep: Collection[int]) -> int:
        """A slot for `key`, which lies nowhere: a free one, or that of an expert that goes and is not in `keep`."""
        slot = self._free.pop() if self._free else self._evict(keep)
        self._slot_of[key], self._key_in[slot] = slot, key
        self._held[key // self._n_experts] += 1
        return slot

    def release(self, key: int) -> None:
        """Forget `key`, whose slot holds nothing that may be used."""
        slot = self.slot(key)
        self._slot_of[key], self._key_in[slot] = NOWHERE, NOWHERE
        self._held[key // self._n_experts] -= 1
        self._free.append(slot)

    def _evict(self, keep: Collection[int]) -> int:
        keys = self._key_in
        worth = self._uses[keys] / (self._clock - self._last[keys] + 1)
        worth = np.where(self._held[keys // self._n_experts] > 1, worth, worth + self._clock + 1)  # a layer's last slot
        worth[[slot for key in keep if (slot := self.slot(key)) != NOWHERE]] = np.inf
        slot = int(worth.argmin())
        assert worth[slot] < np.inf, "fewer slots than experts in use"
        gone = int(keys[slot])
        self._slot_of[gone] = NOWHERE
        self._held[gone // self._n_experts] -= 1
        return slot
