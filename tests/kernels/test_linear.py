"""Products on every instruction set: with quantized weights the very bits of `integer_linear`, with plain ones the
reference up to float32 rounding. T tokens have the bits of one token at a time, whatever the number of threads."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from mixlocal.kernels.cpu import CpuKernels
from mixlocal.kernels.integer import SMALLEST, integer_error, integer_linear
from mixlocal.kernels.isa import set_threads
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.quant.format import CODEBOOKS, QuantSpec, QuantTensor, Weight
from mixlocal.quant.packing import pack_nibbles
from mixlocal.quant.quantize import dequantize, quantize

QUANTIZED = {
    "nf4": QuantSpec("nf4"),
    "nf4-32": QuantSpec("nf4", 32),
    "fp4": QuantSpec("fp4"),
    "int4": QuantSpec("int4"),
    "int4-32": QuantSpec("int4-32"),
    "int4 wide": QuantSpec("int4-32", 32),
    "int8": QuantSpec("int8"),
}
FORMATS = (*QUANTIZED, "bf16", "float32")
EVEN_SHAPES = (
    (1, 2), (3, 62), (5, 64), (7, 66), (2, 128), (33, 130), (25, 194), (70, 576), (26, 1000), (35, 1024), (17, 1088),
    (9, 4096),
)  # fmt: skip
ODD_SHAPES = ((1, 1), (5, 3), (17, 77), (31, 257))
TOKENS = (1, 2, 3, 7, 16, 64, 300)

# `quantize` warns once per process about a copy it makes where the columns are not whole blocks.
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")


def formatted(weight: torch.Tensor, name: str) -> Weight:
    if name in QUANTIZED:
        return quantize("w", weight, QUANTIZED[name])
    return weight if name == "float32" else weight.to(torch.bfloat16)


def near_the_reference(result: torch.Tensor, x: torch.Tensor, weight: Weight) -> bool:
    """Whether a product is within what its format's arithmetic is stated to be off."""
    exact = dequantize(weight)
    quantized = isinstance(weight, QuantTensor)
    bound = integer_error(x, weight, exact) if quantized else 4e-6 * (x.abs() @ exact.abs().T) + 1e-36
    return bool(((result - ReferenceKernels().linear(x, weight)).abs() <= bound).all())


@cache
def cases(name: str) -> list[tuple[torch.Tensor, Weight, torch.Tensor | None]]:
    """Activations, a weight, and the bits of their product where these are specified."""
    generator = torch.Generator().manual_seed(1)
    shapes = EVEN_SHAPES if name in QUANTIZED and QUANTIZED[name].four_bit else EVEN_SHAPES + ODD_SHAPES
    made: list[tuple[torch.Tensor, Weight, torch.Tensor | None]] = []
    for rows, columns in shapes:
        weight = formatted(torch.randn(rows, columns, generator=generator), name)
        for tokens in TOKENS:
            x = torch.randn(tokens, columns, generator=generator)
            made.append((x, weight, integer_linear(x, weight) if isinstance(weight, QuantTensor) else None))
    return made


@pytest.mark.parametrize("name", FORMATS)
def test_linear_is_what_is_specified(isa: str, name: str) -> None:
    kernels = CpuKernels(isa)
    for x, weight, expected in cases(name):
        result = kernels.linear(x, weight)
        assert near_the_reference(result, x, weight), (x.shape, weight.shape)
        assert expected is None or torch.equal(result, expected), (x.shape, weight.shape)


@pytest.mark.parametrize("name", ["nf4", "int4", "int4-32", "int8"])
@pytest.mark.parametrize("tokens", [4, 5, 6, 13, 520])
def test_linear_at_the_edges_of_its_blocking(isa: str, name: str, tokens: int) -> None:
    weight, x = formatted(torch.randn(65, 640), name), torch.randn(tokens, 640)
    assert isinstance(weight, QuantTensor)
    assert torch.equal(CpuKernels(isa).linear(x, weight), integer_linear(x, weight))


