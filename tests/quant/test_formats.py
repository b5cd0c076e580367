"""The formats against bitsandbytes, and the edges of each."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mixlocal.errors import RefusedError
from mixlocal.kernels.quantizer import quantize_rows
from mixlocal.quant.format import KINDS, WIDE, WIDE_BITS, ExpertLayout, ExpertLayouts, QuantSpec, QuantTensor
from mixlocal.quant.packing import pack_nibbles, read_record, unpack_nibbles
from mixlocal.quant.quantize import dequantize, dequantize_rows, quantize, relative_error
from mixlocal.quant.search import Search

FOUR_BIT = ("nf4", "fp4")


def random_weight(rows: int = 24, columns: int = 192, seed: int = 0) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02).bfloat16()


@pytest.mark.parametrize("kind", FOUR_BIT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_four_bits_are_bitsandbytes_own(kind: str, dtype: torch.dtype) -> None:
    from bitsandbytes import functional

    weight = random_weight().to(dtype)
    packed, state = functional.quantize_4bit(weight.float(), quant_type=kind, blocksize=64)
    expected = functional.dequantize_4bit(packed, state)
    exact = quantize("w", weight, QuantSpec(kind, scale_bits=32))
    assert torch.equal(exact.codes.flatten(), packed.flatten())
    assert torch.equal(dequantize(exact), expected)
    short = dequantize(quantize("w", weight, QuantSpec(kind, scale_bits=16)))
    torch.testing.assert_close(short, expected, rtol=2**-10, atol=0)


def test_int8_is_symmetric_per_row() -> None:
    weight = random_weight()
    quantized = quantize("w", weight, QuantSpec("int8"))
    scale = weight.float().abs().amax(1, keepdim=True) / 127
    assert torch.equal(quantized.scales, scale)
    assert ((dequantize(quantized) - weight.float()).abs() <= scale * 0.5001).all()
    assert quantized.codes.abs().amax() == 127


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [64, 96, 130, 2])
def test_any_width_round_trips(kind: str, columns: int) -> None:
    """A ragged last block is a block; error bounds are those of the widest gap between levels."""
    weight = random_weight(9, columns)
    quantized = quantize("w", weight, QuantSpec(kind))
    error = (dequantize(quantized) - weight.float()).abs()
    bound = {"nf4": 0.16, "fp4": 0.18, "int4": 0.068, "int4-32": 0.068, "int8": 0.004, "bf16": 0.0}[kind]
    assert (error <= bound * weight.float().abs().amax(1, keepdim=True) + 1e-12).all()
    assert torch.equal(dequantize_rows(quantized, slice(3, 7)), dequantize(quantized)[3:7])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_nan_and_no_infinity(kind: str, value: float) -> None:
    weight = random_weight()
    weight[5, 77] = value
    with pytest.raises(RefusedError, match=r"the.weight holds .*(nan|inf) at \[5, 77\]"):
        quantize("the.weight", weight, QuantSpec(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_denormals_and_outliers(kind: str) -> None:
    weight = torch.zeros(4, 128)
    weight[1] = 1e-40
    weight[2, 7] = 1e38
    weight[3] = torch.linspace(-1, 1, 128)
    quantized = quantize("w", weight, QuantSpec(kind, scale_bits=32))
    back = dequantize(quantized)
    assert back.isfinite().all()
    assert torch.equal(back[0], torch.zeros(128))
    assert back[1].abs().max() <= 1e-38
    assert back[2, 7] == pytest.approx(1e38, rel=0.01)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.83), ("fp4", 0.9), ("int4", 0.83), ("int4-32", 0.82)])
def test_a_search_loses_less(kind: str, most: float) -> None:
    """Shares of the plain error's square, on normal weights; and in no block much more, which the kept scale costs."""
    weight, spec = random_weight(200, 640), QuantSpec(kind)
    plain, found = (dequantize(quantize("w", weight, spec, search)) - weight.float() for search in (None, Search()))
    blocks = [error.view(200, -1, spec.block_size).square().sum(-1) for error in (plain, found)]
    assert blocks[1].sum() < most * blocks[0].sum()
    assert (blocks[1] <= blocks[0] * 1.03 + 1e-12).all()


