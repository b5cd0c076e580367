"""The native sources under sanitizers, driven by sanitized_driver.cpp without Python: no access outside an array, no
undefined behaviour, no data race, and the same results on every instruction set."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("sanitized_driver.cpp")
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=0",  # the pool's threads sleep until the process ends, with all they hold
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


@dataclass(frozen=True)
class Build:
    """A compiler and what all of its sources are compiled with."""

    compiler: str
    options: tuple[str, ...]
    folder: Path

    def program(self, sources: dict[Path, tuple[str, ...]]) -> Path:
        with ThreadPoolExecutor(2) as jobs:
            objects = list(jobs.map(lambda item: self._compiled(*item), sources.items()))
        target = self.folder / "driver"
        self._run(*objects, "-o", target, "-pthread")
        return target

    def _compiled(self, source: Path, options: tuple[str, ...]) -> Path:
        target = self.folder / f"{source.stem}.o"
        self._run(*options, "-c", source, "-o", target)
        return target

    def _run(self, *arguments: str | Path) -> None:
        done = subprocess.run([self.compiler, *self.options, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def build(request: pytest.FixtureRequest, compiler: str, tmp_path: Path) -> Build:
    """A build with the sanitizers named by the parameter."""
    options = (f"-fsanitize={request.param}", "-fno-sanitize-recover=all", "-O1", "-g1", "-w")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    try_out = subprocess.run([compiler, *options, empty, "-o", tmp_path / "empty"], capture_output=True, text=True)
    if try_out.returncode != 0:
        pytest.skip(f"{compiler} has no -fsanitize={request.param}: {try_out.stderr.strip()}")
    if subprocess.run([tmp_path / "empty"], capture_output=True, env=os.environ | ENVIRONMENT).returncode != 0:
        pytest.skip(f"programs built with -fsanitize={request.param} do not start here")
    return Build(compiler, options, tmp_path)


@pytest.mark.parametrize("build", ["address,undefined"], indirect=True)
def test_no_access_outside_an_array(build: Build, isa_sources: dict[Path, tuple[str, ...]]) -> None:
    """Every instruction set; each piece of the kernels' scratch memory is an allocation of its own."""
    output = run(build.program(sources(isa_sources, DRIVER.with_name("exact_arena.cpp"))))
    assert output.count("outputs") >= 1


@pytest.mark.parametrize("build", ["thread"], indirect=True)
def test_no_data_race(build: Build, isa_sources: dict[Path, tuple[str, ...]]) -> None:
    """What threads share does not depend on the instruction set: plain C++ alone."""
    scalar = {source: ("-std=c++17", "-ffp-contract=off") for source in isa_sources if "scalar" in source.name}
    assert run(build.program(sources(scalar, next(iter(scalar)).with_name("arena.cpp")))).startswith("scalar:")


def sources(isa_sources: dict[Path, tuple[str, ...]], arena: Path) -> dict[Path, tuple[str, ...]]:
    """Everything but the Python module; the slowest to compile first."""
    scalar = next(source for source in isa_sources if source.name == "kernels_scalar.cpp")
    options = (*isa_sources[scalar], f"-I{scalar.parent}")
    others = [s for s in scalar.parent.glob("*.cpp") if not s.name.startswith(("kernels_", "module", "arena"))]
    return {scalar: options, DRIVER: options, **isa_sources, **dict.fromkeys([*others, arena], options)}


def run(program: Path) -> str:
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr[:4000]
    return done.stdout
