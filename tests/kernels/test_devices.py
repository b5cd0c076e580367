"""No kernel makes a tensor elsewhere than where its operands lie: shown with PyTorch's fake tensors, which claim to lie
on another device, hold no numbers, and refuse to be mixed with a CPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from mixlocal.kernels import PAGE, PANEL, AttentionWeights, KeyValues, RouterWeights, Step, reference
from mixlocal.kernels.cuda import FEW_TOKENS, CudaKernels
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.model.arch import read_config
from mixlocal.model.layers import rotary_tables
from mixlocal.model.transformer import attention_shape
from mixlocal.quant.format import ExpertWeights, QuantSpec, QuantTensor, Weight

SPECS = {"nf4": QuantSpec("nf4"), "fp4-32": QuantSpec("fp4", 32), "int8": QuantSpec("int8")}
FORMATS = (*SPECS, "bf16", "float32")
AWAY = torch.device("lazy:0")  # stands for a GPU: a build of PyTorch for CPUs can take no slice of a fake "cuda" tensor
START, LIMIT = 20, 64


@pytest.fixture(params=["reference", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[ReferenceKernels]:
    """Made before tensors are fake: `CudaKernels` looks at numbers then."""
    if request.param == "cuda":
        pytest.importorskip("bitsandbytes")
    made = CudaKernels("cpu") if request.param == "cuda" else ReferenceKernels()
    with FakeTensorMode():
        yield made


def floats(*sizes: int) -> torch.Tensor:
    return torch.empty(sizes, device=AWAY)


def weight(name: str, rows: int, columns: int) -> Weight:
    if name not in SPECS:
        return floats(rows, columns).to(torch.bfloat16 if name == "bf16" else torch.float32)
    spec = SPECS[name]
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=AWAY)
    if not spec.four_bit:
        codes = torch.empty(rows, columns, dtype=torch.int8, device=AWAY)
    scales = torch.empty(spec.scales_shape((rows, columns)), dtype=spec.scale_dtype, device=AWAY)
    return QuantTensor(spec, (rows, columns), codes, scales)


def test_mixed_devices_would_be_seen(kernels: ReferenceKernels) -> None:
    with pytest.raises(RuntimeError, match="device"):
        kernels.linear(torch.empty(1, 64), weight("bf16", 8, 64))


@pytest.mark.parametrize("columns", [128, 66])
@pytest.mark.parametrize("name", FORMATS)
def test_products(kernels: ReferenceKernels, name: str, columns: int) -> None:
    for tokens in (1, FEW_TOKENS + 1):
        assert kernels.linear(floats(tokens, columns), weight(name, 8, columns)).device == AWAY


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_attention(kernels: ReferenceKernels, dtype: torch.dtype, name: str, window: int | None) -> None:
    config = read_config(tiny.CONFIG | {"sliding_window": window}, "config.json")
    dim, keys, d = config.dim, config.n_kv_heads * config.head_dim, config.head_dim
    weights = AttentionWeights(
        floats(dim), weight(name, dim, dim), weight(name, keys, dim), weight(name, keys, dim), weight(name, dim, dim)
    )
    layer = kernels.bind_attention(weights, attention_shape(config))
    shape = (LIMIT // PAGE, config.n_kv_heads)
    keys_there = floats(*shape, PAGE // PANEL, d, PANEL).to(dtype)
    cache = KeyValues(keys_there, floats(*shape, PAGE, d).to(dtype))
    for counts in ([1], [9], [1, 9]):
        hidden = floats(sum(counts), dim)
        angles = [table.to(AWAY) for table in rotary_tables(config, torch.arange(sum(counts)))]
        with unset_fake_temporarily():  # these are looked at
            spans = torch.full((len(counts),), START), torch.tensor(counts)
        layer.add_to(
            hidden, cache, Step(*spans, torch.zeros((len(counts), 1), dtype=torch.int64, device=AWAY), *angles)
        )
        assert hidden.device == AWAY


def test_positions_follow_their_device() -> None:
    with FakeTensorMode():
        tables = rotary_tables(read_config(tiny.CONFIG, "config.json"), torch.arange(3, device=AWAY))
    assert [table.device for table in tables] == [AWAY, AWAY]


def test_router(kernels: ReferenceKernels) -> None:
    router = kernels.bind_router(RouterWeights(floats(64), floats(8, 64), 1e-5, 2))
    assert [result.device for result in router.choose(floats(3, 64))] == [AWAY] * 3


@pytest.mark.parametrize("name", FORMATS)
def test_head(kernels: ReferenceKernels, name: str) -> None:
    assert kernels.bind_head(floats(64), weight(name, 260, 64), 1e-5).logits(floats(3, 64)).device == AWAY


@pytest.mark.parametrize("name", FORMATS)
def test_experts(kernels: ReferenceKernels, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for finding out which were chosen, for which tensors without numbers do not do."""
    picks = {e: torch.empty(3, dtype=torch.int64, device=AWAY) for e in (0, 5)}
    monkeypatch.setattr(reference, "_picks_by_expert", lambda expert_ids: picks)
    expert = ExpertWeights(w1=weight(name, 96, 64), w3=weight(name, 96, 64), w2=weight(name, 64, 96))
    experts = {e: kernels.bind_expert(expert) for e in picks}
    ids = torch.empty(3, 2, dtype=torch.int64, device=AWAY)
    assert kernels.moe_ffn(floats(3, 64), ids, floats(3, 2), experts).device == AWAY


