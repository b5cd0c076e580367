"""Text to token ids and back, and the two small machines that a stream of tokens needs.

Two file formats, one face: `tokenizer.json` through `tokenizers`, else `tokenizer.model` through `sentencepiece`.
Decoding is our own, from the bytes of each token, so that a stream and a whole decode cannot disagree:

    byte-level (GPT-2 style)   a text is one UTF-8 byte string cut anywhere; a malformed sequence is one U+FFFD
    sentencepiece style        a token is text, a byte only as a fallback; every malformed byte is one U+FFFD

Every file read here may be hostile: sizes, types and ids are checked, and what the libraries raise gets a name of ours.
A regular expression inside tokenizer.json still runs in this process, without a time limit.
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import msgspec
import tokenizers
from sentencepiece import SentencePieceProcessor

from mixlocal.errors import CorruptError, NotFoundError, PermissionDeniedError, RefusedError, UsageError

MAX_FILE_BYTES = 128 << 20
MAX_TOKEN_ID = 1 << 22
_SPACE = "\u2581"  # how sentencepiece writes a space inside a token
_LONE_BYTE = re.compile("[\udc80-\udcff]")  # what the error handler `surrogateescape` makes of one malformed byte
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")

ControlSpan = tuple[int, int, int]  # start, end, token id
Shape = TypeVar("Shape")


class Tokenizer(Protocol):
    """What the rest of the program sees of a tokenizer; ids lie in `range(vocab_size)`, some may be unassigned."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool:
        """Whether the model expects `bos_id` in front of a plain text (chat templates write their own)."""

    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def byte_level(self) -> bool:
        """True: tokens are slices of one UTF-8 byte string. False: tokens are text, with single bytes as a fallback."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of a text, never with BOS or EOS around it.

        `special=True` reads control tokens written in the text ("<|im_start|>") as their ids: for text that we or the
        template wrote. With False, text can never become a control token. UsageError for a lone surrogate.
        """

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        """The text of some ids, control tokens left out; exactly what `TextStream` gives piece by piece."""

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes a token adds, b"" for a control token; `first`: it opens a text, where a dummy space is dropped."""

    def is_text(self, token_id: int) -> bool:
        """False for control tokens and unassigned ids; RefusedError for an id outside the vocabulary."""

    def control_spans(self, text: str) -> list[ControlSpan]:
        """Where control tokens are written in a text."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading the files


class _Text(msgspec.Struct):
    content: str
    special: bool = False


class _AddedToken(_Text, kw_only=True):
    id: int


class _Decoder(msgspec.Struct):
    type: str
    decoders: list[_Decoder] = []
    pattern: dict[str, str] | None = None
    content: str = ""
    start: int = 0
    stop: int = 0


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[tuple[str, float]]
    unk_token: str | None = None
    unk_id: int | None = None


class _TokenizerFile(msgspec.Struct):
    model: _Model
    added_tokens: list[_AddedToken] = []
    decoder: _Decoder | None = None


class _TokenizerConfig(msgspec.Struct):
    bos_token: str | _Text | None = None
    eos_token: str | _Text | None = None
    add_bos_token: bool | None = None
    added_tokens_decoder: dict[int, _Text] = {}


