"""Imports point one way: a package may import itself and anything to its right."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mixlocal"
LAYERS = ("cli", "app", "engine", "model", "experts", "store", "kernels", "quant", "errors")
FILES = sorted(ROOT.rglob("*.py"))


def layer(module: str) -> int | None:
    parts = module.split(".")
    return LAYERS.index(parts[1]) if parts[0] == "mixlocal" and len(parts) > 1 and parts[1] in LAYERS else None


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_right(path: Path) -> None:
    own = layer("mixlocal." + ".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        other = layer(module)
        if own is not None and other is not None:
            assert other >= own, f"{path.name} imports {module}"


def test_only_cli_talks() -> None:
    """Below cli: no print, no exit, no click and no rich."""
    for path in FILES:
        if path.parent.name == "cli":
            continue
        names = {module.split(".")[0] for module in imports(path)}
        assert not names & {"click", "rich"}, path
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not {func.id for func in calls if isinstance(func, ast.Name)} & {"print", "exit", "input"}, path


def test_no_archives_no_pickles() -> None:
    """Nothing unpacks an archive, but for the one member of smolmix's package, and nothing unpickles."""
    for path in FILES:
        names = {module.split(".")[0] for module in imports(path)}
        allowed = {"zipfile"} if path.name == "smolmix.py" else set()
        assert not (names & {"pickle", "tarfile", "zipfile", "marshal", "shelve"}) - allowed, path
        assert not re.search(r"(?<!safetensors\.)torch\.load", path.read_text()), path
