"""Every instruction set of this machine against the reference, which is the specification."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixlocal.errors import RefusedError, UsageError
from mixlocal.kernels import Kernels, select
from mixlocal.kernels.cpu import MISSING, CpuKernels, native_isas, quantize_rows, set_threads
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.quant.format import CODEBOOKS, ExpertWeights, QuantSpec, QuantTensor, Weight
from mixlocal.quant.packing import pack_nibbles
from mixlocal.quant.quantize import dequantize, quantize, relative_error

ROOT = Path(__file__).parents[2]
NO_KERNELS = pytest.param("none", marks=pytest.mark.skip(f"no compiled kernels: {MISSING}"))
ISAS = native_isas() or (NO_KERNELS,)
SPECS = {
    "nf4": QuantSpec("nf4"),
    "nf4-32": QuantSpec("nf4", 32),
    "fp4": QuantSpec("fp4"),
    "int8": QuantSpec("int8"),
    "bf16": QuantSpec("bf16"),
}
EVEN_SHAPES = ((1, 2), (3, 62), (5, 64), (7, 66), (2, 128), (33, 130), (25, 194), (70, 576), (26, 1000))
ODD_SHAPES = ((1, 1), (5, 3), (17, 77), (31, 257))
TOKENS = (1, 2, 3, 7, 16, 64, 300)

# `quantize` warns once per process about a copy it makes where the columns are not whole blocks.
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MIXLOCAL_ISA", request.param)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    set_threads(len(os.sched_getaffinity(0)))


def close(result: torch.Tensor, x: torch.Tensor, weight: Weight) -> bool:
    """Whether a product is right but for the order of float32 additions."""
    exact = dequantize(weight)
    expected = ReferenceKernels().linear(x, weight)
    slack = 4e-6 * (x.abs() @ exact.abs().T) + 1e-36
    return bool(((result - expected).abs() <= slack).all())


@pytest.mark.parametrize("kind", SPECS)
def test_linear_equals_the_reference(isa: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    kernels = CpuKernels(isa)
    for shape in EVEN_SHAPES + (() if SPECS[kind].four_bit else ODD_SHAPES):
        weight = quantize("w", torch.randn(shape, generator=generator), SPECS[kind])
        for tokens in TOKENS:
            x = torch.randn(tokens, shape[1], generator=generator)
            assert close(kernels.linear(x, weight), x, weight), (shape, tokens)


@pytest.mark.parametrize("tokens", [6, 13, 520])
def test_linear_at_the_edges_of_its_blocking(isa: str, tokens: int) -> None:
    weight = quantize("w", torch.randn(49, 640), SPECS["nf4"])
    x = torch.randn(tokens, 640)
    assert close(CpuKernels(isa).linear(x, weight), x, weight)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_linear_with_hard_numbers(isa: str, kind: str, tokens: int) -> None:
    """All-zero blocks, denormal weights and activations, outliers a thousand times the rest."""
    weight = torch.randn(24, 256)
    weight[0] = 0.0
    weight[1:3, 64:128] = 0.0
    weight[3] *= 1e-41
    weight[4, 7] = 3000.0
    x = torch.randn(tokens, 256)
    x[:, :64] *= 1e-40
    x[:, 200] = 1e4
    quantized = quantize("w", weight, SPECS[kind])
    assert close(CpuKernels(isa).linear(x, quantized), x, quantized)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("tokens", [2, 20])
def test_a_nan_spoils_its_own_token_and_no_other(isa: str, kind: str, tokens: int) -> None:
    weight = quantize("w", torch.randn(30, 192), SPECS[kind])
    x = torch.randn(tokens, 192)
    x[1, 100] = torch.nan
    out = CpuKernels(isa).linear(x, weight)
    assert out[1].isnan().all()
    assert not out[[t for t in range(tokens) if t != 1]].isnan().any()


def test_every_float16_scale_is_read_exactly(isa: str) -> None:
    scales = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    scales = scales[scales.isfinite()].unsqueeze(1)
    codes = torch.full((len(scales), 64), CODEBOOKS["nf4"].index(0.0), dtype=torch.uint8)
    codes[:, 5] = CODEBOOKS["nf4"].index(1.0)
    weight = QuantTensor(QuantSpec("nf4"), (len(scales), 64), pack_nibbles(codes), scales)
    x = torch.zeros(1, 64)
    x[0, 5] = 1.0
    assert torch.equal(CpuKernels(isa).linear(x, weight), scales.float().T)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("kind", SPECS)
def test_threads_do_not_change_a_bit(isa: str, kind: str, tokens: int, threads: None) -> None:
    weight = quantize("w", torch.randn(500, 320), SPECS[kind])
    x = torch.randn(tokens, 320)
    results = []
    for count in (1, 2, 5):
        set_threads(count)
        results.append(CpuKernels(isa).linear(x, weight))
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("kind", SPECS)
def test_up_to_four_tokens_do_not_change_each_other(isa: str, kind: str) -> None:
    kernels, weight = CpuKernels(isa), quantize("w", torch.randn(50, 194), SPECS[kind])
    x = torch.randn(2, 194)
    alone = torch.cat([kernels.linear(x[t : t + 1], weight) for t in range(2)])
    assert torch.equal(kernels.linear(x, weight), alone)


def test_plain_float32_weights_and_strided_activations(isa: str) -> None:
    weight, x = torch.randn(8, 12), torch.randn(12, 5).T
    assert close(CpuKernels(isa).linear(x, weight), x, weight)
    rounded = weight.to(torch.bfloat16)
    assert close(CpuKernels(isa).linear(x, rounded), x, rounded)


def test_no_tokens_and_no_rows(isa: str) -> None:
    weight = quantize("w", torch.randn(4, 64), SPECS["nf4"])
    assert CpuKernels(isa).linear(torch.empty(0, 64), weight).shape == (0, 4)
    for tokens in (2, 20):
        x = torch.randn(tokens, 3)
        assert CpuKernels(isa).linear(x, torch.empty(0, 3, dtype=torch.bfloat16)).shape == (tokens, 0)
        assert not CpuKernels(isa).linear(x[:, :0], torch.empty(4, 0, dtype=torch.bfloat16)).any()


def damaged(weight: QuantTensor, part: str, tensor: torch.Tensor) -> QuantTensor:
    codes, scales = (tensor, weight.scales) if part == "codes" else (weight.codes, tensor)
    return QuantTensor(weight.spec, weight.shape, codes, scales)


def test_operands_that_do_not_fit_are_refused(isa: str) -> None:
    kernels, x = CpuKernels(isa), torch.randn(2, 128)
    weight = quantize("w", torch.randn(6, 128), SPECS["nf4"])
    assert isinstance(weight, QuantTensor)
    wrong: list[tuple[torch.Tensor, Weight]] = [
        (x[:, :64], weight),
        (x.double(), weight),
        (x[0], weight),
        (x, damaged(weight, "codes", weight.codes[:, :-1])),
        (x, damaged(weight, "codes", weight.codes.to(torch.int16))),
        (x, damaged(weight, "scales", weight.scales.float())),
        (x, damaged(weight, "scales", weight.scales[:3])),
        (x, damaged(weight, "codes", weight.codes.T.contiguous().T)),
        (x, torch.randn(6, 128).to(torch.bfloat16).T.contiguous().T),
        (x, torch.randn(6, 128, dtype=torch.float16)),
        (x, torch.randn(6, 127).to(torch.bfloat16)),
    ]
    for activations, operand in wrong:
        with pytest.raises(RefusedError):
            kernels.linear(activations, operand)


def moe_case(spec: QuantSpec) -> tuple[dict[int, ExpertWeights], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Six experts, of which 4 is never chosen and 1 is chosen twice by one token."""

    def random(rows: int, columns: int) -> Weight:
        return quantize("w", torch.randn(rows, columns) * 0.1, spec)

    experts = {e: ExpertWeights(w1=random(96, 64), w3=random(96, 64), w2=random(64, 96)) for e in (0, 1, 2, 3, 5)}
    ids = torch.tensor([[0, 1], [5, 2], [1, 1], [3, 0], [2, 5], [5, 0], [0, 2]])
    return experts, torch.randn(7, 64), ids, torch.rand(7, 2)