def hard_numbers(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All-zero blocks, denormal weights and activations, blocks too small to count, outliers thousands of times the
    rest."""
    generator = torch.Generator().manual_seed(tokens)
    weight, x = torch.randn(40, 320, generator=generator), torch.randn(tokens, 320, generator=generator)
    weight[0] = 0.0
    weight[1:3, 64:128] = 0.0
    weight[3] *= 1e-41
    weight[4, 7] = 3000.0
    x[:, :64] *= 1e-40
    x[:, 64:128] = 0.0
    x[:, 128:192] *= SMALLEST / 10
    x[:, 200] = 1e4
    x[0, 256:] = SMALLEST
    x[-1, 256:] = torch.tensor(SMALLEST).nextafter(torch.tensor(0.0))
    return weight, x


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_linear_with_hard_numbers(isa: str, name: str, tokens: int) -> None:
    exact, x = hard_numbers(tokens)
    weight = formatted(exact, name)
    result = CpuKernels(isa).linear(x, weight)
    assert near_the_reference(result, x, weight)
    assert not isinstance(weight, QuantTensor) or torch.equal(result, integer_linear(x, weight))


@pytest.mark.parametrize("name", QUANTIZED)
def test_activations_too_small_to_count_stay_within_the_stated_error(name: str) -> None:
    """Beside nothing larger, which would hide them."""
    weight, x = formatted(torch.randn(8, 192), name), torch.full((2, 192), SMALLEST * 0.99)
    assert isinstance(weight, QuantTensor)
    off = (integer_linear(x, weight) - ReferenceKernels().linear(x, weight)).abs()
    assert (off <= integer_error(x, weight, dequantize(weight))).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [2, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_spoils_its_own_token_and_no_other(
    isa: str, name: str, tokens: int, value: float
) -> None:
    weight, x = formatted(torch.randn(70, 192), name), torch.randn(tokens, 192)
    expected = CpuKernels(isa).linear(x, weight)
    x[1, 100] = value
    result = CpuKernels(isa).linear(x, weight)
    assert not result[1].isfinite().any()
    others = [t for t in range(tokens) if t != 1]
    assert torch.equal(result[others], expected[others])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(50, 194), (70, 1024)])
def test_tokens_do_not_change_each_other(isa: str, name: str, shape: tuple[int, int]) -> None:
    kernels, weight, x = CpuKernels(isa), formatted(torch.randn(shape), name), torch.randn(70, shape[1])
    alone = torch.cat([kernels.linear(token[None], weight) for token in x])
    for tokens in (2, 3, 4, 5, 6, 7, 12, 25, 49, 70):
        assert torch.equal(kernels.linear(x[:tokens], weight), alone[:tokens]), tokens


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_threads_do_not_change_a_bit(isa: str, name: str, tokens: int, threads: None) -> None:
    weight, x = formatted(torch.randn(500, 320), name), torch.randn(tokens, 320)
    results = []
    for count in (1, 2, 5):
        set_threads(count)
        results.append(CpuKernels(isa).linear(x, weight))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


def test_every_float16_scale_is_read_exactly(isa: str) -> None:
    scales = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    scales = scales[scales.isfinite()].unsqueeze(1)
    codes = torch.full((len(scales), 64), CODEBOOKS["nf4"].index(0.0), dtype=torch.uint8)
    codes[:, 5] = CODEBOOKS["nf4"].index(1.0)
    weight = QuantTensor(QuantSpec("nf4"), (len(scales), 64), pack_nibbles(codes), scales)
    x = torch.zeros(6, 64)
    x[:, 5] = 1.0
    for tokens in (1, 6):  # row by row and in tiles
        assert torch.equal(CpuKernels(isa).linear(x[:tokens], weight), integer_linear(x[:tokens], weight))
    torch.testing.assert_close(CpuKernels(isa).linear(x[:1], weight), scales.float().T, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int4", "int4-32"])
def test_the_largest_sums_of_affine_codes_stay_whole(isa: str, name: str) -> None:
    """Codes of 15 times activations of 127 or -127 come closest to what sixteen bits hold."""
    spec = QUANTIZED[name]
    codes = torch.full((40, 640), 15, dtype=torch.uint8)
    scales = torch.rand(40, spec.planes * 10).half() - 0.5
    weight = QuantTensor(spec, (40, 640), pack_nibbles(codes), scales)
    x = torch.ones(20, 640)
    x[::2] = -1.0
    for tokens in (1, 3, 20):
        assert torch.equal(CpuKernels(isa).linear(x[:tokens], weight), integer_linear(x[:tokens], weight))


def test_int8_codes_of_minus_128(isa: str) -> None:
    """Which `quantize` never writes, but a file may hold."""
    codes = torch.randint(-128, 128, (40, 200), dtype=torch.int8)
    codes[:, ::3] = -128
    weight = QuantTensor(QuantSpec("int8"), (40, 200), codes, torch.rand(40, 1))
    x = torch.full((20, 200), -1.0)
    for tokens in (1, 20):
        assert torch.equal(CpuKernels(isa).linear(x[:tokens], weight), integer_linear(x[:tokens], weight))


@pytest.mark.parametrize("name", FORMATS)
def test_strided_activations(isa: str, name: str) -> None:
    weight, x = formatted(torch.randn(8, 12), name), torch.randn(12, 5).T
    assert torch.equal(CpuKernels(isa).linear(x, weight), CpuKernels(isa).linear(x.contiguous(), weight))


def test_no_tokens_and_no_rows(isa: str) -> None:
    weight = quantize("w", torch.randn(4, 64), QuantSpec("nf4"))
    assert CpuKernels(isa).linear(torch.empty(0, 64), weight).shape == (0, 4)
    for tokens in (2, 20):
        x = torch.randn(tokens, 3)
        assert CpuKernels(isa).linear(x, torch.empty(0, 3, dtype=torch.bfloat16)).shape == (tokens, 0)
        assert not CpuKernels(isa).linear(x[:, :0], torch.empty(4, 0, dtype=torch.bfloat16)).any()
