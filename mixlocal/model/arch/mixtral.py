"""Mixtral (arXiv 2401.04088): Mistral's attention, eight SwiGLU experts a layer, softmax router over the top k."""

from __future__ import annotations

from typing import Any

from mixlocal.errors import RefusedError
from mixlocal.model.config import ConfigFields, ModelConfig, RouterConfig
from mixlocal.model.tensors import ATTENTION, EMBEDDING, FINAL_NORM, HEAD

# Fields of a Mixtral config.json that change nothing when a trained model is run.
HARMLESS = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type",
    "return_dict", "router_aux_loss_coef", "router_jitter_noise", "torch_dtype", "transformers_version",
    "use_cache",
})  # fmt: skip
_LAYER_NAMES = dict(zip(ATTENTION, (f"self_attn.{x}_proj" for x in "qkvo"), strict=True)) | {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "router": "block_sparse_moe.gate",
}  # fmt: skip
MAX_EXPERTS = 1 << 16  # of all layers; a config that claims more is not worth the memory to list them
_NAMES = {EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", HEAD: "lm_head.weight"}


def read_config(raw: dict[str, Any], where: str) -> ModelConfig:
    fields = ConfigFields(raw, where)
    dim = fields.integer("hidden_size", 1, 1 << 17)
    n_heads = fields.integer("num_attention_heads", 1, 1 << 12)
    n_kv_heads = fields.integer("num_key_value_heads", 1, n_heads, default=n_heads)
    n_layers = fields.integer("num_hidden_layers", 1, 1 << 10)
    n_experts = fields.integer("num_local_experts", 1, MAX_EXPERTS // n_layers)
    config = ModelConfig(
        architecture="mixtral",
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=_head_dim(fields, dim, n_heads),
        vocab_size=fields.integer("vocab_size", 1, 1 << 21),
        expert_hidden=fields.integer("intermediate_size", 1, 1 << 18),
        router=RouterConfig(n_experts, fields.integer("num_experts_per_tok", 1, n_experts)),
        norm_eps=fields.number("rms_norm_eps", 1e-12, 1e-1),
        rope_theta=_rope_theta(fields),
        max_context=fields.integer("max_position_embeddings", 1, 1 << 24),
        sliding_window=fields.integer("sliding_window", 1, 1 << 24) if fields.given("sliding_window") else None,
        tied_embeddings=fields.boolean("tie_word_embeddings", default=False),
    )
    if n_heads % n_kv_heads:
        raise fields.refusal("num_key_value_heads", f"does not divide num_attention_heads = {n_heads}")
    fields.require("hidden_act", "silu")
    fields.require("attention_bias", False)
    fields.refuse_unknown(HARMLESS)
    return config


def trunk_source(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_LAYER_NAMES[rest]}.weight"


def expert_source(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"


def _head_dim(fields: ConfigFields, dim: int, n_heads: int) -> int:
    if fields.given("head_dim"):
        head_dim = fields.integer("head_dim", 2, 1 << 12)
    elif dim % n_heads:
        raise fields.refusal("num_attention_heads", f"does not divide hidden_size = {dim}")
    else:
        head_dim = dim // n_heads
    if head_dim % 2:
        raise RefusedError(f"{fields.where}: head_dim = {head_dim} must be even for rotary embeddings")
    return head_dim


def _rope_theta(fields: ConfigFields) -> float:
    """rope_theta, or rope_parameters.rope_theta as transformers 5 writes it. Scaled rotary embeddings are refused."""
    fields.require("rope_scaling")
    if not fields.given("rope_parameters"):
        return fields.number("rope_theta", 1.0, 1e12, default=1e6)
    given = fields.given("rope_theta")
    rope = fields.section("rope_parameters")
    rope.require("rope_type", "default")
    theta = rope.number("rope_theta", 1.0, 1e12)
    rope.refuse_unknown(())
    if given and fields.number("rope_theta", 1.0, 1e12) != theta:
        raise fields.refusal("rope_theta", f"contradicts rope_parameters.rope_theta = {theta:g}")
    return theta