def naive_moe(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: dict[int, ExpertWeights]
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for t, chosen in enumerate(ids.tolist()):
        for k, e in enumerate(chosen):
            w1, w3, w2 = (dequantize(w) for w in (experts[e].w1, experts[e].w3, experts[e].w2))
            out[t] += weights[t, k] * (w2 @ (torch.nn.functional.silu(w1 @ x[t]) * (w3 @ x[t])))
    return out


@pytest.mark.parametrize("kind", SPECS)
def test_moe_ffn_equals_a_naive_loop(isa: str, kind: str) -> None:
    experts, x, ids, weights = moe_case(SPECS[kind])
    every: tuple[Kernels, ...] = (ReferenceKernels(), CpuKernels(isa))
    for kernels in every:
        out = kernels.moe_ffn(x, ids, weights, experts)
        torch.testing.assert_close(out, naive_moe(x, ids, weights, experts), rtol=1e-5, atol=1e-5)


def test_moe_ffn_refuses_what_does_not_fit() -> None:
    experts, x, ids, weights = moe_case(SPECS["nf4"])
    kernels = ReferenceKernels()
    with pytest.raises(RefusedError, match=r"experts \[4\]"):
        kernels.moe_ffn(x, torch.full_like(ids, 4), weights, experts)
    for bad in ((x, ids.int(), weights), (x[1:], ids, weights), (x, ids, weights.double()), (x, ids, weights[:, :1])):
        with pytest.raises(RefusedError):
            kernels.moe_ffn(*bad, experts)
    assert kernels.moe_ffn(x[:0], ids[:0], weights[:0], experts).shape == (0, 64)


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
@pytest.mark.parametrize("kind", ["nf4", "nf4-32", "fp4", "int8"])
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
@pytest.mark.parametrize("kind", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_quantize_rows_names_the_first_number_that_is_none(
    isa: str, kind: str, dtype: torch.dtype, value: float
) -> None:
    weight = torch.randn(60, 130).to(dtype)
    weight[41, 129] = value
    weight[50, 2] = torch.nan
    with pytest.raises(RefusedError, match=rf"^w1 holds {value} at \[41, 129\]"):
        quantize_rows("w1", weight, SPECS[kind])


def test_quantize_rows_refuses_what_the_format_cannot_hold(isa: str) -> None:
    with pytest.raises(RefusedError, match="16-bit scale"):
        quantize_rows("w", torch.full((2, 64), 1e5), SPECS["nf4"])
    with pytest.raises(RefusedError, match="packed"):
        quantize_rows("w", torch.randn(2, 63), SPECS["nf4"])
    assert quantize_rows("w", torch.zeros(2, 64), SPECS["nf4"])[1] == 0.0


def test_selection(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert select().name == f"cpu-{isa}"
    monkeypatch.delenv("MIXLOCAL_ISA")
    assert select("cpu").name == f"cpu-{native_isas()[0]}"
    monkeypatch.setenv("MIXLOCAL_ISA", "reference")
    assert select("cpu").name == "reference"
    monkeypatch.setenv("MIXLOCAL_ISA", "sse9")
    with pytest.raises(UsageError) as caught:
        select("cpu")
    assert all(name in caught.value.hint for name in (*native_isas(), "reference"))
    with pytest.raises(UsageError):
        select("toaster")


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_without_the_compiled_module_the_reference_gives_the_same() -> None:
    """As on a machine where the installation found no compiler."""
    code = """
import sys
sys.modules["mixlocal.kernels.native._native"] = None
import torch
from mixlocal.kernels import select
from mixlocal.kernels.cpu import MISSING, native_isa, quantize_rows
from mixlocal.quant.format import QuantSpec
weight, error = quantize_rows("w", torch.linspace(-1, 1, 1024).view(8, 128), QuantSpec("nf4"))
out = select("cpu").linear(torch.linspace(0, 1, 128).view(1, 128), weight)
print(select("cpu").name, native_isa(), bool(MISSING), round(error, 6), *[round(v, 3) for v in out[0].tolist()])
"""
    words = run_python(code).split()
    weight, error = quantize_rows("w", torch.linspace(-1, 1, 1024).view(8, 128), SPECS["nf4"])
    out = select("cpu").linear(torch.linspace(0, 1, 128).view(1, 128), weight)
    assert words[:3] == ["reference", "None", "True"]
    assert [float(word) for word in words[3:]] == pytest.approx([error, *out[0].tolist()], abs=2e-3)


def test_the_interpreter_ends_while_threads_wait(isa: str) -> None:
    code = f"""
import torch
from mixlocal.kernels.cpu import CpuKernels, set_threads
set_threads(8)
print(CpuKernels({isa!r}).linear(torch.ones(1, 64), torch.ones(999, 64, dtype=torch.bfloat16)).sum().item())
"""
    assert float(run_python(code)) == 999 * 64


def test_isa_objects_share_no_code_with_other_files() -> None:
    """A weak symbol is one the linker may take from the AVX-512 object and put in everybody's path."""
    objects = sorted(ROOT.glob("build/*/CMakeFiles/_native.dir/src/kernels_*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("no objects under build/, or no nm: the kernels were not compiled in this tree")
    for path in objects:
        listing = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        shared = [line for line in listing.splitlines() if line[17:18] in "WVuw"]
        assert not shared, f"{path.name}: {shared}"
