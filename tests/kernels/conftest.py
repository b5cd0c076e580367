"""Every instruction set of this machine in turn, and how its source is compiled."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mixlocal.kernels.isa import MISSING, native_isas, set_threads

SOURCES = Path(__file__).parents[2] / "mixlocal" / "kernels" / "native" / "src"
ISAS = native_isas() or (pytest.param("none", marks=pytest.mark.skip(f"no compiled kernels: {MISSING}")),)

# As in native/CMakeLists.txt.
BASE = ("-std=c++17", "-ffp-contract=off")
AVX2 = ("-DMIXLOCAL_X86", "-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
OPTIONS = {
    "x86_64": {
        "kernels_scalar.cpp": ("-DMIXLOCAL_X86",),
        "kernels_avx2.cpp": AVX2,
        "kernels_avx512.cpp": AVX512,
        "kernels_avx512vnni.cpp": (*AVX512, "-mavx512vnni"),
    },
    "aarch64": {
        "kernels_scalar.cpp": ("-DMIXLOCAL_NEON",),
        "kernels_neon.cpp": ("-DMIXLOCAL_NEON", "-march=armv8.2-a+dotprod"),
    },
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    torch.set_num_threads(1)  # as `set_threads` has it where the compiled kernels compute
    monkeypatch.setenv("MIXLOCAL_ISA", request.param)
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    """For a test that sets threads: as many as before, afterwards."""
    yield
    set_threads(len(os.sched_getaffinity(0)))


@pytest.fixture(scope="session")
def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not found:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(scope="session")
def isa_sources() -> dict[Path, tuple[str, ...]]:
    """The sources of this machine's instruction sets, and what to compile each with."""
    sources = OPTIONS.get(platform.machine(), {"kernels_scalar.cpp": ()})
    return {SOURCES / name: (*BASE, *options) for name, options in sources.items()}
