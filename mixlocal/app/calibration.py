"""What a text asks of a model's experts before they are quantized: which columns count, and where 4 bits cost most.

One pass over the unquantized model, layer by layer, all of the text at once: memory holds the trunk, the text's hidden
states and one expert, whatever the model's size.

Shapes: T = tokens, L = layers, E = experts, D = model dimension, H = expert hidden size.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch.nn.functional import silu

import mixlocal
from mixlocal.app.blueprint import Blueprint
from mixlocal.app.hardware import probe
from mixlocal.app.progress import Progress
from mixlocal.app.quality.text import Chunks, Text, cut, read_text
from mixlocal.app.reading_ahead import Weights, read_ahead
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.errors import MemoryBudgetError, UsageError
from mixlocal.experts.plan import BASE_BYTES
from mixlocal.experts.runtime import ExpertCounts, Guess, Routing
from mixlocal.experts.trace import RoutingTrace
from mixlocal.kernels import Kernels, Step, select
from mixlocal.kernels.isa import set_threads
from mixlocal.kernels.quantizer import quantize_rows
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import KVCache, KVPool, kv_bytes_per_token, page_count
from mixlocal.model.layers import make_step
from mixlocal.model.load import trunk_weights
from mixlocal.model.tensors import EXPERT_PARTS
from mixlocal.model.transformer import Piece, Transformer, embed
from mixlocal.quant.format import QuantSpec
from mixlocal.quant.quantize import TINY, check_finite
from mixlocal.quant.search import Search
from mixlocal.store.checkpoint import TensorRef
from mixlocal.store.pieces import expert_piece

OWN_TEXT = Path(mixlocal.__file__).parent / "data" / "calibration.txt"
CONTEXT = 512
MOST_TOKENS = 8192
FLOOR = 0.01  # of the mean importance: a column that this text does not use is not worthless


@dataclass(frozen=True, slots=True)
class Calibration:
    """inputs: float32 [L, D], mean square of what enters w1 and w3.  hidden: [L, E, H], of what enters w2, weighted as
    the router weights it.

    damage: float64 [L, E, 3], of w1, w3 and w2: the square of what 4 bits change of the layer's output, as a share of
    the hidden state that it is added to, summed over tokens; None if it was not asked for.
    """

    inputs: torch.Tensor
    hidden: torch.Tensor
    damage: torch.Tensor | None

    def importance(self, layer: int, expert: int, part: str) -> torch.Tensor:
        """Of the columns of a matrix, 1 on average."""
        return _as_importance(self.hidden[layer, expert] if part == "w2" else self.inputs[layer])


def calibration_text(path: Path | None) -> Text:
    """The package's own without a path; see `read_text`."""
    return read_text(path or OWN_TEXT)