class _ModelConfig(msgspec.Struct):
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def read_bytes(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """A whole file of at most `limit` bytes; NotFoundError, PermissionDeniedError, RefusedError or CorruptError."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"no file {path}") from error
    except PermissionError as error:
        raise PermissionDeniedError(f"may not read {path}") from error
    except OSError as error:
        raise CorruptError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise RefusedError(f"{path} is larger than {limit} bytes")
    return data


def read_json(path: Path, shape: type[Shape], limit: int = MAX_FILE_BYTES) -> Shape:
    """A JSON file as `shape`; CorruptError when it is no JSON, RefusedError (naming the field) when a type is wrong."""
    return _parse_json(path, read_bytes(path, limit), shape)


def _parse_json(path: Path, data: bytes, shape: type[Shape]) -> Shape:
    try:
        return msgspec.json.decode(data, type=shape)
    except msgspec.ValidationError as error:
        raise RefusedError(f"{path}: {_short(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptError(f"{path} is not JSON: {_short(error)}", "Download the model again.") from error
    except RecursionError as error:
        raise RefusedError(f"{path} is nested too deeply") from error


def read_json_if_there(path: Path, shape: type[Shape], limit: int = MAX_FILE_BYTES) -> Shape:
    """`read_json`, or the shape's defaults where there is no such file."""
    return read_json(path, shape, limit) if is_there(path) else shape()


def is_there(path: Path) -> bool:
    """Whether a file exists; PermissionDeniedError where its folder may not be searched."""
    try:
        return path.exists()
    except PermissionError as error:
        raise PermissionDeniedError(f"may not look for {path}") from error


def _short(error: BaseException) -> str:
    """An error's first line, cut: messages may quote a file that is not ours."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


class _LibraryCall:
    """Names what `tokenizers` and `sentencepiece` raise after the file that caused it.

    `tokenizers` raises plain `Exception`, and a Rust panic arrives as a class that cannot be imported and derives from
    BaseException; so types are compared here, where an `except` would have to catch everything.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None or kind is None:
            return
        listed = issubclass(kind, ValueError | RuntimeError | LookupError | ArithmeticError)
        if listed or kind is Exception or kind.__name__ == "PanicException":
            raise RefusedError(f"{self._path} is not a usable tokenizer: {_short(error)}") from error


@dataclass(frozen=True, slots=True)
class _Ends:
    """Where texts begin and stop: ids checked against the vocabulary."""

    bos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool | None  # None: the configuration does not say


def _read_ends(folder: Path, size: int, find: Callable[[str], int | None]) -> _Ends:
    """BOS and EOS: the EOS of generation_config.json wins, then config.json's, then tokenizer_config.json's."""
    path = folder / "tokenizer_config.json"
    config = read_json_if_there(path, _TokenizerConfig)
    names = ("generation_config.json", "config.json")
    models = [(name, read_json_if_there(folder / name, _ModelConfig)) for name in names]
    bos = _named_token(path, "bos_token", config.bos_token, find)
    bos = bos or [(name, model.bos_token_id) for name, model in models if model.bos_token_id is not None]
    eos = [(name, token_id) for name, model in models for token_id in _as_list(model.eos_token_id)]
    eos = [pair for pair in eos if pair[0] == eos[0][0]] or _named_token(path, "eos_token", config.eos_token, find)
    for name, token_id in bos[:1] + eos:
        if not 0 <= token_id < size:
            raise RefusedError(f"{folder / name}: token id {token_id} is outside the tokenizer's {size} ids")
    return _Ends(bos[0][1] if bos else None, tuple(dict.fromkeys(i for _, i in eos)), config.add_bos_token)


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else ids


def _named_token(
    path: Path, field: str, token: str | _Text | None, find: Callable[[str], int | None]
) -> list[tuple[str, int]]:
    """[(file name, id)] of a token that tokenizer_config.json gives as text; [] where it gives none."""
    text = token.content if isinstance(token, _Text) else token
    if not text:
        return []
    token_id = find(text)
    if token_id is None:
        raise RefusedError(f"{path}: {field} {text[:80]!r} is not a token of this tokenizer")
    return [(path.name, token_id)]


# ---------------------------------------------------------------------------------------------------------------------
# The two implementations


class _Vocabulary:
    """What both formats share: id ranges, control tokens, decoding."""

    byte_level: bool

    def __init__(self, path: Path, size: int, ends: _Ends, controls: dict[str, int]) -> None:
        self._path = path
        self.vocab_size = size
        self.bos_id = ends.bos_id
        self.eos_ids = ends.eos_ids
        self.adds_bos = bool(ends.adds_bos)
        self._controls = controls
        self._control_ids = {token_id: text for text, token_id in controls.items()}
        longest_first = sorted(controls, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first))) if controls else None

    def control_spans(self, text: str) -> list[ControlSpan]:
        if self._control_pattern is None:
            return []
        return [(m.start(), m.end(), self._controls[m.group()]) for m in self._control_pattern.finditer(text)]

    def decode(self, ids: Sequence[int], *, continuation: bool = False) -> str:
        stream = TextStream(self, continuation=continuation)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.flush()

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise RefusedError(f"token id {token_id} is outside the tokenizer's {self.vocab_size} ids")

    def _spell_controls(self, ids: list[int], allowed: int | None) -> list[int]:
        """Replace control ids that plain text ran into by their letters' bytes; `allowed` is the unknown token."""
        if self._control_ids.keys().isdisjoint(ids):
            return ids
        spelled: list[int] = []
        for token_id in ids:
            is_control = token_id in self._control_ids and token_id != allowed
            spelled += self._spell(self._control_ids[token_id]) if is_control else [token_id]
        return spelled

    def _spell(self, text: str) -> list[int]:
        ids = [self._byte_id(byte) for byte in text.encode()]
        known = [token_id for token_id in ids if token_id is not None]
        if len(known) < len(ids):
            raise UsageError(f"the text contains {text!r}, a control token that this tokenizer cannot write as text")
        return known

    # What a format must add.
    def _byte_id(self, byte: int) -> int | None:
        raise NotImplementedError

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        raise NotImplementedError

    def is_text(self, token_id: int) -> bool:
        raise NotImplementedError

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        raise NotImplementedError


