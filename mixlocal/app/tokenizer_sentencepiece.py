"""`tokenizer.model` through `sentencepiece`."""

from __future__ import annotations

from pathlib import Path

from sentencepiece import SentencePieceProcessor

from mixlocal.app.tokenizer_files import MAX_TOKEN_ID, TokenizerConfig, read_bytes, read_ends, read_json_if_there
from mixlocal.app.vocabulary import SPACE, LibraryCall, Vocabulary, check_text
from mixlocal.errors import RefusedError


class SentencePieceTokenizer(Vocabulary):
    """`tokenizer.model`, and the tokens that tokenizer_config.json adds after it (known only to `special=True`)."""

    byte_level = False

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        data = read_bytes(path)
        with LibraryCall(path):
            self._library = SentencePieceProcessor(model_proto=data)
            every = range(self._library.vocab_size())
            self._pieces: list[str] = [self._library.id_to_piece(i) for i in every]
            controls = {self._pieces[i]: i for i in every if self._library.is_control(i)}
            self._unk_id: int = self._library.unk_id()
            self._unk_surface: str = self._library.decode([self._unk_id])
            self._drops_space = self._finds_dummy_prefix()
        self._read_added(folder / "tokenizer_config.json", controls)
        ends = read_ends(folder, len(self._pieces), self._find)
        super().__init__(path, len(self._pieces), ends, controls)
        self._fill_ends(ends.adds_bos)

    def _finds_dummy_prefix(self) -> bool:
        """Whether decoding drops the space of a first piece: asked of the library, which does not tell its settings."""
        piece_id = next((i for i, piece in enumerate(self._pieces) if piece.startswith(SPACE)), None)
        if piece_id is None:
            return False
        decoded: str = self._library.decode([piece_id])
        return decoded != self._pieces[piece_id].replace(SPACE, " ")

    def _read_added(self, path: Path, controls: dict[str, int]) -> None:
        """Append the added tokens to the pieces, and note which are control tokens; gaps become empty pieces."""
        added = read_json_if_there(path, TokenizerConfig).added_tokens_decoder
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
        check_text(text)
        ids: list[int] = []
        position = 0
        for start, end, token_id in self.control_spans(text) if special else []:
            ids += [*self._encode_plain(text[position:start]), token_id]
            position = end
        return ids + self._encode_plain(text[position:])

    def _encode_plain(self, text: str) -> list[int]:
        with LibraryCall(self.path):
            ids: list[int] = self._library.encode(text)
        return self.spell_controls(ids, self._unk_id)

    def is_text(self, token_id: int) -> bool:
        self.check_id(token_id)
        return token_id not in self.control_ids and bool(self._pieces[token_id])

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        if not self.is_text(token_id):
            return b""
        if token_id == self._unk_id:
            return self._unk_surface.encode()
        piece = self._pieces[token_id]
        if token_id < self._own and self._library.is_byte(token_id):
            return bytes.fromhex(piece[3:5])
        piece = piece.removeprefix(SPACE) if first and self._drops_space else piece
        return piece.replace(SPACE, " ").encode()

    def byte_id(self, byte: int) -> int | None:
        token_id: int = self._library.piece_to_id(f"<0x{byte:02X}>")
        return None if token_id == self._unk_id else token_id
