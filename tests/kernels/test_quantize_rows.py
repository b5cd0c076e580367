"""`quantize_rows` on every instruction set has the bits of `quantize`, which is the specification."""

from __future__ import annotations

import warnings

import pytest
import torch

from mixlocal.errors import RefusedError
from mixlocal.kernels.isa import set_threads
from mixlocal.kernels.quantizer import quantize_rows
from mixlocal.quant.format import CODEBOOKS, QuantSpec, QuantTensor
from mixlocal.quant.quantize import empty, quantize, relative_error
from mixlocal.quant.search import Search

SPECS = {
    "nf4": QuantSpec("nf4"),
    "nf4-32": QuantSpec("nf4", 32),
    "fp4": QuantSpec("fp4"),
    "int4": QuantSpec("int4"),
    "int4 wide": QuantSpec("int4", 32),
    "int4-32": QuantSpec("int4-32"),
    "int8": QuantSpec("int8"),
    "bf16": QuantSpec("bf16"),
}

# `quantize` warns once per process about a copy it makes where the columns are not whole blocks.
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")


def hard_weights(columns: int) -> torch.Tensor:
    """Rows of every trouble: zeros, denormals, outliers, scales that round in float16, ties between two levels."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(40, columns, generator=generator)
    weight *= torch.logspace(-46, 4, 40).unsqueeze(1)
    weight[3] = 0.0
    weight[20] = weight[20].clamp(-0.5, 0.5)
    weight[20, 0] = 100.0
    for row, kind in ((21, "nf4"), (22, "fp4")):
        levels = torch.tensor(sorted(CODEBOOKS[kind]))
        ties = (levels[1:] + levels[:-1]) / 2
        near = torch.cat([ties, ties.nextafter(torch.tensor(2.0)), ties.nextafter(torch.tensor(-2.0)), -ties])[
            : columns - 1
        ]
        weight[row] = 0.25
        weight[row, 0] = 1.0
        weight[row, 1 : len(near) + 1] = near
    return weight


@pytest.mark.parametrize("columns", [2, 62, 64, 66, 190, 576, 1024])
@pytest.mark.parametrize("kind", ["nf4", "nf4-32", "fp4", "int4", "int4 wide", "int4-32", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_quantize_rows_has_the_bits_of_quantize(isa: str, kind: str, columns: int, dtype: torch.dtype) -> None:
    weight = hard_weights(columns).to(dtype)
    expected = quantize("w", weight, SPECS[kind])
    result, error = quantize_rows("w", weight, SPECS[kind])
    assert isinstance(expected, QuantTensor)
    assert isinstance(result, QuantTensor)
    assert torch.equal(result.codes, expected.codes)
    assert torch.equal(result.scales, expected.scales)
    assert error == pytest.approx(relative_error(weight, expected), rel=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("columns", [2, 62, 66, 190, 1024])
@pytest.mark.parametrize("kind", ["nf4", "nf4-32", "fp4", "int4", "int4 wide", "int4-32"])
def test_a_search_finds_the_same_scales_on_every_instruction_set(
    isa: str, kind: str, columns: int, weighted: bool
) -> None:
    """To the bit, blocks without a number of their own and numbers of every size included; more blocks than one in the
    thousand where another order of sums would decide otherwise."""
    generator = torch.Generator().manual_seed(columns)
    search = Search(torch.rand(columns, generator=generator) + 0.01 if weighted else None)
    for weight in (hard_weights(columns), torch.randn(60, columns, generator=generator).bfloat16()):
        expected = quantize("w", weight, SPECS[kind], search)
        result, error = quantize_rows("w", weight, SPECS[kind], search=search)
        assert isinstance(expected, QuantTensor)
        assert isinstance(result, QuantTensor)
        assert torch.equal(result.codes, expected.codes)
        assert torch.equal(result.scales, expected.scales)
        assert error == pytest.approx(relative_error(weight, expected), rel=1e-4)


def test_quantize_rows_int8_of_odd_columns(isa: str) -> None:
    weight = torch.randn(9, 77)
    expected, (result, _) = quantize("w", weight, SPECS["int8"]), quantize_rows("w", weight, SPECS["int8"])
    assert isinstance(expected, QuantTensor)
    assert isinstance(result, QuantTensor)
    assert torch.equal(result.codes, expected.codes)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_quantize_rows_has_the_bits_of_bitsandbytes(isa: str, kind: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 256)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    result, _ = quantize_rows("w", weight, SPECS[kind] if kind == "fp4" else SPECS["nf4-32"])
    assert isinstance(result, QuantTensor)
    assert torch.equal(result.codes.flatten(), codes.flatten())
    assert torch.equal(result.scales.float().flatten(), state.absmax.to(result.scales.dtype).float())


def test_quantize_rows_does_not_depend_on_threads(isa: str, threads: None) -> None:
    weight = torch.randn(700, 256)
    results = []
    for count in (1, 3):
        set_threads(count)
        result, error = quantize_rows("w", weight, SPECS["nf4"])
        assert isinstance(result, QuantTensor)
        results.append((result.codes.tolist(), result.scales.tolist(), error))
    assert results[0] == results[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "int4", "int4-32", "int8", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_quantize_rows_names_the_first_number_that_is_none(
    isa: str, kind: str, dtype: torch.dtype, value: float
) -> None:
    weight = torch.randn(60, 130).to(dtype)
    weight[41, 129] = value
    weight[50, 2] = torch.nan
    with pytest.raises(RefusedError, match=rf"^w1 holds {value} at \[41, 129\]"):
        quantize_rows("w1", weight, SPECS[kind])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantize_rows_fills_what_it_is_given(isa: str, kind: str) -> None:
    weight, room = torch.randn(9, 128), empty(SPECS[kind], (9, 128))
    expected, (result, _) = quantize("w", weight, SPECS[kind]), quantize_rows("w", weight, SPECS[kind], room)
    assert isinstance(expected, QuantTensor)
    assert result is room
    assert torch.equal(room.codes, expected.codes)
    assert torch.equal(room.scales, expected.scales)
    with pytest.raises(RefusedError, match="no room"):
        quantize_rows("w", weight[:8], SPECS[kind], room)


def test_quantize_rows_refuses_what_the_format_cannot_hold(isa: str) -> None:
    with pytest.raises(RefusedError, match="16-bit scale"):
        quantize_rows("w", torch.full((2, 64), 1e5), SPECS["nf4"])
    with pytest.raises(RefusedError, match="packed"):
        quantize_rows("w", torch.randn(2, 63), SPECS["nf4"])
    assert quantize_rows("w", torch.zeros(2, 64), SPECS["nf4"])[1] == 0.0
