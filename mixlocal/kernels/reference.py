"""The kernels in plain PyTorch, on any device: the specification of all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch.nn.functional import pad, silu

from mixlocal.errors import RefusedError
from mixlocal.quant.format import BLOCK_SIZE, CODEBOOKS, ExpertWeights, QuantTensor, Weight
from mixlocal.quant.quantize import dequantize_rows, row_chunks

Linear = Callable[[torch.Tensor, Weight], torch.Tensor]


class ReferenceKernels:
    """Every weight is dequantized, a few rows at a time, and multiplied as float32."""

    @property
    def name(self) -> str:
        return "reference"

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See `Kernels.linear`."""
        check_linear(x, weight)
        rows = weight.shape[0]
        out = torch.empty(len(x), rows, device=x.device)
        for part, exact in _exact_rows(weight):
            out[:, part] = x @ exact.T
        return out

    def moe_ffn(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        experts: Mapping[int, ExpertWeights],
    ) -> torch.Tensor:
        """See `Kernels.moe_ffn`."""
        return grouped_moe_ffn(self.linear, x, expert_ids, weights, experts)


def grouped_moe_ffn(
    linear: Linear,
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    experts: Mapping[int, ExpertWeights],
) -> torch.Tensor:
    """`Kernels.moe_ffn` over any `linear`; experts add up in the order of their ids, whatever else is in the batch."""
    check_routing(x, expert_ids, weights, experts)
    out = torch.zeros_like(x)
    flat_weights = weights.reshape(-1, 1)
    for expert_id, picks in _picks_by_expert(expert_ids):
        tokens = picks // expert_ids.shape[1]
        expert = experts[expert_id]
        chosen = x[tokens]
        hidden = silu(linear(chosen, expert.w1)) * linear(chosen, expert.w3)
        out.index_add_(0, tokens, linear(hidden, expert.w2) * flat_weights[picks])
    return out


def check_linear(x: torch.Tensor, weight: Weight) -> None:
    """Raise `RefusedError` unless x is float32 [T, C] and `weight` holds a [R, C] matrix in its format's types."""
    shape = tuple(weight.shape)
    if x.dtype != torch.float32 or x.ndim != 2:
        raise RefusedError(f"linear takes float32 activations [T, C], not {x.dtype} {list(x.shape)}")
    if len(shape) != 2 or x.shape[1] != shape[1]:
        raise RefusedError(f"activations {list(x.shape)} do not fit a weight {list(shape)}")
    if isinstance(weight, QuantTensor):
        check_quantized(weight)
    elif weight.dtype not in (torch.bfloat16, torch.float32):
        raise RefusedError(f"a plain weight is bfloat16 or float32, not {weight.dtype}")


def check_routing(
    x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, experts: Mapping[int, ExpertWeights]
) -> None:
    """Raise `RefusedError` unless ids int64 [T, K] and weights float32 [T, K] go with x and all experts are there."""
    if expert_ids.dtype != torch.int64 or expert_ids.ndim != 2 or len(expert_ids) != len(x):
        raise RefusedError(f"expert ids must be int64 [{len(x)}, K], not {expert_ids.dtype} {list(expert_ids.shape)}")
    if weights.dtype != torch.float32 or weights.shape != expert_ids.shape:
        expected = f"float32 {list(expert_ids.shape)}"
        raise RefusedError(f"expert weights must be {expected}, not {weights.dtype} {list(weights.shape)}")
    missing = sorted(set(expert_ids.flatten().tolist()) - set(experts))
    if missing:
        raise RefusedError(f"tokens are routed to experts {missing}, which are not at hand")


def check_quantized(weight: QuantTensor) -> None:
    """Raise `RefusedError` unless codes and scales have the shapes and types of `weight.spec`."""
    spec, (rows, columns) = weight.spec, weight.shape
    if spec.kind == "bf16":
        raise RefusedError("a bf16 weight is a plain tensor, not codes and scales")
    spec.check_shape("linear", weight.shape)
    expected = {
        "codes": (torch.uint8 if spec.four_bit else torch.int8, (rows, columns // 2 if spec.four_bit else columns)),
        "scales": (spec.scale_dtype, spec.scales_shape(weight.shape)),
    }
    for part, (dtype, shape) in expected.items():
        tensor: torch.Tensor = getattr(weight, part)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise RefusedError(f"{spec.kind} {part} must be {dtype} {list(shape)}, not {found}")


def _exact_rows(weight: Weight) -> Iterator[tuple[slice, torch.Tensor]]:
    """A weight as float32, some rows at a time."""
    if isinstance(weight, torch.Tensor) and weight.dtype == torch.float32:
        yield slice(0, len(weight)), weight
    elif isinstance(weight, QuantTensor) and weight.spec.four_bit:
        pairs = _pair_table(weight)
        for part in row_chunks(*weight.shape):
            yield part, _four_bit_rows(weight, pairs, part)
    else:
        for part in row_chunks(*weight.shape):
            yield part, dequantize_rows(weight, part)


def _pair_table(weight: QuantTensor) -> torch.Tensor:
    """float32 [256, 2]: the two levels that each packed byte stands for."""
    levels = torch.tensor(CODEBOOKS[weight.spec.kind], device=weight.codes.device)
    return torch.cartesian_prod(levels, levels)


def _four_bit_rows(weight: QuantTensor, pairs: torch.Tensor, part: slice) -> torch.Tensor:
    """`dequantize_rows` for 4 bits, the same bits at half the look-ups."""
    columns = weight.shape[1]
    levels = pairs[weight.codes[part].int()].flatten(1)
    scales = weight.scales[part].float()
    if columns % BLOCK_SIZE == 0:
        return (levels.view(len(scales), -1, BLOCK_SIZE) * scales.unsqueeze(-1)).view(len(scales), columns)
    padded = pad(levels, (0, -columns % BLOCK_SIZE)).view(len(scales), -1, BLOCK_SIZE)
    return (padded * scales.unsqueeze(-1)).flatten(1)[:, :columns]


def _picks_by_expert(expert_ids: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Each distinct id in ascending order, with the places t * K + k that chose it."""
    flat = expert_ids.flatten()
    for expert_id in sorted(set(flat.tolist())):
        yield expert_id, (flat == expert_id).nonzero().flatten()
