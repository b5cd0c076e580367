"""What does not fit is refused before anything is computed, by every implementation alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mixlocal.errors import RefusedError
from mixlocal.kernels import AttentionShape, AttentionWeights, Kernels, RouterWeights
from mixlocal.kernels.cpu import CpuKernels
from mixlocal.kernels.isa import native_isas
from mixlocal.kernels.operands import MAX_COLUMNS
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.quant.format import ExpertWeights, QuantSpec, QuantTensor, Weight
from mixlocal.quant.quantize import empty, quantize

SHAPE = AttentionShape(4, 2, 16, 1e-5, None)


@pytest.fixture(params=["reference", *native_isas()[:1]])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return ReferenceKernels() if request.param == "reference" else CpuKernels(request.param)


def nf4(rows: int, columns: int) -> QuantTensor:
    weight = quantize("w", torch.ones(rows, columns), QuantSpec("nf4"))
    assert isinstance(weight, QuantTensor)
    return weight


def bf16(*sizes: int) -> torch.Tensor:
    return torch.ones(sizes, dtype=torch.bfloat16)


def int8(rows: int, columns: int) -> Weight:
    return quantize("w", torch.ones(rows, columns), QuantSpec("int8"))


X = torch.ones(2, 128)
W = nf4(6, 128)
EXPERT = ExpertWeights(w1=nf4(96, 64), w3=nf4(96, 64), w2=nf4(64, 96))
ATTENTION = AttentionWeights(norm=torch.ones(64), q=nf4(64, 64), k=nf4(32, 64), v=nf4(32, 64), o=nf4(64, 64))
ROUTER = RouterWeights(norm=torch.ones(64), gate=torch.ones(8, 64), norm_eps=1e-5, top_k=2)

LINEAR: dict[str, tuple[torch.Tensor, Weight]] = {
    "fewer columns": (X[:, :64], W),
    "float64 activations": (X.double(), W),
    "bfloat16 activations": (X.bfloat16(), W),
    "a vector of activations": (X[0], W),
    "three axes": (X[None], W),
    "short codes": (X, replace(W, codes=W.codes[:, :-1])),
    "codes of few rows": (X, replace(W, codes=W.codes[:5])),
    "wide codes": (X, replace(W, codes=W.codes.to(torch.int16))),
    "signed codes": (X, replace(W, codes=W.codes.to(torch.int8))),
    "scales of another type": (X, replace(W, scales=W.scales.float())),
    "scales of few rows": (X, replace(W, scales=W.scales[:3])),
    "one scale a row": (X, replace(W, scales=W.scales[:, :1])),
    "codes called bf16": (X, replace(W, spec=QuantSpec("bf16"))),
    "odd columns in four bits": (torch.ones(2, 127), replace(W, shape=(6, 127))),
    "a float16 weight": (X, torch.ones(6, 128, dtype=torch.float16)),
    "an integer weight": (X, torch.ones(6, 128, dtype=torch.int8)),
    "a vector of weights": (X, torch.ones(128)),
    "weights of three axes": (X, torch.ones(1, 6, 128)),
    "fewer plain columns": (X, bf16(6, 127)),
}  # fmt: skip

EXPERTS: dict[str, ExpertWeights] = {
    "w3 has other rows": replace(EXPERT, w3=nf4(64, 64)),
    "w2 is not turned": replace(EXPERT, w2=nf4(96, 64)),
    "w2 is plain": replace(EXPERT, w2=bf16(64, 96)),
    "bf16 beside float32": ExpertWeights(w1=bf16(96, 64), w3=torch.ones(96, 64), w2=bf16(64, 96)),
    "vectors": ExpertWeights(w1=bf16(64), w3=bf16(64), w2=bf16(64)),
}

ATTENTIONS: dict[str, tuple[AttentionWeights, AttentionShape]] = {
    "q has few rows": (replace(ATTENTION, q=nf4(32, 64)), SHAPE),
    "k has as many heads as q": (replace(ATTENTION, k=nf4(64, 64)), SHAPE),
    "v is narrow": (replace(ATTENTION, v=nf4(32, 62)), SHAPE),
    "o is wide": (replace(ATTENTION, o=nf4(64, 66)), SHAPE),
    "the norm is short": (replace(ATTENTION, norm=torch.ones(63)), SHAPE),
    "the norm is bfloat16": (replace(ATTENTION, norm=bf16(64)), SHAPE),
    "v in another format": (replace(ATTENTION, v=int8(32, 64)), SHAPE),
    "kv heads do not divide heads": (
        replace(ATTENTION, k=nf4(48, 64), v=nf4(48, 64)), replace(SHAPE, n_kv_heads=3)
    ),
    "odd head_dim": (
        AttentionWeights(torch.ones(64), bf16(20, 64), bf16(10, 64), bf16(10, 64), bf16(64, 20)),
        replace(SHAPE, head_dim=5),
    ),
}  # fmt: skip

ROUTERS: dict[str, RouterWeights] = {
    "a short norm": replace(ROUTER, norm=torch.ones(63)),
    "a bfloat16 norm": replace(ROUTER, norm=bf16(64)),
    "a bfloat16 gate": replace(ROUTER, gate=bf16(8, 64)),
    "no experts to choose": replace(ROUTER, top_k=0),
    "more than there are": replace(ROUTER, top_k=9),
}

HEADS: dict[str, tuple[torch.Tensor, Weight]] = {
    "a short norm": (torch.ones(127), W),
    "a bfloat16 norm": (bf16(128), W),
    "short scales": (torch.ones(128), replace(W, scales=W.scales[:, :1])),
    "a float16 weight": (torch.ones(128), torch.ones(6, 128, dtype=torch.float16)),
}

IDS, WEIGHTS = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
ROUTINGS: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {
    "int32 ids": (X[:, :64], IDS.int(), WEIGHTS),
    "ids of other tokens": (X[:1, :64], IDS, WEIGHTS),
    "one axis of ids": (X[:, :64], IDS[:, 0], WEIGHTS[:, 0]),
    "float64 weights": (X[:, :64], IDS, WEIGHTS.double()),
    "few weights": (X[:, :64], IDS, WEIGHTS[:, :1]),
    "float64 activations": (X[:, :64].double(), IDS, WEIGHTS),
    "one token without an axis": (X[0, :64], IDS[:1], WEIGHTS[:1]),
    "activations of another width": (X, IDS, WEIGHTS),
}

CALLS: dict[str, Callable[[Kernels], object]] = {
    **{f"linear: {n}": lambda k, c=c: k.linear(*c) for n, c in LINEAR.items()},
    **{f"expert: {n}": lambda k, c=c: k.bind_expert(c) for n, c in EXPERTS.items()},
    **{f"attention: {n}": lambda k, c=c: k.bind_attention(*c) for n, c in ATTENTIONS.items()},
    **{f"router: {n}": lambda k, c=c: k.bind_router(c) for n, c in ROUTERS.items()},
    **{f"head: {n}": lambda k, c=c: k.bind_head(*c, 1e-5) for n, c in HEADS.items()},
    **{f"moe_ffn: {n}": lambda k, c=c: k.moe_ffn(*c, {0: k.bind_expert(EXPERT)}) for n, c in ROUTINGS.items()},
}


@pytest.mark.parametrize("case", CALLS)
def test_what_does_not_fit_is_refused(kernels: Kernels, case: str) -> None:
    with pytest.raises(RefusedError):
        CALLS[case](kernels)


def test_what_fits_is_not(kernels: Kernels) -> None:
    """Each case above differs from these in one thing."""
    assert kernels.linear(X, W).shape == (2, 6)
    experts = {0: kernels.bind_expert(EXPERT)}
    assert kernels.moe_ffn(X[:, :64], IDS, WEIGHTS, experts).shape == (2, 64)
    kernels.bind_attention(ATTENTION, SHAPE)
    kernels.bind_router(ROUTER)
    kernels.bind_head(torch.ones(128), W, 1e-5)


def turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous().T


NOT_CONTIGUOUS: dict[str, Callable[[Kernels], object]] = {
    "codes": lambda k: k.linear(X, replace(W, codes=turned(W.codes))),
    "scales": lambda k: k.linear(X, replace(W, scales=turned(W.scales))),
    "weight": lambda k: k.linear(X, turned(bf16(6, 128))),
    "expert": lambda k: k.bind_expert(replace(EXPERT, w2=replace(nf4(64, 96), codes=turned(nf4(64, 96).codes)))),
    "attention's norm": lambda k: k.bind_attention(replace(ATTENTION, norm=torch.ones(128)[::2]), SHAPE),
    "router's gate": lambda k: k.bind_router(replace(ROUTER, gate=turned(ROUTER.gate))),
    "router's norm": lambda k: k.bind_router(replace(ROUTER, norm=torch.ones(128)[::2])),
    "head's norm": lambda k: k.bind_head(torch.ones(256)[::2], W, 1e-5),
}


@pytest.mark.parametrize("case", NOT_CONTIGUOUS)
def test_what_the_compiled_kernels_cannot_walk_through_is_refused(isa: str, case: str) -> None:
    with pytest.raises(RefusedError, match="contiguous"):
        NOT_CONTIGUOUS[case](CpuKernels(isa))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_as_many_columns_as_the_kernels_take(isa: str, kind: str) -> None:
    most, spec = CpuKernels(isa), QuantSpec(kind)
    for columns, tokens in ((MAX_COLUMNS, 1), (MAX_COLUMNS, 6)):
        weight = empty(spec, (3, columns))
        weight.codes.zero_()
        weight.scales.fill_(1.0)
        assert most.linear(torch.ones(tokens, columns), weight).isfinite().all()
    with pytest.raises(RefusedError, match=str(MAX_COLUMNS)):
        most.linear(torch.ones(1, MAX_COLUMNS + 2), empty(spec, (1, MAX_COLUMNS + 2)))


def test_a_message_says_what_was_found_and_what_is_needed() -> None:
    with pytest.raises(RefusedError, match=r"nf4 scales must be torch.float16 \[6, 2\], not torch.float32 \[6, 2\]"):
        ReferenceKernels().linear(*LINEAR["scales of another type"])
    with pytest.raises(RefusedError, match=r"attention: k must be \[32, 64\], not \[64, 64\]"):
        ReferenceKernels().bind_attention(*ATTENTIONS["k has as many heads as q"])
    with pytest.raises(RefusedError, match="plain and quantized"):
        ReferenceKernels().bind_expert(EXPERTS["w2 is plain"])
    with pytest.raises(RefusedError, match="router of 8 experts cannot choose 9"):
        ReferenceKernels().bind_router(ROUTERS["more than there are"])
