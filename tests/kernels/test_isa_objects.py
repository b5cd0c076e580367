"""The object of an instruction set shares no code with other files: a weak symbol is one of which the linker keeps any
copy, and if that is AVX-512's, every machine without it stops with an illegal instruction."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


def test_isa_objects_share_no_code_with_other_files(
    compiler: str, isa_sources: dict[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    with ThreadPoolExecutor(2) as jobs:
        shared = list(jobs.map(lambda item: shared_symbols(compiler, *item, tmp_path), isa_sources.items()))
    assert shared == [[]] * len(isa_sources)


def test_a_shared_function_would_be_seen(compiler: str, tmp_path: Path) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    source = tmp_path / "standard.cpp"
    source.write_text("#include <algorithm>\nint larger(int a, int b) { return std::max(a, b); }\n")
    assert len(shared_symbols(compiler, source, ("-std=c++17",), tmp_path)) == 1


def shared_symbols(compiler: str, source: Path, options: tuple[str, ...], folder: Path) -> list[str]:
    """Compiled so that calls stay calls, which an optimizer may or may not inline."""
    target = folder / f"{source.stem}.o"
    subprocess.run([compiler, *options, "-O1", "-fno-inline", "-w", "-c", source, "-o", target], check=True)
    listing = subprocess.run(["nm", "-C", target], capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if line[17:18] in "WVuvw"]