@pytest.mark.parametrize("kind", ["nf4", "int4", "int4-32"])
def test_a_search_prefers_the_columns_that_count(kind: str) -> None:
    weight = random_weight(100, 256)
    importance = torch.ones(256)
    importance[::8] = 50.0
    errors = [
        (dequantize(quantize("w", weight, QuantSpec(kind), search)) - weight.float()).square()
        for search in (Search(), Search(importance))
    ]
    even, weighted = ((error * importance).sum() for error in errors)
    assert weighted < 0.75 * even
    assert errors[1].sum() > errors[0].sum()


def test_affine_codes_are_multiples_above_a_zero() -> None:
    """Block [0, 1, ..., 63] / 4 + 1 of scale 1.05 and zero 1, written out."""
    weight = (torch.arange(64.0) / 4 + 1)[None]
    quantized = quantize("w", weight, QuantSpec("int4", 32))
    assert isinstance(quantized, QuantTensor)
    assert quantized.scales.tolist() == [[pytest.approx(15.75 / 15), 1.0]]
    assert unpack_nibbles(quantized.codes)[0, :6].tolist() == [0, 0, 0, 1, 1, 1]
    assert dequantize(quantized)[0, 63].item() == pytest.approx(16.75)


def test_two_halves_of_a_block_have_their_own_range() -> None:
    weight = torch.cat((torch.linspace(0, 15, 32), torch.linspace(100, 115, 32)))[None]
    quantized = quantize("w", weight, QuantSpec("int4-32", 32))
    assert isinstance(quantized, QuantTensor)
    assert quantized.scales.tolist() == [[pytest.approx(1.0), pytest.approx(1.0), 0.0, 100.0]]
    assert ((dequantize(quantized) - weight).abs() <= 0.5001).all()


def test_a_scale_beyond_16_bits_is_refused_with_the_way_out() -> None:
    weight = torch.full((2, 64), 1e6)
    with pytest.raises(RefusedError, match="16-bit scale") as refusal:
        quantize("w", weight, QuantSpec("nf4"))
    assert "--scales 32" in refusal.value.hint
    assert torch.equal(dequantize(quantize("w", weight, QuantSpec("nf4", scale_bits=32))), weight)


def test_odd_columns_need_int8() -> None:
    with pytest.raises(RefusedError, match="7 columns"):
        quantize("w", torch.ones(2, 7), QuantSpec("nf4"))


def test_relative_error_is_rms_over_rms() -> None:
    weight = random_weight()
    quantized = quantize("w", weight, QuantSpec("nf4"))
    difference = dequantize(quantized) - weight.float()
    expected = (difference.norm() / weight.float().norm()).item()
    assert relative_error(weight, quantized) == pytest.approx(expected, rel=1e-5)
    assert relative_error(torch.zeros(2, 64), quantize("w", torch.zeros(2, 64), QuantSpec("nf4"))) == 0


def test_first_element_is_the_high_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    assert pack_nibbles(codes).tolist() == [[0x12, 0xF0]]
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [(64, 96), (36, 50), (576, 1536)])
def test_record_round_trip_and_alignment(kind: str, dims: tuple[int, int]) -> None:
    layout = ExpertLayout(*dims, QuantSpec(kind))
    weights = {name: quantize(name, random_weight(*shape), layout.spec) for name, shape in layout.shapes.items()}
    record = torch.zeros(layout.stride, dtype=torch.uint8)
    views = read_record(layout, record)
    for name in layout.shapes:
        quantize_rows(name, random_weight(*layout.shapes[name]), layout.spec, out=getattr(views, name))
    read = read_record(layout, record.clone())
    for name in weights:
        ours, theirs = getattr(read, name), weights[name]
        if isinstance(theirs, QuantTensor):
            assert torch.equal(ours.scales, theirs.scales)
        assert torch.equal(dequantize(ours), dequantize(theirs))
    assert layout.stride % 4096 == 0
    assert all(part.offset % 64 == 0 for part in layout.parts)
    assert [part.name for part in layout.parts][:3] == ["w1.codes", "w3.codes", "w2.codes"]
    assert not record[layout.nbytes :].any()


