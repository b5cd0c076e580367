"""What operands must be, for every implementation of `Kernels`. Raises `RefusedError` saying what does not fit."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from mixlocal.errors import RefusedError
from mixlocal.kernels import AttentionShape, AttentionWeights, RouterWeights
from mixlocal.quant.format import ExpertWeights, QuantTensor, Weight


def check_linear(x: torch.Tensor, weight: Weight) -> None:
    """x is float32 [T, C] and `weight` holds a [R, C] matrix in its format's types."""
    check_activations(x, weight)
    check_weight(weight)


def check_activations(x: torch.Tensor, weight: Weight) -> None:
    """x is float32 [T, C] for a weight [R, C]."""
    if x.dtype != torch.float32 or x.ndim != 2:
        raise RefusedError(f"linear takes float32 activations [T, C], not {x.dtype} {list(x.shape)}")
    if len(weight.shape) != 2 or x.shape[1] != weight.shape[1]:
        raise RefusedError(f"activations {list(x.shape)} do not fit a weight {list(weight.shape)}")


def check_weight(weight: Weight) -> None:
    """A [R, C] matrix in the types of its format."""
    if len(weight.shape) != 2:
        raise RefusedError(f"a weight is a matrix, not {list(weight.shape)}")
    if isinstance(weight, QuantTensor):
        check_quantized(weight)
    elif weight.dtype not in (torch.bfloat16, torch.float32):
        raise RefusedError(f"a plain weight is bfloat16 or float32, not {weight.dtype}")


def check_quantized(weight: QuantTensor) -> None:
    """Raise `RefusedError` unless codes and scales have the shapes and types of `weight.spec`."""
    spec = weight.spec
    if spec.kind == "bf16":
        raise RefusedError("a bf16 weight is a plain tensor, not codes and scales")
    spec.check_shape("linear", weight.shape)
    expected = {
        "codes": (spec.code_dtype, spec.codes_shape(weight.shape)),
        "scales": (spec.scale_dtype, spec.scales_shape(weight.shape)),
    }
    for part, (dtype, shape) in expected.items():
        tensor: torch.Tensor = getattr(weight, part)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise RefusedError(f"{spec.kind} {part} must be {dtype} {list(shape)}, not {found}")


def check_expert(weights: ExpertWeights) -> None:
    """w1, w3 [H, D] and w2 [D, H], each in any quantized format, or all three plain."""
    for weight in (weights.w1, weights.w3, weights.w2):
        check_weight(weight)
    hidden, dim = weights.w1.shape
    if tuple(weights.w3.shape) != (hidden, dim) or tuple(weights.w2.shape) != (dim, hidden):
        shapes = [list(w.shape) for w in (weights.w1, weights.w3, weights.w2)]
        raise RefusedError(f"an expert's w1, w3, w2 do not go together: {shapes}")
    plain = [weight for weight in (weights.w1, weights.w3, weights.w2) if isinstance(weight, torch.Tensor)]
    if plain and (len(plain) < 3 or len({weight.dtype for weight in plain}) > 1):
        raise RefusedError("an expert's w1, w3, w2 are plain and quantized, or plain in several types")


def check_attention(weights: AttentionWeights, shape: AttentionShape) -> None:
    """q [H * d, D], k and v [KH * d, D], o [D, H * d] in one format, norm float32 [D]; KH divides H, d is even."""
    dim, queries = weights.o.shape[0], shape.n_heads * shape.head_dim
    keys = shape.n_kv_heads * shape.head_dim
    expected = {"q": (queries, dim), "k": (keys, dim), "v": (keys, dim), "o": (dim, queries), "norm": (dim,)}
    for name, wanted in expected.items():
        found = tuple(getattr(weights, name).shape)
        if found != wanted:
            raise RefusedError(f"attention: {name} must be {list(wanted)}, not {list(found)}")
    if shape.n_heads % shape.n_kv_heads or shape.head_dim % 2 or weights.norm.dtype != torch.float32:
        raise RefusedError(f"attention: no kernels for {shape} with a norm of {weights.norm.dtype}")
    _check_one_format("attention's q, k, v, o", (weights.q, weights.k, weights.v, weights.o))


def check_head(norm: torch.Tensor, weight: Weight) -> None:
    """norm float32 [D], weight [V, D]."""
    check_weight(weight)
    if norm.shape != (weight.shape[1],) or norm.dtype != torch.float32:
        raise RefusedError(f"a norm {norm.dtype} {list(norm.shape)} does not go with a head {list(weight.shape)}")


def check_router(weights: RouterWeights) -> None:
    """norm float32 [D], gate float32 [E, D], 1 <= top_k <= E."""
    check_weight(weights.gate)
    experts, dim = weights.gate.shape
    if weights.norm.shape != (dim,) or weights.norm.dtype != torch.float32 or weights.gate.dtype != torch.float32:
        raise RefusedError(f"a router's norm [D] and gate [E, D] are float32, not {weights.norm.dtype} "
                           f"{list(weights.norm.shape)} and {weights.gate.dtype} {[experts, dim]}")  # fmt: skip
    if not 1 <= weights.top_k <= experts:
        raise RefusedError(f"a router of {experts} experts cannot choose {weights.top_k}")


def check_routing(x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> None:
    """x float32 [T, D], ids int64 [T, K] and weights float32 [T, K]."""
    if x.dtype != torch.float32 or x.ndim != 2:
        raise RefusedError(f"experts take float32 activations [T, D], not {x.dtype} {list(x.shape)}")
    if expert_ids.dtype != torch.int64 or expert_ids.ndim != 2 or len(expert_ids) != len(x):
        raise RefusedError(f"expert ids must be int64 [{len(x)}, K], not {expert_ids.dtype} {list(expert_ids.shape)}")
    if weights.dtype != torch.float32 or weights.shape != expert_ids.shape:
        expected = f"float32 {list(expert_ids.shape)}"
        raise RefusedError(f"expert weights must be {expected}, not {weights.dtype} {list(weights.shape)}")


def missing_experts(ids: Iterable[int]) -> RefusedError:
    return RefusedError(f"tokens are routed to experts {sorted(ids)}, which are not at hand")


def _check_one_format(what: str, weights: Iterable[Weight]) -> None:
    formats = {w.spec if isinstance(w, QuantTensor) else w.dtype for w in weights}
    if len(formats) > 1:
        raise RefusedError(f"{what} are in {len(formats)} formats: {', '.join(map(str, formats))}")
