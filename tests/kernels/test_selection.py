"""Which kernels are taken, with which threads, and what is left without the compiled module."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from mixlocal.errors import UsageError
from mixlocal.kernels import select
from mixlocal.kernels.cpu import CpuKernels
from mixlocal.kernels.isa import native_isas, set_threads
from mixlocal.kernels.quantizer import quantize_rows
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.quant.format import QuantSpec

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("count", [0, -3])
@pytest.mark.parametrize("chosen", [*native_isas(), "reference"])
def test_no_threads_cannot_compute(chosen: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXLOCAL_ISA", chosen)
    before = torch.get_num_threads()
    with pytest.raises(UsageError, match=f"^{count} threads"):
        set_threads(count)
    assert torch.get_num_threads() == before


def test_calls_from_several_threads_do_not_disturb_each_other(isa: str, threads: None) -> None:
    set_threads(3)
    kernels, weight = CpuKernels(isa), torch.randn(300, 128)
    inputs = [torch.randn(tokens, 128) for tokens in (1, 2, 9, 30) * 8]
    expected = [kernels.linear(x, weight) for x in inputs]
    with ThreadPoolExecutor(4) as callers:
        results = list(callers.map(lambda x: kernels.linear(x, weight), inputs))
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


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
from mixlocal.kernels.isa import MISSING, native_isa
from mixlocal.kernels.quantizer import quantize_rows
from mixlocal.quant.format import QuantSpec
weight, error = quantize_rows("w", torch.linspace(-1, 1, 1024).view(8, 128), QuantSpec("nf4"))
out = select("cpu").linear(torch.linspace(0, 1, 128).view(1, 128), weight)
print(select("cpu").name, native_isa(), bool(MISSING), round(error, 6), *[round(v, 3) for v in out[0].tolist()])
"""
    words = run_python(code).split()
    weight, error = quantize_rows("w", torch.linspace(-1, 1, 1024).view(8, 128), QuantSpec("nf4"))
    out = ReferenceKernels().linear(torch.linspace(0, 1, 128).view(1, 128), weight)
    assert words[:3] == ["reference", "None", "True"]
    assert [float(word) for word in words[3:]] == pytest.approx([error, *out[0].tolist()], abs=2e-3)


def test_the_interpreter_ends_while_threads_wait(isa: str) -> None:
    code = f"""
import torch
from mixlocal.kernels.cpu import CpuKernels
from mixlocal.kernels.isa import set_threads
set_threads(8)
print(CpuKernels({isa!r}).linear(torch.ones(1, 64), torch.ones(999, 64, dtype=torch.bfloat16)).sum().item())
"""
    assert float(run_python(code)) == 999 * 64