def _check_text(text: str) -> None:
    """Both libraries fail obscurely on half a surrogate pair, which Python makes of malformed input bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = f"U+{ord(text[error.start]):04X}"
        hint = "The input was not valid UTF-8 where it was read."
        raise UsageError(f"the text holds {bad}, half of a surrogate pair, at character {error.start}", hint) from error


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte (openai/gpt-2, encoder.py, bytes_to_unicode), character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}


@dataclass(frozen=True, slots=True)
class _DecoderRules:
    """The part of a tokenizer.json `decoder` that says what bytes a token stands for."""

    byte_level: bool = False
    spaces: bool = False  # "▁" stands for a space
    byte_tokens: bool = False  # "<0x0A>" stands for a byte
    drop_first_space: bool = False


def _read_decoder(path: Path, decoder: _Decoder | None) -> _DecoderRules:
    """Byte-level, or Llama's Replace, ByteFallback, Fuse, Strip in that order; anything else is refused by name."""
    steps = [] if decoder is None else decoder.decoders if decoder.type == "Sequence" else [decoder]
    names = [step.type for step in steps]
    if names == ["ByteLevel"]:
        return _DecoderRules(byte_level=True)
    by_name = {step.type: step for step in steps}
    replace, strip = by_name.get("Replace"), by_name.get("Strip")
    in_order = [name for name in ("Replace", "ByteFallback", "Fuse", "Strip") if name in by_name]
    replaces = replace is None or (replace.pattern == {"String": _SPACE} and replace.content == " ")
    strips = strip is None or (strip.content == " " and strip.start in (0, 1) and strip.stop == 0)
    if names != in_order or "Fuse" not in names or not replaces or not strips:
        raise RefusedError(f"{path}: decoder {'+'.join(names)[:80] or 'none'} is not one that we compute")
    drops = strip is not None and strip.start == 1
    return _DecoderRules(spaces=replace is not None, byte_tokens="ByteFallback" in names, drop_first_space=drops)


