"""bitsandbytes' kernels: on a CPU's tensors, which it takes too, and on a GPU's where there is one."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from stores import quantized

from mixlocal.errors import RefusedError, UsageError
from mixlocal.experts.resident import ResidentExperts
from mixlocal.kernels import Expert, Kernels, cuda, select
from mixlocal.kernels.cuda import FEW_TOKENS, CudaKernels
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.model.arch import read_config
from mixlocal.model.kv_cache import own_cache
from mixlocal.model.load import load_trunk
from mixlocal.model.transformer import Transformer
from mixlocal.quant.format import ExpertLayout, ExpertWeights, QuantSpec, QuantTensor, Weight
from mixlocal.quant.packing import read_record
from mixlocal.quant.quantize import dequantize, quantize
from mixlocal.store.model_store import ModelStore

SPECS = {
    "nf4": QuantSpec("nf4"),
    "nf4-32": QuantSpec("nf4", 32),
    "fp4": QuantSpec("fp4"),
    "fp4-32": QuantSpec("fp4", 32),
    "int4": QuantSpec("int4"),
    "int4-32": QuantSpec("int4-32", 32),
    "int8": QuantSpec("int8"),
    "bf16": QuantSpec("bf16"),
}
FOUR_BIT = tuple(name for name, spec in SPECS.items() if spec.four_bit)
FORMATS = (*SPECS, "float32")
SHAPES = ((1, 64), (2, 192), (5, 64), (33, 128), (70, 576), (35, 1024), (17, 1088), (6, 4096))
RAGGED = ((3, 2), (1, 62), (7, 66), (33, 130), (26, 1000))  # columns that are no whole blocks
TOKENS = (1, 2, FEW_TOKENS, FEW_TOKENS + 1, 40)
BOUND = 5e-6  # of the difference's norm to the product's: float32 sums in another order
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# `quantize` warns once per process about a copy it makes where the columns are not whole blocks.
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        pytest.importorskip("bitsandbytes")
    return str(request.param)


def bitsandbytes_kernels(device: str) -> CudaKernels:
    return CudaKernels(device, triton=False)


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def formatted(name: str, exact: torch.Tensor, device: str) -> Weight:
    weight = exact if name == "float32" else quantize("w", exact, SPECS[name])
    if isinstance(weight, torch.Tensor):
        return weight.to(device)
    return QuantTensor(weight.spec, weight.shape, weight.codes.to(device), weight.scales.to(device))


def four_bit(rows: int, columns: int, device: str, name: str = "nf4") -> QuantTensor:
    weight = formatted(name, random(rows, columns), device)
    assert isinstance(weight, QuantTensor)
    return weight


def off(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES + RAGGED)
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_the_references(device: str, name: str, shape: tuple[int, int]) -> None:
    weight, kernels = formatted(name, random(*shape), device), bitsandbytes_kernels(device)
    for tokens in TOKENS:
        x = random(tokens, shape[1]).to(device)
        result = kernels.linear(x, weight)
        assert result.dtype == torch.float32
        assert result.shape == (tokens, shape[0])
        assert off(result, ReferenceKernels().linear(x, weight)) < BOUND, tokens
        exact = x.double() @ dequantize(weight).double().T
        assert off(result.double(), exact) < BOUND, tokens


@pytest.mark.parametrize("name", FOUR_BIT)
def test_a_weight_that_is_dequantized_in_pieces(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one of a single row."""
    weight, x = four_bit(25, 128, device, name), random(FEW_TOKENS + 1, 128).to(device)
    kernels = bitsandbytes_kernels(device)
    monkeypatch.setattr(cuda, "CHUNK_ELEMENTS", 3 * 128)
    assert off(kernels.linear(x, weight), ReferenceKernels().linear(x, weight)) < BOUND


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 1])
def test_large_and_small_numbers(device: str, tokens: int) -> None:
    """Beyond float16's range: a half-precision product would be infinite or zero."""
    exact, x = random(8, 256), random(tokens, 256)
    exact[:, :64] = 0.0
    exact[1] *= 1e4
    exact[2] *= 1e-9
    x[:, 100] = 1e6
    weight = formatted("nf4-32", exact, device)
    x = x.to(device)
    expected = ReferenceKernels().linear(x, weight)
    result = bitsandbytes_kernels(device).linear(x, weight)
    assert result.isfinite().all()
    for row in range(8):
        assert off(result[:, row], expected[:, row]) < BOUND, row


