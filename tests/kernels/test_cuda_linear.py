"""Triton's programs: on a GPU where there is one, else in Triton's interpreter where that is installed."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mixlocal.errors import UsageError
from mixlocal.kernels import cuda, select
from mixlocal.kernels.cuda import AFFINE, CudaKernels, TritonProducts, check_triton
from mixlocal.kernels.integer import integer_linear
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.quant.format import ExpertWeights, QuantSpec, QuantTensor, Weight
from mixlocal.quant.quantize import quantize

GPU = torch.cuda.is_available()
INTERPRET = "TRITON_INTERPRET"
DEVICE = "cuda" if GPU else "cpu"
SPECS = {
    "nf4": QuantSpec("nf4"),
    "nf4-32": QuantSpec("nf4", 32),
    "fp4": QuantSpec("fp4"),
    "int8": QuantSpec("int8"),
    "int4": QuantSpec("int4"),
    "int4-32": QuantSpec("int4-32", 32),
}
OTHER_SCALES = {"int4": QuantSpec("int4", 32), "int4-32": QuantSpec("int4-32")}
MIXED = (("int8", "int4", "int4-32"), ("int4", "int4", "int8"), ("int4-32", "nf4", "int4"))  # w1, w3, w2
SHAPES = ((1, 64), (5, 2), (33, 130), (20, 1088), (70, 576)) + ((300, 4096),) * GPU
TOKENS = (1, 3, 5, 40)
BOUND = 5e-6  # of a product's norm: float32 sums in another order
NEEDS_GPU = pytest.mark.skipif(not GPU, reason="its numbers need a GPU: the interpreter has no such units")

# `quantize` warns once per process about a copy it makes where the columns are not whole blocks; Triton's interpreter
# is older than what NumPy deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def products() -> Iterator[ModuleType]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if not GPU and "triton" in sys.modules and os.environ.get(INTERPRET) != "1":
        pytest.skip("its interpreter must be asked for before Triton is imported: run this file alone")
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setitem(os.environ, INTERPRET, "1")
        from mixlocal.kernels import cuda_linear

        yield cuda_linear


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes)))


def quantized(name: str, *sizes: int) -> QuantTensor:
    weight = quantize("w", random(*sizes) * 0.1, SPECS[name])
    assert isinstance(weight, QuantTensor)
    return weight


def there(weight: QuantTensor) -> QuantTensor:
    return QuantTensor(weight.spec, weight.shape, weight.codes.to(DEVICE), weight.scales.to(DEVICE))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPECS)
def test_products_have_the_bits_of_the_compiled_kernels(
    products: ModuleType, name: str, shape: tuple[int, int]
) -> None:
    weight = quantized(name, *shape)
    for tokens in TOKENS:
        x = random(tokens, shape[1])
        x[-1] *= 1e4
        result = products.multiply(x.to(DEVICE), there(weight)).cpu()
        assert torch.equal(result, integer_linear(x, weight)), tokens


@pytest.mark.parametrize("name", OTHER_SCALES)
def test_scales_and_zeros_of_the_other_width(products: ModuleType, name: str) -> None:
    weight = quantize("w", random(20, 194) + 0.5, OTHER_SCALES[name])
    assert isinstance(weight, QuantTensor)
    for tokens in (2, 6):
        x = random(tokens, 194)
        assert torch.equal(products.multiply(x.to(DEVICE), there(weight)).cpu(), integer_linear(x, weight)), tokens


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tokens", [2, 6])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_spoils_its_own_token_and_no_other(
    products: ModuleType, name: str, tokens: int, value: float
) -> None:
    weight, x = quantized(name, 70, 192), random(tokens, 192)
    x[1, 100] = value
    result = products.multiply(x.to(DEVICE), there(weight)).cpu()
    assert not result[1].isfinite().any()
    expected = integer_linear(x, weight)
    others = [t for t in range(tokens) if t != 1]
    assert torch.equal(result[others], expected[others])


def test_small_numbers_and_none(products: ModuleType) -> None:
    """A block that counts as zero beside one that does not, and no tokens."""
    weight, x = quantized("nf4", 9, 192), random(5, 192)
    x[:, :64] = 1e-37
    x[2] = 0.0
    assert torch.equal(products.multiply(x.to(DEVICE), there(weight)).cpu(), integer_linear(x, weight))
    assert products.multiply(x[:0].to(DEVICE), there(weight)).shape == (0, 9)


@pytest.mark.parametrize("sizes", [(64, 192), (64, 96), (66, 130)])
@pytest.mark.parametrize("name", SPECS)
def test_experts_have_the_bits_of_the_compiled_kernels(products: ModuleType, name: str, sizes: tuple[int, int]) -> None:
    """Wherever an expert lies, what it adds is the same."""
    host = select("cpu")
    if not host.name.startswith("cpu-") or host.name == "cpu-scalar":
        pytest.skip("no compiled kernels with fused multiply-add")
    dim, hidden = sizes
    shapes = {"w1": (hidden, dim), "w3": (hidden, dim), "w2": (dim, hidden)}
    weights = {part: quantized(name, *shape) for part, shape in shapes.items()}
    bound = host.bind_expert(ExpertWeights(**weights))
    for tokens in TOKENS if GPU else (3, 5):
        x, ids = random(tokens, dim) * 3, torch.zeros(tokens, 1, dtype=torch.int64)
        expected = host.moe_ffn(x, ids, torch.ones(tokens, 1), {0: bound})
        moved = ExpertWeights(**{part: there(weight) for part, weight in weights.items()})
        result = products.expert(x.to(DEVICE), moved).cpu()
        if GPU:
            assert torch.equal(result, expected), tokens
        else:  # its fused multiply-add rounds twice
            assert (result - expected).norm() < 1e-3 * expected.norm(), tokens


@pytest.mark.parametrize("names", MIXED)
def test_experts_whose_matrices_are_in_different_formats(products: ModuleType, names: tuple[str, str, str]) -> None:
    """Each meets activations that were made whole for it."""
    dim, hidden = 66, 130
    w1, w3, w2 = quantized(names[0], hidden, dim), quantized(names[1], hidden, dim), quantized(names[2], dim, hidden)
    for tokens in (3, 6):
        x = random(tokens, dim) * 3
        result = products.expert(x.to(DEVICE), ExpertWeights(there(w1), there(w3), there(w2))).cpu()
        gate, up = integer_linear(x, w1), integer_linear(x, w3)
        inner = products.Quantized(gate.to(DEVICE), w2, up.to(DEVICE))
        assert torch.equal(result, products.multiply_quantized(inner, there(w2)).cpu()), tokens
        expected = integer_linear(torch.nn.functional.silu(gate) * up, w2)
        assert (result - expected).norm() < 1e-3 * expected.norm(), tokens
    host = select("cpu")
    if GPU and host.name.startswith("cpu-") and host.name != "cpu-scalar":
        ids, bound = torch.zeros(tokens, 1, dtype=torch.int64), host.bind_expert(ExpertWeights(w1, w3, w2))
        assert torch.equal(result, host.moe_ffn(x, ids, torch.ones(tokens, 1), {0: bound}))


@pytest.mark.parametrize("name", SPECS)
def test_kernels_multiply_by_every_quantized_format_with_programs(
    products: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And say that a GPU then computes what the compiled kernels do."""
    made = TritonProducts(products.multiply, products.expert)
    monkeypatch.setattr(cuda, "triton_products", lambda device: made)
    kernels, weight, x = CudaKernels("cuda"), quantized(name, 9, 66), random(2, 66)
    assert torch.equal(kernels.linear(x.to(DEVICE), there(weight)).cpu(), integer_linear(x, weight))
    assert kernels.computes_as(SimpleNamespace(name="cpu-avx2"), SPECS[name])  # type: ignore[arg-type]
    assert not kernels.computes_as(SimpleNamespace(name="cpu-scalar"), SPECS[name])  # type: ignore[arg-type]


