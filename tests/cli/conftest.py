"""Runs the program in this process: exit code, stdout and stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import tiny
import torch
from stores import install_smolmix, quantized

from mixlocal.app.footprint import stored_bytes
from mixlocal.app.model_run import store_config
from mixlocal.cli import main
from mixlocal.experts.plan import BASE_BYTES
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two variants of one tiny model, and its checkpoint beside them."""
    root = tmp_path_factory.mktemp("home")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=512)
    for variant in ("q4", "bf16"):
        quantized(checkpoint, root / "models" / "tiny" / variant, variant)
    return root


@pytest.fixture(scope="session")
def tiny_budget(home: Path) -> Callable[..., int]:
    """The smallest --ram for "tiny" that holds so many of its eight experts beside so many tokens of context."""

    def smallest(experts: int, context: int) -> int:
        store = ModelStore.open(home / "models" / "tiny" / "q4")
        needs = stored_bytes(store.manifest, store_config(store), torch.float16)
        return BASE_BYTES + needs.trunk + context * needs.kv_token + needs.scratch + experts * needs.record

    return smallest


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose model has no end-of-sequence token: it talks until it is stopped."""
    root = tmp_path_factory.mktemp("endless")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=16384, eos_token_id=None)
    (checkpoint / "tokenizer_config.json").write_text("{}")
    return quantized(checkpoint, root / "endless").folder


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("MIXLOCAL_HOME", str(home))

    def invoke(*arguments: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(stdin)))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return invoke


@pytest.fixture(scope="session")
def smolmix(smolmix_folders: Home, smolmix_reference: ModelStore) -> ModelStore:
    """smolmix:q8."""
    return install_smolmix("q8", smolmix_folders)[0]


@pytest.fixture
def place(smolmix: ModelStore, smolmix_folders: Home, tmp_path: Path) -> Path:
    """A home of its own with smolmix in it."""
    (tmp_path / "models").symlink_to(smolmix_folders.models)
    return tmp_path
