"""Tiny random checkpoints in Hugging Face format, with a byte tokenizer: what unit tests run on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "vocab_size": 260, "bos_token_id": 256, "eos_token_id": 257, "tie_word_embeddings": False,
    "sliding_window": None, "torch_dtype": "bfloat16",
}  # fmt: skip


def tensors(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights by their Hugging Face names, scaled so that logits differ clearly from token to token."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(dtype)

    def norm(columns: int) -> torch.Tensor:
        return (1 + 0.1 * torch.randn(columns, generator=generator)).to(dtype)

    dim, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or dim // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    result = {"model.embed_tokens.weight": normal(vocab, dim) * 4}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        result[layer + "input_layernorm.weight"] = norm(dim)
        for name, rows, columns in (("q", queries, dim), ("k", keys, dim), ("v", keys, dim), ("o", dim, queries)):
            result[f"{layer}self_attn.{name}_proj.weight"] = normal(rows, columns)
        result[layer + "post_attention_layernorm.weight"] = norm(dim)
        result[layer + "block_sparse_moe.gate.weight"] = normal(config["num_local_experts"], dim) * 2
        for expert in range(config["num_local_experts"]):
            for part, rows, columns in (("w1", hidden, dim), ("w2", dim, hidden), ("w3", hidden, dim)):
                result[f"{layer}block_sparse_moe.experts.{expert}.{part}.weight"] = normal(rows, columns)
    result["model.norm.weight"] = norm(dim)
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = normal(vocab, dim) * 4
    return result


def write_checkpoint(folder: Path, seed: int = 0, shards: int = 1, **changes: Any) -> Path:
    """A checkpoint whose config is `CONFIG` with `changes`; over several shards with an index if asked."""
    config = CONFIG | changes
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, tensors(config, seed), shards)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def write_shards(folder: Path, weights: dict[str, torch.Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[shard::shards])
        save_file(part, folder / name)
        where |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_tokenizer(folder: Path) -> None:
    """256 byte tokens, then <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
