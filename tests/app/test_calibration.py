"""What a text asks of a model's experts, against the same written as a loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn.functional import silu

from mixlocal.app import calibration as module
from mixlocal.app import reading_ahead
from mixlocal.app.blueprint import Blueprint
from mixlocal.app.calibration import FLOOR, MOST_TOKENS, OWN_TEXT, Calibration, calibrate, calibration_text
from mixlocal.app.hardware import Hardware
from mixlocal.app.progress import Progress
from mixlocal.app.quality.text import Text
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.errors import MemoryBudgetError, NotFoundError, RefusedError, UsageError
from mixlocal.kernels.quantizer import quantize_rows
from mixlocal.quant.quantize import dequantize, quantize
from mixlocal.quant.search import Search
from mixlocal.store.checkpoint import Checkpoint, TensorRef, read_tensor
from mixlocal.store.manifest import Recipe

PARTS = ("w1", "w3", "w2")
CONTEXT = 32
SHAPE: dict[str, Any] = {"max_position_embeddings": CONTEXT}
SEARCHED = Recipe("nf4", 16, "bf16", search=True)
PLAIN = Recipe("nf4", 16, "bf16")
pytestmark = pytest.mark.filterwarnings("ignore:torch.searchsorted:UserWarning")  # see test_quantize_rows
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Three chunks of 32 bytes, and some that make no chunk."""
    path = tmp_path_factory.mktemp("text") / "log.txt"
    path.write_text("06:00 two boats out, wind west; the third has a new mast and waits for paint. 07:30 rain, nobody")
    return calibration_text(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("calibration") / "checkpoint", seed=4, **SHAPE)


def measured(folder: Path, text: Text, recipe: Recipe = SEARCHED, *, damage: bool = True) -> Calibration:
    checkpoint = Checkpoint(folder)
    return result(calibrate(checkpoint, Blueprint.of(checkpoint.config, "config.json", recipe), text, damage=damage))


