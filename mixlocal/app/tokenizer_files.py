"""The files of a tokenizer, read with suspicion: sizes, types and ids are checked, and every error names its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from mixlocal.errors import CorruptError, RefusedError
from mixlocal.store.durable import named_errors

MAX_FILE_BYTES = 128 << 20
MAX_TOKEN_ID = 1 << 22

Shape = TypeVar("Shape")


class TokenText(msgspec.Struct):
    """A token where a configuration gives it as an object; elsewhere it is a string."""

    content: str
    special: bool = False


class AddedToken(TokenText, kw_only=True):
    id: int


class Decoder(msgspec.Struct):
    """A step of tokenizer.json's `decoder`, or a sequence of them."""

    type: str
    decoders: list[Decoder] = []
    pattern: dict[str, str] | None = None
    content: str = ""
    start: int = 0
    stop: int = 0


class Model(msgspec.Struct):
    """tokenizer.json's `model`: BPE has a dict of ids, Unigram a list of pieces and scores."""

    vocab: dict[str, int] | list[tuple[str, float]]
    unk_token: str | None = None
    unk_id: int | None = None


class TokenizerFile(msgspec.Struct):
    """tokenizer.json, as far as we read it ourselves."""

    model: Model
    added_tokens: list[AddedToken] = []
    decoder: Decoder | None = None


class TokenizerConfig(msgspec.Struct):
    """tokenizer_config.json."""

    bos_token: str | TokenText | None = None
    eos_token: str | TokenText | None = None
    add_bos_token: bool | None = None
    added_tokens_decoder: dict[int, TokenText] = {}


class _ModelConfig(msgspec.Struct):
    """config.json and generation_config.json."""

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """A whole file of at most `limit` bytes; NotFoundError, PermissionDeniedError, RefusedError or CorruptError."""
    with named_errors(path), path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise RefusedError(f"{path} is larger than {limit} bytes")
    return data


def parse_json(path: Path, data: bytes, shape: type[Shape]) -> Shape:
    """A file's content as `shape`; CorruptError when it is no JSON, RefusedError, naming the field, for wrong types."""
    try:
        return msgspec.json.decode(data, type=shape)
    except msgspec.ValidationError as error:
        raise RefusedError(f"{path}: {first_line(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not JSON: {first_line(error)}", "Download the model again.") from error
    except RecursionError as error:
        raise RefusedError(f"{path} is nested too deeply") from error


def read_json_if_there(path: Path, shape: type[Shape]) -> Shape:
    """A JSON file as `shape`, or the shape's defaults where there is no such file."""
    return parse_json(path, read_bytes(path), shape) if is_there(path) else shape()


def is_there(path: Path) -> bool:
    """Whether a file exists; PermissionDeniedError where its folder may not be searched."""
    with named_errors(path):
        return path.exists()


def first_line(error: BaseException) -> str:
    """An error's first line, cut: messages may quote a file that is not ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@dataclass(frozen=True, slots=True)
class Ends:
    """Where texts begin and stop: ids checked against the vocabulary."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool | None  # None: the configuration does not say


def read_ends(folder: Path, size: int, find: Callable[[str], int | None]) -> Ends:
    """BOS and EOS: the EOS of generation_config.json wins, then config.json's, then tokenizer_config.json's."""
    path = folder / "tokenizer_config.json"
    config = read_json_if_there(path, TokenizerConfig)
    names = ("generation_config.json", "config.json")
    models = [(name, read_json_if_there(folder / name, _ModelConfig)) for name in names]
    bos = _named_token(path, "bos_token", config.bos_token, find)
    bos = bos or [(name, model.bos_token_id) for name, model in models if model.bos_token_id is not None]
    eos = [(name, token_id) for name, model in models for token_id in _as_list(model.eos_token_id)]
    eos = [pair for pair in eos if pair[0] == eos[0][0]] or _named_token(path, "eos_token", config.eos_token, find)
    for name, token_id in bos[:1] + eos:
        if not 0 <= token_id < size:
            raise RefusedError(f"{folder / name}: token id {token_id} is outside the tokenizer's {size} ids")
    return Ends(bos[0][1] if bos else None, tuple(dict.fromkeys(i for _, i in eos)), config.add_bos_token)


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else ids


def _named_token(
    path: Path, field: str, token: str | TokenText | None, find: Callable[[str], int | None]
) -> list[tuple[str, int]]:
    """[(file name, id)] of a token that tokenizer_config.json gives as text; [] where it gives none."""
    text = token_text(token)
    if not text:
        return []
    token_id = find(text)
    if token_id is None:
        raise RefusedError(f"{path}: {field} {text[:80]!r} is not a token of this tokenizer")
    return [(path.name, token_id)]


def token_text(token: str | TokenText | None) -> str:
    """The text of a token in a configuration, "" where there is none."""
    return token.content if isinstance(token, TokenText) else token or ""