class JsonTokenizer(_Vocabulary):
    """`tokenizer.json`. Where byte tokens are malformed we give each bad byte its U+FFFD, as sentencepiece does;
    `tokenizers` would spoil the whole run of bytes, valid characters included."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        data = read_bytes(path)
        file = _parse_json(path, data, _TokenizerFile)
        size = _json_size(path, file)
        self._rules = _read_decoder(path, file.decoder)
        self._library = _open_library(path, data, file.added_tokens)
        self._lock = threading.Lock()  # `encode_special_tokens` is a switch on the library's object
        controls = {token.content: token.id for token in file.added_tokens if token.special and token.content}
        super().__init__(path, size, _read_ends(folder, size, self._library.token_to_id), controls)
        self._read_added_prefix(read_json_if_there(folder / "tokenizer_config.json", _TokenizerConfig).add_bos_token)
        unk = file.model.unk_token
        self._unk_id = file.model.unk_id if unk is None else self._library.token_to_id(unk)
        self.byte_level = self._rules.byte_level
        self._bytes_of_char = _gpt2_alphabet()
        self._char_of_byte = {byte: char for char, byte in self._bytes_of_char.items()}

    def _read_added_prefix(self, configured: bool | None) -> None:
        """Whether a text begins with BOS: the configuration's word, else what the file's own post-processor does."""
        with _LibraryCall(self._path):
            added = self._library.encode("", add_special_tokens=True).ids
        if self.bos_id is None and added and added[0] not in self.eos_ids:
            self.bos_id = added[0]
        starts = bool(added) and added[0] == self.bos_id
        self.adds_bos = self.bos_id is not None and (starts if configured is None else configured)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        _check_text(text)
        with self._lock, _LibraryCall(self._path):
            self._library.encode_special_tokens = not special
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids if special else self._spell_controls(ids, self._unk_id)

    def is_text(self, token_id: int) -> bool:
        self._check_id(token_id)
        token = self._library.id_to_token(token_id)
        return token is not None and token not in self._controls

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        self._check_id(token_id)
        token = self._library.id_to_token(token_id)
        if token is None or token in self._controls:
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
        text = token.replace(_SPACE, " ") if self._rules.spaces else token
        return text.removeprefix(" " if first and self._rules.drop_first_space else "").encode()

    def _byte_id(self, byte: int) -> int | None:
        return self._library.token_to_id(self._char_of_byte[byte] if self.byte_level else f"<0x{byte:02X}>")


def _json_size(path: Path, file: _TokenizerFile) -> int:
    """One more than the highest id; RefusedError for an id that no table could hold."""
    vocab = file.model.vocab
    ids: Iterable[int] = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    every = [*ids, *(token.id for token in file.added_tokens)]
    lowest, highest = min(every, default=0), max(every, default=-1)
    if lowest < 0 or highest > MAX_TOKEN_ID:
        raise RefusedError(f"{path}: token id {lowest if lowest < 0 else highest} is out of range")
    return highest + 1


def _open_library(path: Path, data: bytes, added: Sequence[_AddedToken]) -> tokenizers.Tokenizer:
    """The library's object, never cutting or padding a text; it renumbers added tokens, so their ids are compared."""
    with _LibraryCall(path):
        library = tokenizers.Tokenizer.from_buffer(data)
        library.no_truncation()
        library.no_padding()
    for token in added:
        got = library.token_to_id(token.content)
        if got != token.id:
            raise RefusedError(f"{path}: added token {token.content[:80]!r} has id {token.id}, but is loaded as {got}")
    return library