def result(work: Generator[Progress, None, Calibration]) -> Calibration:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def use(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels by name, in one thread: products as small as these wait for each other longer than they take."""
    monkeypatch.setenv("MIXLOCAL_ISA", isa)
    monkeypatch.setattr(module, "set_threads", lambda _: torch.set_num_threads(1))


def rewritten(folder: Path, weights: dict[str, torch.Tensor], shards: int = 1, **changes: Any) -> Path:
    """A checkpoint with these weights."""
    tiny.write_checkpoint(folder, **SHAPE | changes)
    (folder / "model.safetensors").unlink()
    tiny.write_shards(folder, weights, shards)
    return folder


def expert_name(layer: int, expert: int, part: str) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"


@dataclass
class Expected:
    """As `Calibration`. margin: by how much a router preferred the last expert it chose to the first it did not."""

    inputs: torch.Tensor
    hidden: torch.Tensor
    damage: torch.Tensor
    margin: float = 1.0


def expected_of(folder: Path, text: Text, recipe: Recipe) -> Expected:
    """One token and one expert at a time, in float32."""
    config, weights = Checkpoint(folder).config, read_all(folder)
    layers, n_experts, top_k = (config[f"num_{what}"] for what in ("hidden_layers", "local_experts", "experts_per_tok"))
    found = Expected(
        torch.zeros(layers, config["hidden_size"]), torch.zeros(layers, n_experts, config["intermediate_size"]),
        torch.zeros(layers, n_experts, 3, dtype=torch.float64),
    )  # fmt: skip
    for layer, (before, normed) in enumerate(hidden_states(folder, text)):
        found.inputs[layer] = torch.stack([x.square() for x in normed]).mean(0)
        users: list[list[tuple[int, float]]] = [[] for _ in range(n_experts)]
        for token, x in enumerate(normed):
            shares, ids = torch.softmax(weights[f"model.layers.{layer}.block_sparse_moe.gate.weight"] @ x, 0).sort(
                descending=True
            )
            found.margin = min(found.margin, (shares[top_k - 1] - shares[top_k]).item())
            for expert, share in zip(ids[:top_k].tolist(), shares[:top_k].tolist(), strict=True):
                users[expert].append((token, share / shares[:top_k].sum().item()))
        for expert, tokens in enumerate(users):
            exact = {part: weights[expert_name(layer, expert, part)] for part in PARTS}
            for token, share in tokens:
                entering = silu(exact["w1"] @ normed[token]) * (exact["w3"] @ normed[token]) * share
                found.hidden[layer, expert] += entering.square() / len(tokens)
            for number, part in enumerate(PARTS):
                squares = found.hidden[layer, expert] if part == "w2" else found.inputs[layer]
                coarse = exact | {part: in_four_bits(exact[part], recipe, squares)}
                for token, share in tokens:
                    change = (output(coarse, normed[token]) - output(exact, normed[token])) * share
                    found.damage[layer, expert, number] += change.square().sum() / before[token].square().sum()
    return found


def in_four_bits(weight: torch.Tensor, recipe: Recipe, squares: torch.Tensor) -> torch.Tensor:
    search = Search((squares / squares.mean()).clamp(min=FLOOR)) if recipe.search and squares.any() else None
    return dequantize(quantize_rows("w", weight, recipe.expert_spec, search=search)[0])


def output(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return weights["w2"] @ (silu(weights["w1"] @ x) * (weights["w3"] @ x))


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(ref).float() for name, ref in Checkpoint(folder).tensors.items()}


def hidden_states(folder: Path, text: Text) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each layer: the hidden states that experts are added to, and what experts are given, of all chunks."""
    config, weights = Checkpoint(folder).config, read_all(folder)
    context, top_k = config["max_position_embeddings"], config["num_experts_per_tok"]
    ids = torch.tensor(load_tokenizer(folder).encode(text.content))
    hidden = weights["model.embed_tokens.weight"][ids[: len(ids) // context * context].view(-1, context)]
    seen = []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        hidden = hidden + attention(config, weights, prefix, rms(hidden, weights[prefix + "input_layernorm.weight"]))
        normed = rms(hidden, weights[prefix + "post_attention_layernorm.weight"]).flatten(0, 1)
        seen.append((hidden.flatten(0, 1), normed))
        shares = torch.softmax(normed @ weights[prefix + "block_sparse_moe.gate.weight"].T, -1)
        shares = shares.where(shares >= shares.topk(top_k).values[:, -1:], 0.0)
        outputs = [
            output({part: weights[expert_name(layer, expert, part)] for part in PARTS}, normed.T).T
            for expert in range(config["num_local_experts"])
        ]
        mixed = (torch.stack(outputs, 1) * (shares / shares.sum(-1, keepdim=True)).unsqueeze(-1)).sum(1)
        hidden = hidden + mixed.view_as(hidden)
    return seen


def attention(config: dict[str, Any], weights: dict[str, torch.Tensor], prefix: str, x: torch.Tensor) -> torch.Tensor:
    """x [N, T, D]: N sequences of T tokens."""
    n, length, dim = x.shape
    heads, width = config["num_attention_heads"], dim // config["num_attention_heads"]
    angles = torch.arange(length)[:, None] * config["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def project(name: str) -> torch.Tensor:
        y = (x @ weights[f"{prefix}self_attn.{name}_proj.weight"].T).view(n, length, -1, width).transpose(1, 2)
        return y.repeat_interleave(heads // y.shape[1], 1)

    def turned(y: torch.Tensor) -> torch.Tensor:
        return y * cos + torch.cat((-y[..., width // 2 :], y[..., : width // 2]), -1) * sin

    scores = turned(project("q")) @ turned(project("k")).transpose(2, 3) * width**-0.5
    scores = scores + torch.full((length, length), -torch.inf).triu(1)
    mixed = (scores.softmax(-1) @ project("v")).transpose(1, 2).flatten(2)
    return mixed @ weights[prefix + "self_attn.o_proj.weight"].T


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize(
    ("recipe", "isa"),
    [(PLAIN, "reference"), (PLAIN, ""), (SEARCHED, ""), (Recipe("int4", 16, "bf16", search=True), "")],
    ids=["reference", "nf4", "searched", "int4"],
)
def test_it_is_what_a_plain_loop_finds(
    recipe: Recipe, isa: str, checkpoint: Path, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a cache of 16 bits; and of the damage, which is small beside what it is a difference of, to the 8 bits of
    activations in compiled 4-bit products."""
    use(isa, monkeypatch)
    expected = expected_of(checkpoint, text, recipe)
    assert expected.margin > 1e-3  # no rounding decides who computes a token
    found = measured(checkpoint, text, recipe)
    torch.testing.assert_close(found.inputs, expected.inputs, rtol=2e-3, atol=0)
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-2, atol=0)
    assert found.damage is not None
    torch.testing.assert_close(found.damage, expected.damage, rtol=0.01 if isa else 0.1, atol=0)


def test_an_expert_that_no_token_chooses_counts_as_its_layer_s_mean(tmp_path: Path) -> None:
    """Four tokens, eight experts, one for each token."""
    few = {"num_local_experts": 8, "num_experts_per_tok": 1, "max_position_embeddings": 4}
    folder = tiny.write_checkpoint(tmp_path / "checkpoint", seed=1, **SHAPE | few)
    text = Text("note.txt", "boat", "")
    expected, found = expected_of(folder, text, PLAIN), measured(folder, text, PLAIN)
    assert expected.margin > 1e-2
    assert found.damage is not None
    for layer in range(2):
        used = expected.hidden[layer].any(-1)
        assert 1 < used.sum() <= 4
        mean = expected.hidden[layer].mean(0).expand(8, -1)
        rows = torch.where(used[:, None], expected.hidden[layer], mean)
        torch.testing.assert_close(found.hidden[layer], rows, rtol=1e-2, atol=1e-3 * mean.mean().item())
        assert torch.equal(found.damage[layer].all(-1), used)


def test_importance_is_one_on_average_and_never_nothing(checkpoint: Path, text: Text) -> None:
    found = measured(checkpoint, text, damage=False)
    assert found.damage is None
    assert torch.equal(found.importance(1, 2, "w1"), found.importance(1, 0, "w3"))
    for part, squares in (("w1", found.inputs[1]), ("w2", found.hidden[1, 2])):
        importance = found.importance(1, 2, part)
        torch.testing.assert_close(importance.mean(), torch.tensor(1.0), rtol=FLOOR, atol=0)
        torch.testing.assert_close(importance, (squares / squares.mean()).clamp(min=FLOOR))
    silent = dataclasses.replace(found, hidden=found.hidden.clone())
    silent.hidden[1, 2, :50] = 0.0
    assert silent.importance(1, 2, "w2")[:50].tolist() == [pytest.approx(FLOOR)] * 50


@pytest.mark.parametrize("kind", ["nf4", "int4"])
@pytest.mark.parametrize("isa", ["reference", ""], ids=["reference", "compiled"])
def test_what_four_bits_hold_exactly_takes_no_damage(
    isa: str, kind: str, checkpoint: Path, tmp_path: Path, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what the compiled kernels' 8-bit activations take."""
    use(isa, monkeypatch)
    recipe, weights = Recipe(kind, 16, "bf16"), read_all(checkpoint)  # type: ignore[arg-type]
    for part in PARTS:
        name = expert_name(0, 1, part)
        weights[name] = dequantize(quantize(name, weights[name], recipe.expert_spec)).contiguous()
    before, after = (
        measured(folder, text, recipe).damage for folder in (checkpoint, rewritten(tmp_path / "other", weights))
    )
    assert before is not None
    assert after is not None
    assert (after[0, 1] < (1e-9 if isa else 0.03) * before[0, 1]).all()
    torch.testing.assert_close(after[0, 2:], before[0, 2:], rtol=1e-4, atol=0)


@pytest.mark.parametrize("shards", [1, 3])
def test_neither_the_order_of_tensors_nor_the_shards_matter(
    shards: int, checkpoint: Path, tmp_path: Path, text: Text
) -> None:
    weights = dict(reversed(tiny.tensors(tiny.CONFIG, seed=4).items()))
    found, expected = measured(rewritten(tmp_path / "other", weights, shards), text), measured(checkpoint, text)
    for name in ("inputs", "hidden", "damage"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sources_of_other_types(dtype: torch.dtype, checkpoint: Path, tmp_path: Path, text: Text) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in tiny.tensors(tiny.CONFIG, seed=4).items()}
    found, expected = measured(rewritten(tmp_path / "other", weights), text), measured(checkpoint, text)
    for name in ("inputs", "hidden", "damage"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=0)


def test_every_matrix_is_read_once_into_one_of_two_buffers(
    checkpoint: Path, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the model's size, memory holds one expert's matrix that is used and one that is being read."""
    read: list[str] = []
    buffers: dict[int, int] = {}

    def watched(ref: TensorRef, buffer: torch.Tensor | None = None) -> torch.Tensor:
        read.append(ref.name)
        if "experts" in ref.name:
            assert buffer is not None
            buffers[buffer.data_ptr()] = buffer.nbytes
        return read_tensor(ref, buffer)

    monkeypatch.setattr(reading_ahead, "read_tensor", watched)
    measured(checkpoint, text)
    tensors = Checkpoint(checkpoint).tensors
    assert sorted(read) == sorted(tensors)
    assert list(buffers.values()) == [tensors[W1].nbytes] * 2


def test_a_long_text_is_read_as_far_as_it_is_needed(checkpoint: Path) -> None:
    """The package's own, of which 8,192 tokens are read; progress goes by layers."""
    source, text = Checkpoint(checkpoint), calibration_text(None)
    assert len(text.content) > MOST_TOKENS
    assert text == calibration_text(OWN_TEXT)
    shorter = Text(text.name, text.content.encode()[:MOST_TOKENS].decode(), text.sha256)
    blueprint = Blueprint.of(source.config, "config.json", SEARCHED)
    steps = list(calibrate(source, blueprint, text, damage=False))
    total = sum(ref.nbytes for ref in source.tensors.values())
    assert steps == [Progress("calibrate", total * done // 2, total, "8192 tokens") for done in range(3)]
    assert torch.equal(
        measured(checkpoint, text, damage=False).hidden, measured(checkpoint, shorter, damage=False).hidden
    )


def test_a_text_of_less_than_one_chunk_is_refused(checkpoint: Path) -> None:
    short = Text("note.txt", "x" * (CONTEXT - 1), "")
    with pytest.raises(UsageError, match=r"note\.txt") as caught:
        measured(checkpoint, short)
    assert "32 tokens" in caught.value.message
    assert "--ctx" not in f"{caught.value.message} {caught.value.hint}"  # quantize has no such option
    measured(checkpoint, Text("note.txt", "x" * CONTEXT, ""))


def test_a_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 9)
    with pytest.raises(RefusedError, match=r"latin\.txt: no UTF-8 text: byte 0xe9 at 3"):
        calibration_text(tmp_path / "latin.txt")
    with pytest.raises(NotFoundError, match=r"absent\.txt"):
        calibration_text(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="is a folder"):
        calibration_text(tmp_path)


@pytest.mark.parametrize("damage", [True, False])
@pytest.mark.parametrize("name", [W1, "model.embed_tokens.weight", "model.layers.0.block_sparse_moe.gate.weight"])
def test_a_weight_that_is_no_number_is_named_as_its_source_names_it(
    name: str, damage: bool, tmp_path: Path, text: Text
) -> None:
    weights = tiny.tensors(tiny.CONFIG)
    weights[name].view(-1)[17:200] = float("nan")
    folder = rewritten(tmp_path / "checkpoint", weights)
    with pytest.raises(RefusedError, match=f"^{name} holds nan at"):
        measured(folder, text, damage=damage)


def test_a_token_of_no_state_is_no_damage(tmp_path: Path) -> None:
    """An embedding of zeros, as of a token that stands for nothing, at a chunk's beginning."""
    weights = tiny.tensors(tiny.CONFIG)
    folder = rewritten(tmp_path / "checkpoint", weights)
    text = Text("note.txt", "!" + "x" * (CONTEXT - 1), "")
    (zero,) = load_tokenizer(folder).encode("!")
    weights["model.embed_tokens.weight"][zero] = 0.0
    tiny.write_shards(folder, weights)
    found = measured(folder, text).damage
    assert found is not None
    assert found.isfinite().all()


def test_it_needs_room_and_says_how_much(checkpoint: Path, text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "probe", lambda _: Hardware(1, 10**9, 10**8, 10**9))
    monkeypatch.setattr(module, "read_ahead", lambda *_: pytest.fail("began all the same"))
    with pytest.raises(MemoryBudgetError, match=r"takes 0\.3 GB of memory and 0\.1 GB are free"):
        measured(checkpoint, text)