MEMORY: dict[str, Callable[[QuantTensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "every second code": lambda w: (w.codes.repeat_interleave(2, 1)[:, ::2], w.scales),
    "every second scale": lambda w: (w.codes, w.scales.repeat_interleave(2, 1)[:, ::2]),
    "columns of scales": lambda w: (w.codes, w.scales.T.contiguous().T),
    "every second row": lambda w: (w.codes.repeat_interleave(2, 0)[::2], w.scales.repeat_interleave(2, 0)[::2]),
    "codes one byte from where they should begin": lambda w: (shifted(w.codes), w.scales),
    "scales one from where they should begin": lambda w: (w.codes, shifted(w.scales)),
}


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    room[1:] = tensor.flatten()
    return room[1:].view(tensor.shape)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 1])
@pytest.mark.parametrize("case", MEMORY)
def test_arrays_that_lie_otherwise_in_memory_give_the_same(device: str, case: str, tokens: int) -> None:
    weight, x, kernels = four_bit(24, 192, device), random(tokens, 192).to(device), bitsandbytes_kernels(device)
    moved = QuantTensor(weight.spec, weight.shape, *MEMORY[case](weight))
    assert off(kernels.linear(x, moved), ReferenceKernels().linear(x, weight)) < BOUND
    x = random(192, tokens).T.to(device)
    for strided in (x, shifted(x)):
        assert off(kernels.linear(strided, moved), ReferenceKernels().linear(x, weight)) < BOUND


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [2, FEW_TOKENS + 1])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_spoils_its_own_token_and_no_other(
    device: str, name: str, tokens: int, value: float
) -> None:
    weight, x = formatted(name, random(70, 192), device), random(tokens, 192).to(device)
    kernels = bitsandbytes_kernels(device)
    expected = kernels.linear(x, weight)
    x[1, 100] = value
    result = kernels.linear(x, weight)
    assert not result[1].isfinite().any()
    others = [t for t in range(tokens) if t != 1]
    assert off(result[others], expected[others]) < BOUND


@pytest.mark.parametrize("name", FOUR_BIT)
def test_no_tokens_and_no_rows(device: str, name: str) -> None:
    kernels = bitsandbytes_kernels(device)
    assert kernels.linear(torch.empty(0, 64, device=device), four_bit(4, 64, device, name)).shape == (0, 4)
    spec = SPECS[name]
    codes = torch.empty(0, 32, dtype=torch.uint8)
    scales = torch.empty(spec.scales_shape((0, 64)), dtype=spec.scale_dtype)
    empty = QuantTensor(spec, (0, 64), codes.to(device), scales.to(device))
    for tokens in (1, FEW_TOKENS + 1):
        assert kernels.linear(torch.ones(tokens, 64, device=device), empty).shape == (tokens, 0)


def test_what_does_not_fit_is_refused(device: str) -> None:
    weight = four_bit(4, 64, device)
    short = QuantTensor(weight.spec, weight.shape, weight.codes[:3], weight.scales)
    for x, wrong in ((random(1, 128), weight), (random(1, 64).half(), weight), (random(1, 64), short)):
        with pytest.raises(RefusedError):
            bitsandbytes_kernels(device).linear(x.to(device), wrong)