class SentencePieceTokenizer(_Vocabulary):
    """`tokenizer.model`, and the tokens that tokenizer_config.json adds after it (known only to `special=True`)."""

    byte_level = False

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        data = read_bytes(path)
        with _LibraryCall(path):
            self._library = SentencePieceProcessor(model_proto=data)
            every = range(self._library.vocab_size())
            self._pieces: list[str] = [self._library.id_to_piece(i) for i in every]
            controls = {self._pieces[i]: i for i in every if self._library.is_control(i)}
            self._unk_id: int = self._library.unk_id()
            self._unk_surface: str = self._library.decode([self._unk_id])
            self._drops_space = self._finds_dummy_prefix()
        self._read_added(folder / "tokenizer_config.json", controls)
        super().__init__(path, len(self._pieces), _read_ends(folder, len(self._pieces), self._find), controls)
        self._fill_ends(read_json_if_there(folder / "tokenizer_config.json", _TokenizerConfig).add_bos_token)

    def _finds_dummy_prefix(self) -> bool:
        """Whether decoding drops the space of a first piece: asked of the library, which does not tell its settings."""
        piece_id = next((i for i, piece in enumerate(self._pieces) if piece.startswith(_SPACE)), None)
        if piece_id is None:
            return False
        decoded: str = self._library.decode([piece_id])
        return decoded != self._pieces[piece_id].replace(_SPACE, " ")

    def _read_added(self, path: Path, controls: dict[str, int]) -> None:
        """Append the added tokens to the pieces, and note which are control tokens; gaps become empty pieces."""
        added = read_json_if_there(path, _TokenizerConfig).added_tokens_decoder
        own = len(self._pieces)
        if any(token_id < 0 or token_id > MAX_TOKEN_ID for token_id in added):
            raise RefusedError(f"{path}: an id in added_tokens_decoder is out of range")
        self._pieces += [""] * (max(added, default=-1) + 1 - own)
        for token_id, token in added.items():
            if not token.content or (token_id < own and self._pieces[token_id] != token.content):
                raise RefusedError(f"{path}: added token {token_id} does not agree with tokenizer.model")
            self._pieces[token_id] = token.content
            if token_id >= own or (token.special and token_id != self._unk_id):
                controls[token.content] = token_id
        self._own = own

    def _fill_ends(self, adds_bos: bool | None) -> None:
        """What the configuration leaves open, tokenizer.model says; Llama's tokenizers put BOS first by default."""
        bos, eos = self._library.bos_id(), self._library.eos_id()
        if self.bos_id is None and bos >= 0:
            self.bos_id = bos
        if not self.eos_ids and eos >= 0:
            self.eos_ids = (eos,)
        self.adds_bos = self.bos_id is not None and adds_bos is not False

    def _find(self, text: str) -> int | None:
        return self._pieces.index(text) if text in self._pieces else None

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        _check_text(text)
        ids: list[int] = []
        position = 0
        for start, end, token_id in self.control_spans(text) if special else []:
            ids += [*self._encode_plain(text[position:start]), token_id]
            position = end
        return ids + self._encode_plain(text[position:])

    def _encode_plain(self, text: str) -> list[int]:
        with _LibraryCall(self._path):
            ids: list[int] = self._library.encode(text)
        return self._spell_controls(ids, self._unk_id)

    def is_text(self, token_id: int) -> bool:
        self._check_id(token_id)
        return token_id not in self._control_ids and bool(self._pieces[token_id])

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        if not self.is_text(token_id):
            return b""
        if token_id == self._unk_id:
            return self._unk_surface.encode()
        piece = self._pieces[token_id]
        if token_id < self._own and self._library.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        piece = piece.removeprefix(_SPACE) if first and self._drops_space else piece
        return piece.replace(_SPACE, " ").encode()

    def _byte_id(self, byte: int) -> int | None:
        token_id: int = self._library.piece_to_id(f"<0x{byte:02X}>")
        return None if token_id == self._unk_id else token_id


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json, else tokenizer.model.

    Raises NotFoundError when neither is there, CorruptError or RefusedError naming the file and what is wrong with it.
    """
    if is_there(folder / "tokenizer.json"):
        return JsonTokenizer(folder)
    if is_there(folder / "tokenizer.model"):
        return SentencePieceTokenizer(folder)
    raise NotFoundError(f"no tokenizer.json and no tokenizer.model in {folder}")


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


class TextStream:
    """Token ids in, text out, as soon as a character is whole.

    The pieces and `flush()` concatenate to `tokenizer.decode(ids)`. With `continuation=True` the ids go on from a text
    (a prefill, a raw prompt), so the space before the first word is part of it; otherwise it is the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, *, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._first = not continuation
        errors = "replace" if tokenizer.byte_level else "surrogateescape"
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """The text that became certain; at most three bytes are ever held back."""
        if not self._tokenizer.is_text(token_id):
            return "" if self._tokenizer.byte_level else self.flush()
        raw = self._tokenizer.token_bytes(token_id, first=self._first)
        self._first = False
        return _LONE_BYTE.sub("\ufffd", self._utf8.decode(raw))

    def flush(self) -> str:
        """What was held back, as U+FFFD; the stream may go on afterwards."""
        return _LONE_BYTE.sub("\ufffd", self._utf8.decode(b"", final=True))


class StopScanner:
    """Finds stop strings in text that arrives in pieces, and never shows one, nor any part of one.

    The answer does not depend on how the text is cut: the stop string that is complete first wins, the longest of
    several that end together. Only the longest tail that could still begin a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise UsageError("an empty stop string would end every answer at once", "Leave out the empty --stop.")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text safe to show, whether a stop string was found); after that, nothing more is shown."""
        if self._stopped:
            return "", True
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self._stopped = bool(found)
        keep = min(found)[1] if found else len(self._held) - self._tail()
        shown, self._held = self._held[:keep], "" if found else self._held[keep:]
        return shown, self._stopped

    def _tail(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = range(min(max(map(len, self._stops), default=1) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if any(s.startswith(self._held[-n:]) for s in self._stops)), 0)

    def flush(self) -> str:
        """The text held back when the stream ended without a stop string."""
        held, self._held = self._held, ""
        return held
