"""Which tokenizer a model's folder holds."""

from __future__ import annotations

from pathlib import Path

from mixlocal.app.tokenizer import Tokenizer
from mixlocal.app.tokenizer_files import is_there
from mixlocal.errors import NotFoundError


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, else tokenizer.model.

    Raises NotFoundError when neither is there, CorruptError or RefusedError naming the file and what is wrong with it.
    """
    # Imported here: each format's library takes tens of milliseconds to load, and no model needs both.
    if is_there(folder / "tokenizer.json"):
        from mixlocal.app.tokenizer_json import JsonTokenizer

        return JsonTokenizer(folder)
    if is_there(folder / "tokenizer.model"):
        from mixlocal.app.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(folder)
    raise NotFoundError(f"no tokenizer.json and no tokenizer.model in {folder}")
