"""The tokenizers of these tests: Mixtral's in both formats, a byte-level one, and the libraries to compare with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from vocabularies import V1_MODEL, byte_level_document, mixtral_document

from mixlocal.app.tokenizer import Tokenizer
from mixlocal.app.tokenizers import load_tokenizer


@pytest.fixture(scope="session")
def v1_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v1")
    shutil.copy(V1_MODEL, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def v1(v1_folder: Path) -> Tokenizer:
    return load_tokenizer(v1_folder)


@pytest.fixture(scope="session")
def oracle() -> Any:
    """mistral-common's v1 sentencepiece tokenizer."""
    return MistralTokenizer.v1().instruct_tokenizer.tokenizer


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, oracle: Any) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.json").write_text(json.dumps(mixtral_document(oracle)))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> Tokenizer:
    return load_tokenizer(llama_folder)


@pytest.fixture(scope="session")
def smol_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smol")
    (folder / "tokenizer.json").write_text(json.dumps(byte_level_document()))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}'
    )
    return folder


@pytest.fixture(scope="session")
def smol(smol_folder: Path) -> Tokenizer:
    return load_tokenizer(smol_folder)


@pytest.fixture(scope="session")
def smol_library(smol_folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(smol_folder / "tokenizer.json"))
