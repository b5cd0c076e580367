"""Writing down what routers say changes nothing, and what is written down is what they said."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiered_model import EXPERTS, IDS, LAYERS, PROFILE, logits, make_store

from mixlocal.app.model_run import open_experts, store_config
from mixlocal.experts.recorder import NOTHING, RecordingExperts, entropy_bits
from mixlocal.experts.runtime import ExpertRuntime, Guess, Routing
from mixlocal.experts.tiered import TieredExperts
from mixlocal.experts.trace import KEPT_TOKENS, RoutingTrace
from mixlocal.kernels import select
from mixlocal.model.load import load_trunk
from mixlocal.model.transformer import Transformer
from mixlocal.store.model_store import ModelStore


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return make_store(tmp_path_factory.mktemp("recorder"))


class Witness:
    """Beneath the recorder: keeps what every layer was given."""

    def __init__(self, inner: ExpertRuntime) -> None:
        self.counts, self.trace, self._inner = inner.counts, inner.trace, inner
        self.seen: list[tuple[int, torch.Tensor, list[list[int]], list[list[int]]]] = []

    def apply(self, layer: int, x: torch.Tensor, routing: Routing, guess: Guess | None = None) -> torch.Tensor:
        named = guess().tolist() if guess else []
        self.seen.append((layer, x.clone(), routing.experts.tolist(), named))
        return self._inner.apply(layer, x, routing, guess)

    def close(self) -> None:
        self._inner.close()


def recording(store: ModelStore, experts: ExpertRuntime) -> tuple[Transformer, RecordingExperts, list[torch.Tensor]]:
    config = store_config(store)
    trunk = load_trunk(store, config)
    gates = [layer.router for layer in trunk.layers]
    recorder = RecordingExperts(experts, gates)
    return Transformer(config, trunk, recorder, select("cpu")), recorder, gates


def test_the_record_is_what_was_routed(store: ModelStore) -> None:
    witness = Witness(open_experts(store))
    model, recorder, gates = recording(store, witness)
    logits(model)
    record = recorder.record()
    assert record.chosen.shape == record.guessed.shape == (LAYERS, len(IDS), 2)
    assert record.n_experts == EXPERTS
    for layer in range(LAYERS):
        seen = [part for part in witness.seen if part[0] == layer]
        assert record.chosen[layer].tolist() == [row for part in seen for row in part[2]]
        for row, x in zip(record.entropy[layer], torch.cat([part[1] for part in seen]), strict=True):
            p = torch.softmax(x.double() @ gates[layer].double().T, 0)
            assert row == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-4)
        if layer + 1 < LAYERS:
            assert record.guessed[layer + 1].tolist() == [row for part in seen for row in part[3]]
    assert (record.guessed[0] == NOTHING).all()
    assert 0 < record.entropy.min() < record.entropy.max() < 3


def test_some_of_the_tokens(store: ModelStore) -> None:
    model, recorder, _ = recording(store, open_experts(store))
    logits(model)
    record, wanted = recorder.record(), np.arange(len(IDS)) % 3 == 1
    part = record.of(wanted)
    assert part.chosen.tolist() == record.chosen[:, 1::3].tolist()
    assert part.entropy.tolist() == record.entropy[:, 1::3].tolist()
    assert part.guessed.tolist() == record.guessed[:, 1::3].tolist()


def test_the_model_computes_the_same_bits_and_its_runtime_learns_the_same(store: ModelStore) -> None:
    """With experts on disk too, where guesses are acted upon."""
    config = store_config(store)
    plain = open_experts(store)
    expected = logits(Transformer(config, load_trunk(store, config), plain, select("cpu")))
    records = []
    for inner in (open_experts(store), TieredExperts(store.experts(), select("cpu"), EXPERTS + 4, PROFILE)):
        model, recorder, _ = recording(store, inner)
        assert torch.equal(logits(model), expected)
        records.append(recorder.record())
        assert model.experts.counts is inner.counts
        assert model.experts.trace.choices().tolist() == plain.trace.choices().tolist()
        recorder.close()
    assert records[0].chosen.tolist() == records[1].chosen.tolist() == plain.trace.choices().tolist()
    assert records[0].guessed.tolist() == records[1].guessed.tolist()


@pytest.mark.parametrize(
    ("probabilities", "bits"),
    [
        ((0.25, 0.25, 0.25, 0.25), 2.0),
        ((0.5, 0.25, 0.125, 0.125), 1.75),  # 1/2 x 1 + 1/4 x 2 + 2 x 1/8 x 3
        ((1.0, 0.0, 0.0, 0.0), 0.0),
    ],
)
def test_entropy(probabilities: tuple[float, ...], bits: float) -> None:
    logits = torch.tensor([probabilities]).clamp(min=1e-30).log() + 7  # a softmax does not see what is added to all
    assert entropy_bits(logits).tolist() == pytest.approx([bits], abs=1e-5)


def test_a_trace_keeps_the_order_of_a_token_s_choices() -> None:
    trace = RoutingTrace(2, 8, tokens=4)
    for layer in (0, 1):
        trace.add(layer, [5, 2, 7, 0, 1, 3], 3)  # a prompt of three tokens
    trace.add(0, [6, 4], 1)
    trace.add(1, [4, 6], 1)
    assert trace.choices().tolist() == [[[5, 2], [7, 0], [1, 3], [6, 4]], [[5, 2], [7, 0], [1, 3], [4, 6]]]
    for layer in (0, 1):
        trace.add(layer, [0, 1], 1)
    assert trace.choices().tolist() == [[[7, 0], [1, 3], [6, 4], [0, 1]], [[7, 0], [1, 3], [4, 6], [0, 1]]]
    assert [(step.layer, step.tokens) for step in trace.steps()] == [(0, 3), (1, 3), (0, 1), (1, 1), (0, 1), (1, 1)]


def test_a_token_counts_once_every_layer_has_it() -> None:
    trace = RoutingTrace(2, 4)
    assert trace.choices().shape == (2, 0, 0)
    trace.add(0, [1], 1)
    assert trace.choices().shape == (2, 0, 0)
    trace.add(0, [2], 1)
    trace.add(1, [3], 1)
    assert trace.choices().tolist() == [[[2]], [[3]]]


def test_of_a_long_prompt_a_trace_keeps_the_end() -> None:
    trace = RoutingTrace(1, 8)
    chosen = [[i % 8, (i + 3) % 8] for i in range(KEPT_TOKENS + 90)]
    trace.add(0, [expert for row in chosen for expert in row], len(chosen))
    assert trace.choices().tolist() == [chosen[90:]]
