"""quality: the figures against arithmetic by hand and against transformers; refusals; going on with a reference."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import tiny
import torch
from stores import open_model, quantized

from mixlocal.app.budgets import RunOptions
from mixlocal.app.measure import Running
from mixlocal.app.model_run import ModelRun
from mixlocal.app.prune import find_leftovers
from mixlocal.app.prune import prune as remove_leftover
from mixlocal.app.quality import divergence as divergence_module
from mixlocal.app.quality import scoring
from mixlocal.app.quality.divergence import divergence, join, mean_and_error, percentile, perplexity, score
from mixlocal.app.quality.run import QualityRequest, QualityRow, prepare_quality, run_quality
from mixlocal.app.quality.text import Chunks, cut, read_text
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.errors import (
    CorruptError,
    DiskFullError,
    MemoryBudgetError,
    MixlocalError,
    NotFoundError,
    RefusedError,
    UsageError,
)
from mixlocal.model.kv_cache import own_cache
from mixlocal.store.logit_file import LogitReader
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home
from mixlocal.store.paths import home as home_below

LN2 = math.log(2)
SENTENCE = "The keeper counted the boats, and one was missing; nobody had seen it leave. "
EXACT = RunOptions(kv_dtype="f32", device="cpu")
CONTEXT = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """tiny:bf16 and tiny:q4 of one checkpoint, and stranger:q4 whose tokens are others."""
    root = tmp_path_factory.mktemp("quality")
    checkpoint = tiny.write_checkpoint(root / "checkpoint")
    for variant in ("bf16", "q4"):
        quantized(checkpoint, root / "models" / "tiny" / variant, variant)
    stranger = tiny.write_checkpoint(root / "stranger")
    tokenizer = json.loads((stranger / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (stranger / "tokenizer.json").write_text(json.dumps(tokenizer))
    quantized(stranger, root / "models" / "stranger" / "q4", "q4", name="stranger")
    (root / "text.txt").write_text(SENTENCE * 2)
    return home_below(root)


@pytest.fixture
def place(folders: Home, tmp_path: Path) -> Home:
    """The same models, with a cache of its own."""
    (tmp_path / "models").symlink_to(folders.models)
    (tmp_path / "text.txt").write_text(SENTENCE * 2)
    return home_below(tmp_path)


def request(place: Home, *models: str, **changes: object) -> QualityRequest:
    return dataclasses.replace(QualityRequest(models, text=place.data / "text.txt", context=CONTEXT), **changes)


def measure(place: Home, *models: str, **changes: object) -> list[QualityRow]:
    events = run_quality(request(place, *models, **changes), EXACT, place)
    return [event for event in events if isinstance(event, QualityRow)]


def test_a_pair_of_distributions_by_hand() -> None:
    """Three tokens of a vocabulary, two positions.

                 reference q        model p            token of the text
    position 0   1/2  1/4  1/4      1/4  1/2  1/4      1
    position 1   1/8  3/4  1/8      1/4  1/2  1/4      2

    KL: position 0: 1/2 ln 2 + 1/4 ln 1/2 + 1/4 ln 1 = 1/4 ln 2
        position 1: 1/8 ln 1/2 + 3/4 ln 3/2 + 1/8 ln 1/2 = 3/4 ln 3/2 - 1/4 ln 2
    """
    q = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8]])
    p = torch.tensor([[1 / 4, 1 / 2, 1 / 4], [1 / 4, 1 / 2, 1 / 4]])
    scores = score(p.log() + 3, torch.tensor([1, 2]), q.log() - 5)  # a softmax does not see what is added to all
    # nll: -ln 1/2 and -ln 1/4, mean 3/2 ln 2, each ln 2 / 2 off; with n - 1 = 1 that is the error of the mean
    found = perplexity(scores)
    assert found.value == pytest.approx(2**1.5)
    assert found.error == pytest.approx(2**1.5 * LN2 / 2)
    first, second = LN2 / 4, 0.75 * math.log(1.5) - LN2 / 4
    result = divergence(scores)
    assert result.mean_kl == pytest.approx((first + second) / 2)
    assert result.mean_kl_error == pytest.approx(abs(first - second) / 2)
    assert result.median_kl == pytest.approx((first + second) / 2)
    low, high = sorted((first, second))
    assert result.kl_90 == pytest.approx(low + 0.9 * (high - low))
    assert result.kl_95 == pytest.approx(low + 0.95 * (high - low))
    assert result.kl_99 == pytest.approx(low + 0.99 * (high - low))
    assert result.max_kl == pytest.approx(high)
    # likeliest: 0 against 1, then 1 and 1
    assert (result.same_top, result.same_top_error) == (0.5, 0.5)
    # of the text's token: 1/2 - 1/4 and 1/4 - 1/8; squares 1/16 and 1/64, mean 5/128, each 3/128 off
    assert result.rms_dp == pytest.approx(math.sqrt(5 / 128))
    assert result.rms_dp_error == pytest.approx(3 / 128 / (2 * math.sqrt(5 / 128)))
    # of the reference's likeliest: 1/4 - 1/2 and 1/2 - 3/4
    assert result.rms_top_dp == pytest.approx(1 / 4)
    # nll of the reference: ln 4 and ln 8, so ln 2 more at both
    assert result.log_ratio == pytest.approx(-LN2)
    assert result.log_ratio_error == pytest.approx(0, abs=1e-7)


def random_logits(seed: int, tokens: int = 40, vocabulary: int = 30) -> torch.Tensor:
    return 3 * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_the_error_of_the_ratio_is_that_of_the_covariance() -> None:
    """As llama-perplexity has it: sqrt(var a + var b - 2 cov), of means."""
    targets = torch.arange(40) % 30
    scores = score(random_logits(1), targets, random_logits(1) + 0.3 * random_logits(2))
    a, b = scores.nll, scores.reference_nll
    assert b is not None
    covariance = float(((a * b).mean() - a.mean() * b.mean()) / (len(a) - 1))
    variances = mean_and_error(a)[1] ** 2 + mean_and_error(b)[1] ** 2
    assert divergence(scores).log_ratio_error == pytest.approx(math.sqrt(variances - 2 * covariance))
    ratio = perplexity(scores).value / math.exp(b.mean())
    assert divergence(scores).log_ratio == pytest.approx(math.log(ratio))


def test_kl_is_torch_s_and_zero_for_the_same() -> None:
    targets = torch.zeros(40, dtype=torch.int64)
    p, q = random_logits(1), random_logits(2)
    expected = torch.nn.functional.kl_div(
        p.double().log_softmax(-1), q.double().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    found = score(p, targets, q).kl
    torch.testing.assert_close(found, expected)
    same = divergence(score(q, targets, q))
    assert (same.mean_kl, same.max_kl, same.same_top, same.rms_dp, same.rms_top_dp, same.log_ratio) == (
        0,
        0,
        1,
        0,
        0,
        0,
    )


def test_far_logits_are_no_trouble() -> None:
    far = torch.tensor([[1000.0, -1000.0, 0.0]])
    scores = score(far, torch.tensor([1]), -far)
    assert scores.nll.item() == 2000
    assert scores.kl is not None
    assert scores.kl.item() == 2000


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = torch.arange(40) % 30
    whole = score(random_logits(1), targets, random_logits(2))
    monkeypatch.setattr(divergence_module, "BLOCK_BYTES", 8 * 30 * 7)
    assert divergence(score(random_logits(1), targets, random_logits(2))) == divergence(whole)
    parts = (slice(17), slice(17, 40))
    halves = [score(random_logits(1)[rows], targets[rows], random_logits(2)[rows]) for rows in parts]
    assert divergence(join(halves)) == divergence(whole)


@pytest.mark.parametrize(("fraction", "expected"), [(0.5, 5.0), (0.9, 9.0), (0.99, 9.9), (1, 10.0), (0.25, 2.5)])
def test_percentiles_lie_on_straight_lines(fraction: float, expected: float) -> None:
    assert percentile(torch.tensor([10.0, *range(10)], dtype=torch.float64), fraction) == pytest.approx(expected)


def test_chunks_are_cut_as_llama_perplexity_cuts(folders: Home, tmp_path: Path) -> None:
    """BOS counts as the text's first token and takes the place of each chunk's."""
    tokenizer = load_tokenizer(folders.models / "tiny" / "bf16")
    text = read_text(folders.data / "text.txt")
    plain = cut(text, tokenizer, 50, None, "tiny")
    ids = tokenizer.encode(text.content)
    assert (plain.count, plain.chunk(0), plain.chunk(2)) == (len(ids) // 50, ids[:50], ids[100:150])
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    with_bos = cut(text, load_tokenizer(tmp_path), 50, 2, "tiny")
    bos = tokenizer.encode("<s>", special=True)
    assert (with_bos.count, with_bos.chunk(0), with_bos.chunk(1)) == (2, bos + ids[:49], bos + ids[50:99])


def expected_scores(logits_of: dict[str, object], chunks: Chunks) -> tuple[float, float]:
    """(perplexity of "model", mean KL from "reference"), by loops over whole chunks."""
    nll, kl = [], []
    for number in range(chunks.count):
        chunk = chunks.chunk(number)
        found, reference = (logits_of[name](chunk).double() for name in ("model", "reference"))  # type: ignore[operator]
        for position in range(CONTEXT // 2, CONTEXT - 1):
            p, q = found[position].softmax(-1), reference[position].softmax(-1)
            nll.append(-math.log(p[chunk[position + 1]]))
            kl.append(float((q * (q / p).log()).sum()))
    return math.exp(sum(nll) / len(nll)), sum(kl) / len(kl)


def test_the_figures_are_transformers_s(folders: Home, place: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folders.data / "checkpoint", dtype=torch.float32)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * 260 * 4)  # four rows a piece
    reference, quantized_row = measure(place, "tiny:bf16", "tiny:q4", against="tiny:bf16")
    store = opened(folders, "q4")
    model, config = open_model(store)
    chunks = cut(read_text(place.data / "text.txt"), load_tokenizer(store.folder), CONTEXT, None, "tiny")

    def ours(ids: list[int]) -> torch.Tensor:
        return model.forward(torch.tensor(ids), own_cache(config, CONTEXT, torch.float32), all_logits=True)

    ways = {
        "model": ours,
        "reference": lambda ids: theirs(torch.tensor([ids])).logits[0].detach(),
    }
    perplexity_of_q4, kl = expected_scores(ways, chunks)
    assert quantized_row.perplexity == pytest.approx(perplexity_of_q4, rel=1e-5)
    assert quantized_row.mean_kl == pytest.approx(kl, rel=1e-3)
    ways["model"] = ways["reference"]
    assert reference.perplexity == pytest.approx(expected_scores(ways, chunks)[0], rel=1e-4)
    assert reference.tokens == chunks.count * (CONTEXT - 1 - CONTEXT // 2)
    assert (reference.mean_kl, reference.max_kl, reference.same_top, reference.rms_top_dp) == (0, 0, 1, 0)
    assert 0 < quantized_row.mean_kl < quantized_row.kl_90 < quantized_row.kl_99 < quantized_row.max_kl  # type: ignore[operator]
    assert quantized_row.same_top is not None
    assert quantized_row.same_top < 1


def opened(folders: Home, variant: str) -> ModelStore:
    return ModelStore.open(folders.models / "tiny" / variant)


def test_a_row_says_what_it_is_of(place: Home) -> None:
    one, two = measure(place, "tiny:q4", experts_per_token=(1, 2), chunks=2)
    manifest = opened(place, "q4").manifest
    assert (one.model, one.variant, one.text, one.against, one.mean_kl) == ("tiny", "q4", "text.txt", None, None)
    assert (one.experts_per_token, two.experts_per_token, one.chunks, one.tokens) == (1, 2, 2, 2 * 15)
    assert one.nbytes == manifest.nbytes
    experts = 2 * 4 * 3 * 64 * 96
    assert one.expert_bits_per_weight == 8 * manifest.experts_bytes / experts
    assert 4.25 <= one.expert_bits_per_weight < one.bits_per_weight
    assert one.perplexity != two.perplexity
    assert two.perplexity == measure(place, "tiny:q4", chunks=2)[0].perplexity, "as trained"


def test_the_reference_runs_as_trained(place: Home) -> None:
    fewer, trained = measure(place, "tiny:bf16", against="tiny:bf16", experts_per_token=(1, 2))
    assert trained.mean_kl == 0
    assert fewer.mean_kl is not None
    assert fewer.mean_kl > 0.01


def test_a_stopped_reference_goes_on(place: Home) -> None:
    """Behind its last whole chunk, to the bytes of one that was never stopped."""
    asked = request(place, "tiny:q4", against="tiny:bf16")
    whole = list(run_quality(asked, EXACT, place))
    (file,) = place.logits.glob("*.logits")
    complete = file.read_bytes()
    file.unlink()
    work = run_quality(asked, EXACT, place)
    seen = [next(work) for _ in range(7)]
    work.close()  # as Ctrl-C does
    assert seen[-1] == Running("tiny:bf16, the reference: tokens", 3 * 31, 4 * 31)
    with LogitReader(file) as reader:
        assert reader.good_chunks(4) == 2, "the third was computed and not ended"
    assert "2 of 4 chunks are there" in prepare_quality(asked, EXACT, place).description
    again = list(run_quality(asked, EXACT, place))
    steps = [event for event in again if isinstance(event, Running) and event.what.endswith("reference: tokens")]
    assert steps[-1] == Running("tiny:bf16, the reference: tokens", 2 * 31, 2 * 31), "two chunks were left"
    assert file.read_bytes() == complete
    assert dataclasses.replace(again[-1], seconds=0) == dataclasses.replace(whole[-1], seconds=0)  # type: ignore[type-var]
    once_more = list(run_quality(asked, EXACT, place))
    assert not [event for event in once_more if isinstance(event, Running) and "reference" in event.what]


def test_a_damaged_reference_is_made_anew_from_the_damage_on(place: Home) -> None:
    (row,) = measure(place, "tiny:q4", against="tiny:bf16")
    (file,) = place.logits.glob("*.logits")
    complete = file.read_bytes()
    for offset in (len(complete) // 2, 3):
        with file.open("r+b") as handle:
            handle.seek(offset)
            handle.write(b"\xff\xff")
        (again,) = measure(place, "tiny:q4", against="tiny:bf16")
        assert dataclasses.replace(again, seconds=0) == dataclasses.replace(row, seconds=0)
        assert file.read_bytes() == complete


def test_more_chunks_go_on_where_fewer_ended(place: Home) -> None:
    measure(place, "tiny:q4", against="tiny:bf16", chunks=1)
    rows = measure(place, "tiny:q4", against="tiny:bf16")
    assert rows[0].chunks == 4
    assert len(list(place.logits.glob("*.logits"))) == 1


def test_another_setting_is_another_file(place: Home) -> None:
    measure(place, "tiny:q4", against="tiny:bf16")
    measure(place, "tiny:q4", against="tiny:bf16", context=40)
    (place.data / "text.txt").write_text(SENTENCE[::-1] * 2)
    measure(place, "tiny:q4", against="tiny:bf16")
    assert len(list(place.logits.glob("*.logits"))) == 3
    leftovers = [found for found in find_leftovers(place) if found.what.startswith("reference logits tiny.bf16-")]
    assert len(leftovers) == 3
    assert all(remove_leftover(found) for found in leftovers)
    assert not list(place.logits.glob("*.logits"))


def test_a_named_reference(place: Home, tmp_path: Path) -> None:
    named = tmp_path / "mine.logits"
    (row,) = measure(place, "tiny:q4", against="tiny:bf16", logits=named)
    assert named.is_file()
    assert not list(place.logits.glob("*.logits"))
    (again,) = measure(place, "tiny:q4", against="tiny:bf16", logits=named)
    assert again.mean_kl == row.mean_kl
    complete = named.read_bytes()
    (tmp_path / "other.txt").write_text(SENTENCE[::-1] * 2)
    for changes, words in (
        ({"text": tmp_path / "other.txt"}, "a reference from another text"),
        ({"against": "tiny:q4"}, "from another model .*tiny:bf16"),
        ({"context": 40}, "from another --ctx, 32"),
    ):
        with pytest.raises(RefusedError, match=words):
            measure(place, "tiny:q4", **{"against": "tiny:bf16", "logits": named, **changes})
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes")
    with pytest.raises(RefusedError, match="not a file of reference logits"):
        measure(place, "tiny:q4", against="tiny:bf16", logits=notes)
    with pytest.raises(NotFoundError, match="there is no folder"):
        measure(place, "tiny:q4", against="tiny:bf16", logits=tmp_path / "nowhere" / "x")
    assert (named.read_bytes(), notes.read_text()) == (complete, "my notes")
    named.write_bytes(complete[:30] + b"?" + complete[31:])
    with pytest.raises(CorruptError, match="head is damaged"):
        measure(place, "tiny:q4", against="tiny:bf16", logits=named)


REFUSED = [
    ({"context": 4096}, UsageError, "text.txt has 154 tokens for tiny:q4, and a chunk has --ctx 4096"),
    ({"context": 7}, UsageError, "--ctx 7 is below 8"),
    ({"chunks": 0}, UsageError, "--chunks 0"),
    ({"logits": Path("x")}, UsageError, "--logits needs --against"),
    ({"models": ()}, UsageError, "no model"),
    ({"models": ("tiny:q4", "tiny:q8")}, NotFoundError, "tiny:q8 is not installed"),
    ({"against": "nobody"}, NotFoundError, "no model is called nobody"),
    (
        {"against": "stranger:q4"},
        RefusedError,
        "different tokenizers: token 64 is b'a' in one, b'b' in the other",
    ),
    ({"experts_per_token": (2, 5)}, UsageError, "--experts-per-token 5 is outside 1 to 4"),
    ({"text": Path("/nowhere.txt")}, NotFoundError, "/nowhere.txt"),
    ({"text": Path("/")}, UsageError, "is a folder"),
]


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused_is_refused_before_anything_is_loaded(
    place: Home, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], error: type[MixlocalError], words: str
) -> None:
    monkeypatch.delattr(ModelRun, "load")
    with pytest.raises(error) as refusal:
        prepare_quality(request(place, "tiny:q4", **changes), EXACT, place)
    assert words in refusal.value.message
    assert not list(place.logits.glob("*"))


def test_texts_that_are_none(place: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ModelRun, "load")
    (place.data / "text.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(RefusedError, match="no UTF-8 text: byte 0xe9 at 3"):
        prepare_quality(request(place, "tiny:q4"), EXACT, place)
    (place.data / "text.txt").write_bytes(b"x")
    with pytest.raises(UsageError, match="has 1 tokens") as refusal:
        prepare_quality(request(place, "tiny:q4"), EXACT, place)
    assert refusal.value.hint == "give a longer text"
    (place.data / "text.txt").write_text(SENTENCE * 9)
    with pytest.raises(UsageError, match="outside 1 to 256"):
        prepare_quality(request(place, "tiny:q4", context=300), EXACT, place)


def test_a_disk_too_small_is_told_before(place: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ModelRun, "load")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 0, 1000))
    with pytest.raises(DiskFullError, match="reference's logits need"):
        prepare_quality(request(place, "tiny:q4", against="tiny:bf16"), EXACT, place)
    assert not place.logits.exists()


def test_memory_that_scoring_takes_is_of_ram(place: Home) -> None:
    """What a refusal names is enough, and a little less is not."""

    def measure(ram: int) -> list[object]:
        return list(run_quality(request(place, "tiny:q4"), dataclasses.replace(EXACT, ram=ram), place))

    with pytest.raises(MemoryBudgetError) as refusal:
        measure(1000)
    named = re.search(r"at least --ram (\d+)M", refusal.value.message)
    assert named is not None
    assert measure(int(named[1]) * 10**6)
    with pytest.raises(MemoryBudgetError):
        measure((int(named[1]) - 2) * 10**6)