def test_mixtral_expert_bytes() -> None:
    """94 to 99 MB at 4 bits, 187 MB at most at 8, 352 MB in bfloat16."""
    sizes = {kind: ExpertLayout(4096, 14336, QuantSpec(kind)).stride / 1e6 for kind in KINDS}
    assert 90 < sizes["nf4"] < 99
    assert 98 < sizes["int4"] < 100
    assert 109 < sizes["int4-32"] < 111
    assert 176 < sizes["int8"] < 187
    assert 352 < sizes["bf16"] < 353


@pytest.mark.parametrize("kind", ["nf4", "int4", "int4-32"])
@pytest.mark.parametrize("wide", range(8))
def test_wide_matrices_are_int8_and_the_others_what_the_recipe_says(kind: str, wide: int) -> None:
    layout, plain = ExpertLayout(64, 96, QuantSpec(kind), wide), ExpertLayout(64, 96, QuantSpec(kind))
    record = torch.zeros(layout.stride, dtype=torch.uint8)
    views = read_record(layout, record)
    for name, shape in layout.shapes.items():
        spec = WIDE if wide & WIDE_BITS[name] else QuantSpec(kind)
        assert layout.spec_of(name) == getattr(views, name).spec == spec
        quantize_rows(name, random_weight(*shape), spec, out=getattr(views, name))
    read = read_record(layout, record.clone())
    for name, shape in layout.shapes.items():
        expected = quantize(name, random_weight(*shape), layout.spec_of(name))
        assert torch.equal(dequantize(getattr(read, name)), dequantize(expected))
    assert layout.stride % 4096 == 0
    assert all(part.offset % 64 == 0 for part in layout.parts)
    assert all(one.offset + one.nbytes <= next_.offset for one, next_ in pairwise(layout.parts))
    assert layout.nbytes - plain.nbytes >= wide.bit_count() * 64 * 96 // 4  # half a byte more, less its scales


def test_records_of_different_sizes_lie_one_behind_the_other() -> None:
    masks = (0, 7, 1, 0, 6, 7)
    layouts = ExpertLayouts(64, 96, QuantSpec("nf4"), 6, masks)
    single = [ExpertLayout(64, 96, QuantSpec("nf4"), mask) for mask in masks]
    assert [layouts[index] for index in range(len(layouts))] == single
    assert [layouts.stride(index) for index in range(6)] == [layout.stride for layout in single]
    assert list(layouts.offsets) == [sum(layout.stride for layout in single[:count]) for count in range(7)]
    assert layouts.nbytes == layouts.offsets[-1]
    assert layouts.largest == single[1]
    assert {layout.wide for layout in layouts.formats} == {0, 1, 6, 7}
    for index in range(6):
        first, last = layouts.offsets[index], layouts.offsets[index + 1] - 1
        assert {layouts.at(first), layouts.at((first + last) // 2), layouts.at(last)} == {index}


def test_without_masks_all_records_are_alike() -> None:
    layouts, layout = ExpertLayouts(64, 96, QuantSpec("nf4"), 5), ExpertLayout(64, 96, QuantSpec("nf4"))
    assert layouts.formats == (layout,)
    assert layouts.offsets == tuple(index * layout.stride for index in range(6))
    assert {layouts[index] for index in range(5)} == {layouts.largest} == {layout}
