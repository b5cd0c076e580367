"""Which matrices of which experts get 8 bits, so that a store fits a number of bytes: those that lose most by 4."""

from __future__ import annotations

from math import ceil

import torch

from mixlocal.app.blueprint import Blueprint
from mixlocal.errors import RefusedError
from mixlocal.model.tensors import EXPERT_PARTS
from mixlocal.quant.format import WIDE_BITS, ExpertLayout


def room_to_widen(blueprint: Blueprint, beside: int, budget: int) -> int:
    """Bytes that a store of `budget` bytes leaves where everything is in 4 bits. beside: of its other files.

    Raises `RefusedError` if it leaves none.
    """
    needed = blueprint.store_bytes + beside
    if needed > budget:
        raise RefusedError(
            f"--fit {budget / 1e6:.1f}M: at 4 bits everything takes {ceil(needed / 1e5) / 10:.1f}M", "give it more"
        )
    return budget - needed


def widen(blueprint: Blueprint, damage: torch.Tensor, room: int) -> tuple[int, ...]:
    """damage [L, E, 3], see `Calibration`; room: bytes beyond those of 4 bits -> `Recipe.wide`.

    Greedy by damage per byte, which is optimal but for the last few: the matrices are all about as large. What 8 bits
    lose is left out: it is some 200 times less.
    """
    strides = _strides(blueprint)
    wide = [0] * damage[..., 0].numel()
    for index in damage.flatten().argsort(descending=True, stable=True).tolist():
        record, part = divmod(index, len(EXPERT_PARTS))
        wider = wide[record] | WIDE_BITS[EXPERT_PARTS[part]]
        more = strides[wider] - strides[wide[record]]
        if more <= room:
            wide[record], room = wider, room - more
    return tuple(wide)


def _strides(blueprint: Blueprint) -> dict[int, int]:
    """Bytes of a record by which of its matrices are wide."""
    config, spec = blueprint.config, blueprint.recipe.expert_spec
    return {mask: ExpertLayout(config.dim, config.expert_hidden, spec, mask).stride for mask in range(8)}
