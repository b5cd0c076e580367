"""Slots for records, and the experts that kernels make of what lies in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mixlocal.kernels import Expert
from mixlocal.quant.format import ExpertLayouts, ExpertWeights
from mixlocal.quant.packing import read_record


class BoundSlots:
    """Binding is slow beside a product, so a slot's memory is bound once for each layout that a record in it may have:
    beforehand where all records have the same."""

    def __init__(
        self, layouts: ExpertLayouts, slots: Sequence[torch.Tensor], bind: Callable[[ExpertWeights], Expert]
    ) -> None:
        self._layouts, self._slots, self._bind = layouts, slots, bind
        self._bound: list[dict[int, Expert]] = [{} for _ in slots]
        if len(layouts.formats) == 1:
            for slot in range(len(slots)):
                self.of(slot, 0)

    def of(self, slot: int, key: int) -> Expert:
        """Record `key`, which lies in `slot`."""
        layout, bound = self._layouts[key], self._bound[slot]
        expert = bound.get(layout.wide)
        if expert is None:
            expert = bound[layout.wide] = self._bind(read_record(layout, self._slots[slot]))
        return expert