def filled(layout: ExpertLayout, record: torch.Tensor, seed: int) -> ExpertWeights:
    """Another expert's bytes in a record, as a read into a slot puts them there."""
    expert = read_record(layout, record)
    generator = torch.Generator().manual_seed(seed)
    for name, place in (("w1", expert.w1), ("w3", expert.w3), ("w2", expert.w2)):
        weight = quantize(name, torch.randn(layout.shapes[name], generator=generator) * 0.1, layout.spec)
        if isinstance(place, torch.Tensor) and isinstance(weight, torch.Tensor):
            place.copy_(weight)
        elif isinstance(place, QuantTensor) and isinstance(weight, QuantTensor):
            place.codes.copy_(weight.codes)
            place.scales.copy_(weight.scales)
    return expert


def bound(kernels: Kernels, experts: dict[int, ExpertWeights]) -> dict[int, Expert]:
    return {e: kernels.bind_expert(weights) for e, weights in experts.items()}


@pytest.mark.parametrize("sizes", [(64, 192), (64, 96), (66, 130)])
@pytest.mark.parametrize("name", SPECS)
def test_experts_are_the_references(device: str, name: str, sizes: tuple[int, int]) -> None:
    layout, kernels = ExpertLayout(*sizes, SPECS[name]), bitsandbytes_kernels(device)
    records = torch.empty(4, layout.stride, dtype=torch.uint8, device=device)
    experts = {e: filled(layout, record, e) for e, record in enumerate(records)}
    for tokens in (1, 5, 60):
        x, weights = random(tokens, sizes[0]).to(device), random(tokens, 2).abs().to(device)
        ids = random(tokens, 4).argsort(-1)[:, :2].to(device)
        results = [k.moe_ffn(x, ids, weights, bound(k, experts)) for k in (kernels, ReferenceKernels())]
        assert off(*results) < BOUND, tokens
    with pytest.raises(RefusedError, match=r"experts \[7\]"):
        kernels.moe_ffn(x, ids.fill_(7), weights, bound(kernels, experts))


@pytest.mark.parametrize("name", SPECS)
def test_a_slot_that_another_expert_was_read_into_after_binding(device: str, name: str) -> None:
    layout, kernels = ExpertLayout(64, 192, SPECS[name]), bitsandbytes_kernels(device)
    slot = torch.empty(layout.stride, dtype=torch.uint8, device=device)
    experts = bound(kernels, {0: filled(layout, slot, 0)})
    for tokens in (1, FEW_TOKENS + 1):
        x, weights = random(tokens, 64).to(device), torch.ones(tokens, 1, device=device)
        ids = torch.zeros(tokens, 1, dtype=torch.int64, device=device)
        before = kernels.moe_ffn(x, ids, weights, experts)
        expected = ReferenceKernels().moe_ffn(x, ids, weights, {0: filled(layout, slot, tokens)})
        result = kernels.moe_ffn(x, ids, weights, experts)
        assert off(result, expected) < BOUND
        assert off(before, expected) > 0.5


def model(store: ModelStore, kernels: Kernels) -> Transformer:
    config = read_config(tiny.CONFIG | {"intermediate_size": store.manifest.hidden}, "config.json")
    return Transformer(config, load_trunk(store, config), ResidentExperts(store.experts(), kernels), kernels)


@pytest.mark.parametrize("hidden", [128, 96])  # 96: w2's columns are no whole blocks
@pytest.mark.parametrize(("variant", "attention"), [("q4", "bf16"), ("q8", "int8"), ("bf16", "bf16")])
def test_a_models_logits_are_the_references(variant: str, attention: str, hidden: int, tmp_path: Path) -> None:
    """In one pass and token by token."""
    pytest.importorskip("bitsandbytes")
    folder = tiny.write_checkpoint(tmp_path / "checkpoint", intermediate_size=hidden)
    store = quantized(folder, tmp_path / "store", variant, attention)
    ids = torch.randint(0, tiny.CONFIG["vocab_size"], (40,), generator=torch.Generator().manual_seed(1))
    passes = []
    for kernels in (bitsandbytes_kernels("cpu"), ReferenceKernels()):
        ours = model(store, kernels)
        passes.append(ours.forward(ids, own_cache(ours.config, 64, torch.float32), all_logits=True))
        cache = own_cache(ours.config, 64, torch.float32)
        passes.append(torch.stack([ours.forward(token[None], cache) for token in ids]))
    whole, stepwise, expected, _ = passes
    assert off(whole, expected) < 2e-5
    assert off(stepwise, expected) < 2e-5
    assert torch.equal(whole.argmax(-1), expected.argmax(-1))


