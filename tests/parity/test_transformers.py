"""Our forward pass against transformers' on the same checkpoint, with a float32 cache; greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from stores import open_model, quantized

from mixlocal.engine.generate import Token, generate
from mixlocal.engine.params import SamplingParams
from mixlocal.engine.sampling import Sampler
from mixlocal.model.kv_cache import own_cache

POSITIONS = 64

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "top1": {"num_experts_per_tok": 1},
    "top3 of 16": {"num_local_experts": 16, "num_experts_per_tok": 3},
    "8 experts": {"num_local_experts": 8, "num_hidden_layers": 3},
    "5 experts, odd vocabulary": {"num_local_experts": 5, "vocab_size": 331},
    "no grouping": {"num_key_value_heads": 4},
    "one kv head": {"num_attention_heads": 8, "num_key_value_heads": 1},
    "head_dim given": {"head_dim": 32},
    "window 16": {"sliding_window": 16},
    "window 1, tied": {"sliding_window": 1, "tie_word_embeddings": True},
    "theta 1e6, eps 1e-6": {"rope_theta": 1e6, "rms_norm_eps": 1e-6},
    "wide": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 160},
    "deep": {"num_hidden_layers": 6, "num_local_experts": 6},
    "transformers 5 config": {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    changes = dict(CONFIGS[name])
    folder = tiny.write_checkpoint(tmp_path / "checkpoint", seed=len(name), **changes)
    theirs = reference_model(folder)
    store = quantized(folder, tmp_path / "store", "bf16")
    model, config = open_model(store)
    ids = torch.randint(0, config.vocab_size, (POSITIONS,), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids[None]).logits[0]
    whole = model.forward(ids, own_cache(config, POSITIONS, torch.float32), all_logits=True)
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)

    cache = own_cache(config, POSITIONS, torch.float32)
    stepwise = torch.stack([model.forward(token[None], cache) for token in ids])
    torch.testing.assert_close(stepwise, expected, atol=1e-4, rtol=0)
    split = own_cache(config, POSITIONS, torch.float32)
    model.forward(ids[:23], split)
    torch.testing.assert_close(model.forward(ids[23:], split, all_logits=True), expected[23:], atol=1e-4, rtol=0)

    assert our_greedy(model, config, ids[:8].tolist(), 24) == their_greedy(theirs, ids[:8], 24)


def test_more_experts_per_token_than_trained(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "checkpoint")
    wider = tiny.write_checkpoint(tmp_path / "wider", num_experts_per_tok=3)
    model, config = open_model(quantized(folder, tmp_path / "store", "bf16"), top_k=3)
    ids = torch.arange(40)
    ours = model.forward(ids, own_cache(config, 64, torch.float32), all_logits=True)
    torch.testing.assert_close(ours, reference_model(wider)(ids[None]).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sources_of_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights that are exact in bfloat16 give the same logits whatever type they came in."""
    plain = tiny.write_checkpoint(tmp_path / "plain")
    weights = {name: value.to(dtype) for name, value in tiny.tensors(tiny.CONFIG).items()}
    (tmp_path / "plain" / "model.safetensors").unlink()
    tiny.write_shards(plain, weights, shards=2)
    model, config = open_model(quantized(plain, tmp_path / "store", "bf16"))
    ids = torch.arange(32)
    expected = reference_model(plain)(ids[None]).logits[0]
    found = model.forward(ids, own_cache(config, 64, torch.float32), all_logits=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_checkpoint_saved_by_transformers(tmp_path: Path) -> None:
    """The config and the tensor names that transformers 5 writes today."""
    folder = tiny.write_checkpoint(tmp_path / "checkpoint")
    theirs = reference_model(folder)
    theirs.save_pretrained(tmp_path / "saved")
    tiny.write_tokenizer(tmp_path / "saved")
    model, config = open_model(quantized(tmp_path / "saved", tmp_path / "store", "bf16"))
    ids = torch.arange(32)
    expected = theirs(ids[None]).logits[0]
    found = model.forward(ids, own_cache(config, 64, torch.float32), all_logits=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def reference_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def our_greedy(model: Any, config: Any, prompt: list[int], count: int) -> list[int]:
    sampler = Sampler(SamplingParams(temperature=0, max_tokens=count))
    cache = own_cache(config, len(prompt) + count, torch.float32)
    return [event.choice.id for event in generate(model, prompt, cache, sampler, ()) if isinstance(event, Token)]


def their_greedy(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    ids = prompt[None]
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids[0, len(prompt) :].tolist()