class Operators(TorchDispatchMode):
    """Remembers which were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def called(x: torch.Tensor, weight: Weight, kernels: CudaKernels) -> set[str]:
    """bitsandbytes' operators that a product takes."""
    with Operators() as operators:
        kernels.linear(x, weight)
    return {operator for operator in operators.names if operator.startswith("bitsandbytes")}


@pytest.fixture
def cuda_kernels() -> Iterator[CudaKernels]:
    pytest.importorskip("bitsandbytes")
    made = CudaKernels("cpu")
    with FakeTensorMode():
        yield made


@pytest.mark.parametrize("name", ["nf4", "fp4-32"])
def test_few_tokens_are_multiplied_straight_from_the_codes(cuda_kernels: CudaKernels, name: str) -> None:
    """No copy of the weight eight times as large is made and read."""
    for tokens in (1, FEW_TOKENS):
        assert called(floats(tokens, 4096), weight(name, 8, 4096), cuda_kernels) == {"bitsandbytes.gemm_4bit.default"}
    more = floats(FEW_TOKENS + 1, 4096)
    assert called(more, weight(name, 8, 4096), cuda_kernels) == {"bitsandbytes.dequantize_4bit.default"}


def test_what_stops_a_gpu_is_left_to_pytorch(cuda_kernels: CudaKernels) -> None:
    """A load of 16 bytes from another address than a multiple of 16, and a launch of no threads."""
    fine = weight("nf4", 8, 64)
    assert isinstance(fine, QuantTensor)
    codes = torch.empty(8 * 32 + 1, dtype=torch.uint8, device=AWAY)[1:].view(8, 32)
    shifted = QuantTensor(fine.spec, fine.shape, codes, fine.scales)
    for tokens in (1, FEW_TOKENS + 1):
        assert not called(floats(tokens, 64), shifted, cuda_kernels)
        assert not called(floats(tokens, 64), weight("nf4", 0, 64), cuda_kernels)
        assert not called(floats(tokens, 66), weight("nf4", 8, 66), cuda_kernels)
    launches_nothing = called(floats(0, 64), fine, cuda_kernels)
    assert "bitsandbytes.gemm_4bit.default" not in launches_nothing
    assert "bitsandbytes.gemm_4bit.default" not in called(floats(65)[1:].view(1, 64), fine, cuda_kernels)