def test_bitsandbytes_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="bitsandbytes") as caught:
        CudaKernels("cpu")
    assert "pip install" in caught.value.hint


def no_kernel(*_: object) -> torch.Tensor:
    raise RuntimeError("CUDA error: no kernel image is available\nfor this GPU")


def nothing(x: torch.Tensor, codes: torch.Tensor, shape: tuple[int, int], *_: object) -> torch.Tensor:
    return x.new_zeros(len(x), shape[0])


def twice(codes: torch.Tensor, absmax: torch.Tensor, *others: Any) -> torch.Tensor:
    return OPERATORS.dequantize_4bit(codes, absmax * 2, *others)


def nan(codes: torch.Tensor, absmax: torch.Tensor, *others: Any) -> torch.Tensor:
    return twice(codes, absmax * torch.nan, *others)


def only_nf4(*arguments: Any) -> torch.Tensor:
    return OPERATORS.gemm_4bit(*arguments[:-1], "nf4")


OPERATORS = torch.ops.bitsandbytes
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "too old": ({"gemm_4bit": None}, "does not compute on cpu: .*gemm_4bit"),
    "not for this GPU": ({"gemm_4bit": no_kernel}, "on cpu: CUDA error: no kernel image is available$"),
    "nothing written": ({"gemm_4bit": nothing}, "multiplies nf4 weights wrongly on cpu: they are 1 off"),
    "scales misread": ({"dequantize_4bit": twice}, "multiplies nf4 weights wrongly on cpu: they are 1 off"),
    "NaN": ({"dequantize_4bit": nan}, "multiplies nf4 weights wrongly"),
    "fp4 taken for nf4": ({"gemm_4bit": only_nf4}, "multiplies fp4 weights wrongly"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_an_installation_that_computes_wrong_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model answers with it."""
    pytest.importorskip("bitsandbytes")
    changes, message = BROKEN[case]
    every = {name: changes.get(name, getattr(OPERATORS, name)) for name in ("gemm_4bit", "dequantize_4bit")}
    broken = SimpleNamespace(**{name: operator for name, operator in every.items() if operator is not None})
    monkeypatch.setattr(cuda, "torch", SimpleNamespace(**vars(torch) | {"ops": SimpleNamespace(bitsandbytes=broken)}))
    with pytest.raises(UsageError, match=message) as caught:
        CudaKernels("cpu")
    assert "python -m bitsandbytes" in caught.value.hint


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UsageError, match="cuda: PyTorch finds no GPU") as caught:
        select("cuda")
    assert "built without CUDA" in caught.value.hint
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UsageError) as caught:
        select("cuda:1")
    assert "nvidia-smi" in caught.value.hint


def test_gpus_are_selected_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "check_products", lambda kernels, device: None)
    monkeypatch.setattr(cuda, "triton_products", lambda device: None)
    names = [select(name).name for name in ("cuda", "cuda:0", "cuda:1")]
    assert names == ["cuda bitsandbytes", "cuda:0 bitsandbytes", "cuda:1 bitsandbytes"]
    with pytest.raises(UsageError, match="no cuda:2: PyTorch finds 2 GPUs"):
        select("cuda:2")
    for name in ("cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda 0", "cuda:0\n", "CUDA", "gpu"):
        with pytest.raises(UsageError, match="no kernels for device"):
            select(name)


def test_bitsandbytes_is_not_imported_for_a_cpu() -> None:
    """It takes a second, and is no part of a plain installation."""
    code = "import sys; from mixlocal.kernels import select; select('cpu'); print('bitsandbytes' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True, timeout=120) == "False\n"
