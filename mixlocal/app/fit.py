"""Which matrices of which experts get 8 bits, so that a store fits a number of bytes: those that lose most by 4."""

from __future__ import annotations

import torch

from mixlocal.app.blueprint import Blueprint
from mixlocal.errors import RefusedError
from mixlocal.model.tensors import EXPERT_PARTS
from mixlocal.quant.format import WIDE_BITS, ExpertLayout


def widen(blueprint: Blueprint, damage: torch.Tensor, budget: int) -> tuple[int, ...]:
    """damage [L, E, 3], see `Calibration`; budget: bytes of the store -> `Recipe.wide`.

    Greedy by damage per byte, which is optimal but for the last few: the matrices are all about as large. What 8 bits
    lose is left out: it is some 200 times less. Raises `RefusedError` for a budget that all in 4 bits exceed.
    """
    if blueprint.store_bytes > budget:
        raise RefusedError(
            f"--fit {budget / 1e9:.3f}G: at 4 bits everything takes {blueprint.store_bytes / 1e9:.3f}G", "give it more"
        )
    strides = _strides(blueprint)
    wide, left = [0] * damage[..., 0].numel(), budget - blueprint.store_bytes
    flat = damage.flatten()
    for index in flat.argsort(descending=True, stable=True).tolist():
        record, part = divmod(index, len(EXPERT_PARTS))
        wider = wide[record] | WIDE_BITS[EXPERT_PARTS[part]]
        more = strides[wider] - strides[wide[record]]
        if more <= left:
            wide[record], left = wider, left - more
    return tuple(wide)


def _strides(blueprint: Blueprint) -> dict[int, int]:
    """Bytes of a record by which of its matrices are wide."""
    config, spec = blueprint.config, blueprint.recipe.expert_spec
    return {mask: ExpertLayout(config.dim, config.expert_hidden, spec, mask).stride for mask in range(8)}