def bfloat16(*sizes: int) -> torch.Tensor:
    return random(*sizes).bfloat16()


@NEEDS_GPU
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 4096)])
def test_products_with_bfloat16(products: ModuleType, shape: tuple[int, int]) -> None:
    """As near as float32 gets, and a row's bits are its own, whatever is beside it."""
    weight, x = bfloat16(*shape).to(DEVICE), random(600, shape[1]).to(DEVICE)
    whole = products.multiply(x, weight)
    exact = x.double() @ weight.double().T
    assert (whole - exact).norm() < BOUND * exact.norm()
    for tokens in (1, 2, 17, 300):
        assert torch.equal(products.multiply(x[:tokens].contiguous(), weight), whole[:tokens])
    assert torch.equal(products.multiply(x[433:434].clone(), weight)[0], whole[433])


@NEEDS_GPU
def test_a_gpu_computes_as_the_compiled_kernels_do(products: ModuleType) -> None:
    kernels, host = CudaKernels(DEVICE), select("cpu")
    assert kernels.name == "cuda triton"
    assert kernels.computes_as(host, SPECS["nf4"])
    assert not kernels.computes_as(host, QuantSpec("bf16"))
    assert not kernels.computes_as(ReferenceKernels(), SPECS["nf4"])
    assert not CudaKernels(DEVICE, triton=False).computes_as(host, SPECS["nf4"])
    weight = quantized("int8", 33, 192)
    x = random(4, 192)
    assert torch.equal(kernels.linear(x.to(DEVICE), there(weight)).cpu(), integer_linear(x, weight))


def test_wrong_programs_are_refused() -> None:
    """Before a model answers with them."""

    def right(x: torch.Tensor, weight: Weight) -> torch.Tensor:
        assert isinstance(weight, QuantTensor)
        return integer_linear(x, weight)

    def almost(x: torch.Tensor, weight: Weight) -> torch.Tensor:
        return right(x, weight) * (1 + 1e-6 * (len(x) > 1))

    def other_zeros(x: torch.Tensor, weight: Weight) -> torch.Tensor:
        assert isinstance(weight, QuantTensor)
        return right(x, weight) + 1e-3 * weight.spec.affine

    check_triton(right, "cpu", ("nf4", *AFFINE))
    with pytest.raises(UsageError, match="Triton multiplies nf4 weights wrongly on cpu"):
        check_triton(almost, "cpu")
    with pytest.raises(UsageError, match="Triton multiplies int4 weights wrongly on cpu"):
        check_triton(other_zeros, "cpu", AFFINE)
    check_triton(other_zeros, "cpu")
