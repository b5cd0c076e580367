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
        if path.is_relative_to(ROOT / "cli"):
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


WRITING_NAMES = {
    "os.replace", "os.rename", "os.renames", "os.link", "os.symlink", "os.truncate", "os.write", "os.pwrite",
    "os.O_CREAT", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copyfileobj", "shutil.copytree",
    "shutil.move", "tempfile.mkstemp", "tempfile.NamedTemporaryFile", "torch.save", "safetensors.torch.save_file",
}  # fmt: skip
WRITING_METHODS = {"write_text", "write_bytes", "rename", "tofile", "symlink_to", "hardlink_to", "touch"}


def writes(source: str) -> Iterator[str]:
    """Every place where a module names or calls what changes a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield from (name for alias in node.names if (name := f"{node.module}.{alias.name}") in WRITING_NAMES)
        elif isinstance(node, ast.Attribute):
            yield from {ast.unparse(node)} & WRITING_NAMES
        elif isinstance(node, ast.Call) and is_write(node):
            yield ast.unparse(node)


def is_write(call: ast.Call) -> bool:
    """open() to write, as a function or a method; a writing method of a path, whose replace() takes one argument."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name in {"open", "fdopen"}:
        values = (*call.args, *(keyword.value for keyword in call.keywords))
        return any(re.fullmatch(r"'[rbt]*[wax+][rwaxbt+]*'", ast.unparse(value)) for value in values)
    is_method = isinstance(call.func, ast.Attribute)
    return is_method and (name in WRITING_METHODS or (name == "replace" and len(call.args) == 1 and not call.keywords))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_durable_writes_files(path: Path) -> None:
    if path != ROOT / "store" / "durable.py":
        assert list(writes(path.read_text())) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open(path, 'w')", True), ("path.open(mode='r+b')", True), ("path.write_text('')", True),
        ("os.replace(a, b)", True), ("from os import rename", True), ("shutil.copyfile(a, b)", True),
        ("path.replace(other)", True), ("open(path)", False), ("path.open('rb')", False),
        ("Session.open('smolmix')", False), ("text.replace('a', 'b')", False), ("replace(value, x=1)", False),
    ],
)  # fmt: skip
def test_a_write_is_seen(line: str, found: bool) -> None:
    assert bool(list(writes(line))) is found
