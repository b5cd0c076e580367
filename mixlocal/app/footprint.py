"""What a model takes of memory and bandwidth, from its blueprint and its recipe: nothing needs to be there yet."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from mixlocal.experts.plan import PREFILL_CHUNK, ModelBytes
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import kv_bytes_per_token
from mixlocal.model.tensors import EMBEDDING, TrunkTensor, trunk_tensors
from mixlocal.quant.format import QuantSpec
from mixlocal.store.manifest import Manifest, Recipe, expert_layouts
from mixlocal.store.model_store import TRUNK_FILE

FLOAT = torch.float32.itemsize
CHUNKS = (PREFILL_CHUNK, 256, 128, 64)  # tokens of a prompt at once: as many as memory has room for


def model_bytes(name: str, config: ModelConfig, recipe: Recipe, kv_dtype: torch.dtype) -> ModelBytes:
    """Of a model that may be no more than a config.json."""
    trunk = sum(_tensor_bytes(tensor, recipe.attention_spec) for tensor in trunk_tensors(config))
    layouts = expert_layouts(config.dim, config.expert_hidden, recipe, config.n_layers * config.router.n_experts)
    return ModelBytes(
        name=name,
        trunk=trunk,
        kv_token=kv_bytes_per_token(config, kv_dtype),
        max_context=config.max_context,
        n_layers=config.n_layers,
        n_experts=config.router.n_experts,
        record=layouts.largest.stride,
        records=layouts.nbytes,
        scratch=scratch_bytes(config, recipe, CHUNKS[0]),
        chunk=CHUNKS[0],
        logits=3 * FLOAT * config.vocab_size,
    )


def with_shorter_passes(model: ModelBytes, config: ModelConfig, recipe: Recipe) -> tuple[ModelBytes, ...]:
    """`model`, and what it takes if prompts are read in smaller pieces, which is slower."""
    return tuple(replace(model, chunk=chunk, scratch=scratch_bytes(config, recipe, chunk)) for chunk in CHUNKS)


def stored_bytes(manifest: Manifest, config: ModelConfig, kv_dtype: torch.dtype) -> ModelBytes:
    """Of a model store."""
    found = model_bytes(f"{manifest.name}:{manifest.variant}", config, manifest.recipe, kv_dtype)
    assert (found.record, found.n_records) == (manifest.stride, len(manifest.records))
    return replace(found, trunk=manifest.files[TRUNK_FILE].nbytes)


def scratch_bytes(config: ModelConfig, recipe: Recipe, chunk: int) -> int:
    """Temporaries of a pass of `chunk` tokens: hidden states, queries, experts' rows and hidden rows, logits.

    Hidden rows are int8 where the weights are quantized. Seen at 8x7B's widths: 75 MB of the 138 that this says.
    """
    rows = FLOAT * (6 * config.dim + 3 * config.n_heads * config.head_dim + 2 * config.router.top_k * config.dim)
    hidden = config.router.top_k * config.expert_hidden * (FLOAT if recipe.experts == "bf16" else 2)
    return chunk * (rows + hidden) + 4 * FLOAT * config.vocab_size


def weight_bytes_per_token(config: ModelConfig, recipe: Recipe, top_k: int) -> int:
    """Bytes of weights that decoding one token reads: `top_k` experts a layer, and the trunk with its output head.

    Of a mixed plan, those of a mean expert. The embedding's one row, the KV cache and activations do not count.
    """
    n_records = config.n_layers * config.router.n_experts
    layouts = expert_layouts(config.dim, config.expert_hidden, recipe, n_records)
    parts = sum(part.nbytes for index in range(n_records) for part in layouts[index].parts) // n_records
    trunk = sum(
        _tensor_bytes(tensor, recipe.attention_spec)
        for tensor in trunk_tensors(config)
        if tensor.name != EMBEDDING or config.tied_embeddings
    )
    return config.n_layers * top_k * parts + trunk


def _tensor_bytes(tensor: TrunkTensor, spec: QuantSpec) -> int:
    if not tensor.is_matrix:
        return prod(tensor.shape) * FLOAT
    rows, columns = tensor.shape
    return spec.code_bytes((rows, columns)) + prod(spec.scales_shape((rows, columns))) * spec.scale_dtype.itemsize