def calibrate(
    weights: Weights, blueprint: Blueprint, text: Text, *, damage: bool
) -> Generator[Progress, None, Calibration]:
    """Raises `UsageError` for a text of less than one piece, `MemoryBudgetError`, and what reading can raise."""
    config = blueprint.config
    context = min(CONTEXT, config.max_context)
    chunks = _chunks(text, weights.folder, context)
    _check_memory(weights, blueprint, chunks.count * context)
    set_threads(probe(weights.folder).cores)
    arrays = {blueprint.sources[ref.name]: tensor.clone() for ref, tensor in _trunk(weights, blueprint)}
    trunk = trunk_weights(_typed(arrays, blueprint), config, QuantSpec("bf16"), str(weights.folder))
    kernels = select("cpu")
    experts = _Experts(weights, blueprint, kernels, damage=damage)
    model = _LayerByLayer(config, trunk, experts, kernels)
    pool = KVPool(config, chunks.count * page_count(context))
    pieces = [Piece(KVCache(pool, context), chunks.chunk(number)) for number in range(chunks.count)]
    total = sum(ref.nbytes for ref in weights.tensors.values())
    for layer in model.walk(pieces):
        yield Progress("calibrate", total * layer // config.n_layers, total, f"{chunks.count * context} tokens")
    return Calibration(experts.inputs, experts.hidden_or_mean(), experts.damage if damage else None)


def _chunks(text: Text, folder: Path, context: int) -> Chunks:
    tokenizer = load_tokenizer(folder)
    try:
        return cut(text, tokenizer, context, MOST_TOKENS // context, str(folder))
    except UsageError as error:  # which speaks of an option that is not ours
        raise UsageError(
            f"{text.name} is too short to calibrate on: a model of {folder} reads {context} tokens at a time",
            "give a longer text",
        ) from error


class _LayerByLayer(Transformer):
    """Tells its experts the square of each token's hidden state, and uses no head."""

    @torch.inference_mode()
    def walk(self, pieces: Sequence[Piece]) -> Iterator[int]:
        """Yields the number of layers that are done."""
        experts = self.experts
        assert isinstance(experts, _Experts)
        counts = [len(piece.ids) for piece in pieces]
        for piece, count in zip(pieces, counts, strict=True):
            piece.cache.make_room(count)
        step: Step = make_step(self.config, [piece.cache for piece in pieces], counts, self._device)
        hidden = embed(self._embedding, torch.tensor([token for piece in pieces for token in piece.ids]))
        layers = pieces[0].cache.layers
        for i, (attention, router) in enumerate(zip(self._attention, self._routers, strict=True)):
            yield i
            attention.add_to(hidden, layers[i], step)
            normed, ids, shares = router.choose(hidden)
            experts.power = hidden.square().sum(-1).clamp(min=TINY)  # a token may have no state yet
            hidden += experts.apply(i, normed, Routing(ids, shares))
        yield len(self._routers)


class _Experts:
    """An `ExpertRuntime` that reads each expert when its turn comes, once, and keeps what it saw."""

    def __init__(self, weights: Weights, blueprint: Blueprint, kernels: Kernels, *, damage: bool) -> None:
        config = blueprint.config
        self._blueprint, self._kernels = blueprint, kernels
        self._spec = blueprint.recipe.expert_spec
        self._per_layer = config.router.n_experts
        shape = config.n_layers, config.router.n_experts
        self.counts, self.trace = ExpertCounts(), RoutingTrace(*shape)
        self.power = torch.empty(0)
        self.inputs = torch.zeros(config.n_layers, config.dim)
        self.hidden = torch.zeros(*shape, config.expert_hidden)
        self.damage = torch.zeros(*shape, len(EXPERT_PARTS), dtype=torch.float64)
        self._measures_damage = damage
        by_name = {ours: weights.tensors[source] for source, ours in blueprint.sources.items()}
        places = ((layer, expert) for layer in range(shape[0]) for expert in range(shape[1]))
        refs = [by_name[expert_piece(*place, part)] for place in places for part in EXPERT_PARTS]
        self._matrices = (tensor for _, tensor in _read(refs))

    def apply(self, layer: int, x: torch.Tensor, routing: Routing, guess: Guess | None = None) -> torch.Tensor:
        """See `ExpertRuntime.apply`."""
        self.inputs[layer] = x.square().mean(0)
        out = torch.zeros_like(x)
        for expert in range(self._per_layer):
            tokens, ranks = (routing.experts == expert).nonzero(as_tuple=True)
            shares = routing.weights[tokens, ranks].unsqueeze(1)
            part = self._expert(layer, expert, x[tokens], shares, self.power[tokens].unsqueeze(1))
            out.index_add_(0, tokens, part * shares)
        return out

    def close(self) -> None:
        """See `ExpertRuntime.close`."""

    def hidden_or_mean(self) -> torch.Tensor:
        """`hidden`, with its layer's mean for an expert that no token chose."""
        unused = self.hidden.sum(-1, keepdim=True) == 0
        return torch.where(unused, self.hidden.mean(1, keepdim=True), self.hidden)

    def _expert(
        self, layer: int, expert: int, x: torch.Tensor, shares: torch.Tensor, power: torch.Tensor
    ) -> torch.Tensor:
        """w2(silu(w1 x) * (w3 x)), float32 [T, D]; each matrix is used before the next is read."""
        linear = self._kernels.linear
        w1 = next(self._matrices)
        gate = linear(x, w1)
        gate_off = self._off(layer, expert, "w1", w1, x, gate)
        w3 = next(self._matrices)
        up = linear(x, w3)
        up_off = self._off(layer, expert, "w3", w3, x, up)
        hidden = silu(gate) * up
        if len(x):
            self.hidden[layer, expert] = (hidden * shares).square().mean(0)
        w2 = next(self._matrices)
        out = linear(hidden, w2)
        if gate_off is not None and up_off is not None:
            off = (
                linear((silu(gate_off) - silu(gate)) * up, w2),
                linear(silu(gate) * (up_off - up), w2),
                self._off(layer, expert, "w2", w2, hidden, out),
            )
            for number, other in enumerate(off):
                assert other is not None
                change = other - out if number == 2 else other
                self.damage[layer, expert, number] = ((change * shares).square() / power).double().sum()
        return out

    def _off(
        self, layer: int, expert: int, part: str, weight: torch.Tensor, x: torch.Tensor, exact: torch.Tensor
    ) -> torch.Tensor | None:
        """`exact` = weight x, of the weight in 4 bits; None if damage is not asked for, or nothing would come of it."""
        if not self._measures_damage or not len(x):
            return None
        used = self.hidden[layer, expert] if part == "w2" else self.inputs[layer]
        name = self._blueprint.module.expert_source(layer, expert, part)
        search = Search(_as_importance(used)) if self._blueprint.recipe.search else None
        quantized, _ = quantize_rows(name, weight, self._spec, search=search)
        return self._kernels.linear(x, quantized)


def _read(refs: Sequence[TensorRef]) -> Iterator[tuple[TensorRef, torch.Tensor]]:
    """As `read_ahead` does, of types that the kernels take. Raises `RefusedError` for NaN and infinity."""
    for ref, tensor in zip(refs, read_ahead(refs, max(ref.nbytes for ref in refs)), strict=True):
        check_finite(ref.name, tensor)
        yield ref, tensor.float() if tensor.dtype == torch.float16 else tensor


def _as_importance(squares: torch.Tensor) -> torch.Tensor:
    mean = squares.mean()
    return (squares / mean).clamp(min=FLOOR) if mean > 0 else torch.ones_like(squares)


def _trunk(weights: Weights, blueprint: Blueprint) -> Iterator[tuple[TensorRef, torch.Tensor]]:
    return _read([weights.tensors[source] for source, ours in blueprint.sources.items() if ours in blueprint.trunk])


def _typed(arrays: dict[str, torch.Tensor], blueprint: Blueprint) -> dict[str, torch.Tensor]:
    """Matrices in bfloat16, the rest in float32."""
    types = {name: torch.bfloat16 if tensor.is_matrix else torch.float32 for name, tensor in blueprint.trunk.items()}
    return {name: array.to(types[name]) for name, array in arrays.items()}


def _check_memory(weights: Weights, blueprint: Blueprint, tokens: int) -> None:
    """Raises `MemoryBudgetError` if the pass has no room."""
    config: ModelConfig = blueprint.config
    refs = [weights.tensors[source] for source, ours in blueprint.sources.items() if ours in blueprint.trunk]
    trunk = sum(ref.nbytes if ref.dtype == torch.bfloat16 else ref.nbytes + 2 * prod(ref.shape) for ref in refs)
    matrix = max(weights.tensors[s].nbytes for s, ours in blueprint.sources.items() if ours not in blueprint.trunk)
    states = tokens * (4 * (8 * config.dim + 4 * config.expert_hidden) + kv_bytes_per_token(config))
    needed, free = BASE_BYTES + trunk + 4 * matrix + states, probe(weights.folder).ram_free
    if needed > free:
        raise MemoryBudgetError(
            f"reading the text takes {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free",
            "close other programs, or quantize without --calibrate and --fit",
        )
