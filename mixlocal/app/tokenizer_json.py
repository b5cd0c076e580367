"""`tokenizer.json` through `tokenizers`.

A regular expression in the file runs in this process, without a time limit.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from mixlocal.app.tokenizer_files import (
    MAX_TOKEN_ID,
    AddedToken,
    Decoder,
    TokenizerFile,
    parse_json,
    read_bytes,
    read_ends,
)
from mixlocal.app.vocabulary import SPACE, LibraryCall, Vocabulary, check_text
from mixlocal.errors import RefusedError

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class JsonTokenizer(Vocabulary):
    """`tokenizer.json`. Where byte tokens are malformed we give each bad byte its U+FFFD, as sentencepiece does;
    `tokenizers` would spoil the whole run of bytes, valid characters included."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        data = read_bytes(path)
        file = parse_json(path, data, TokenizerFile)
        size = _json_size(path, file)
        self._rules = _read_decoder(path, file.decoder)
        self._library = _open_library(path, data, file.added_tokens)
        self._lock = threading.Lock()  # `encode_special_tokens` is a switch on the library's object
        controls = {token.content: token.id for token in file.added_tokens if token.special and token.content}
        ends = read_ends(folder, size, self._library.token_to_id)
        super().__init__(path, size, ends, controls)
        self._read_added_prefix(ends.adds_bos)
        unk = file.model.unk_token
        self._unk_id = file.model.unk_id if unk is None else self._library.token_to_id(unk)
        self.byte_level = self._rules.byte_level
        self._bytes_of_char = _gpt2_alphabet()
        self._char_of_byte = {byte: char for char, byte in self._bytes_of_char.items()}

    def _read_added_prefix(self, configured: bool | None) -> None:
        """Whether a text begins with BOS: the configuration's word, else what the file's own post-processor does."""
        with LibraryCall(self.path):
            added = self._library.encode("", add_special_tokens=True).ids
        if self.bos_id is None and added and added[0] not in self.eos_ids:
            self.bos_id = added[0]
        starts = bool(added) and added[0] == self.bos_id
        self.adds_bos = self.bos_id is not None and (starts if configured is None else configured)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        check_text(text)
        with self._lock, LibraryCall(self.path):
            self._library.encode_special_tokens = not special
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids if special else self.spell_controls(ids, self._unk_id)

    def is_text(self, token_id: int) -> bool:
        self.check_id(token_id)
        token = self._library.id_to_token(token_id)
        return token is not None and token not in self.controls

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        self.check_id(token_id)
        token = self._library.id_to_token(token_id)
        if token is None or token in self.controls:
            return b""
        return self._byte_level_bytes(token) if self.byte_level else self._text_bytes(token, first)

    def _byte_level_bytes(self, token: str) -> bytes:
        """Characters outside GPT-2's alphabet occur in added tokens, which stand for themselves."""
        if all(char in self._bytes_of_char for char in token):
            return bytes([self._bytes_of_char[char] for char in token])
        return token.encode()

    def _text_bytes(self, token: str, first: bool) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if self._rules.byte_tokens else None
        if byte is not None:
            return bytes.fromhex(byte[1])
        text = token.replace(SPACE, " ") if self._rules.spaces else token
        return text.removeprefix(" " if first and self._rules.drop_first_space else "").encode()

    def byte_id(self, byte: int) -> int | None:
        return self._library.token_to_id(self._char_of_byte[byte] if self.byte_level else f"<0x{byte:02X}>")


@dataclass(frozen=True, slots=True)
class _DecoderRules:
    """The part of a tokenizer.json `decoder` that says what bytes a token stands for."""

    byte_level: bool = False
    spaces: bool = False  # "▁" stands for a space
    byte_tokens: bool = False  # "<0x0A>" stands for a byte
    drop_first_space: bool = False


def _read_decoder(path: Path, decoder: Decoder | None) -> _DecoderRules:
    """Byte-level, or Llama's Replace, ByteFallback, Fuse, Strip in that order; anything else is refused by name."""
    steps = [] if decoder is None else decoder.decoders if decoder.type == "Sequence" else [decoder]
    names = [step.type for step in steps]
    if names == ["ByteLevel"]:
        return _DecoderRules(byte_level=True)
    by_name = {step.type: step for step in steps}
    replace, strip = by_name.get("Replace"), by_name.get("Strip")
    in_order = [name for name in ("Replace", "ByteFallback", "Fuse", "Strip") if name in by_name]
    replaces = replace is None or (replace.pattern == {"String": SPACE} and replace.content == " ")
    strips = strip is None or (strip.content == " " and strip.start in (0, 1) and strip.stop == 0)
    if names != in_order or "Fuse" not in names or not replaces or not strips:
        raise RefusedError(f"{path}: decoder {'+'.join(names)[:80] or 'none'} is not one that we compute")
    drops = strip is not None and strip.start == 1
    return _DecoderRules(spaces=replace is not None, byte_tokens="ByteFallback" in names, drop_first_space=drops)


def _json_size(path: Path, file: TokenizerFile) -> int:
    """One more than the highest id; RefusedError for an id that no table could hold."""
    vocab = file.model.vocab
    ids: Iterable[int] = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    every = [*ids, *(token.id for token in file.added_tokens)]
    lowest, highest = min(every, default=0), max(every, default=-1)
    if lowest < 0 or highest > MAX_TOKEN_ID:
        raise RefusedError(f"{path}: token id {lowest if lowest < 0 else highest} is out of range")
    return highest + 1


def _open_library(path: Path, data: bytes, added: Sequence[AddedToken]) -> tokenizers.Tokenizer:
    """The library's object, never cutting or padding a text; it renumbers added tokens, so their ids are compared."""
    with LibraryCall(path):
        library = tokenizers.Tokenizer.from_buffer(data)
        library.no_truncation()
        library.no_padding()
    for token in added:
        got = library.token_to_id(token.content)
        if got != token.id:
            raise RefusedError(f"{path}: added token {token.content[:80]!r} has id {token.id}, but is loaded as {got}")
    return library


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte (openai/gpt-2, encoder.py, bytes_to_unicode), character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}
