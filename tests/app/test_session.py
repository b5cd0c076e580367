"""A loaded model from the outside: text in, text out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from stores import quantized

from mixlocal.app.installed import find_store
from mixlocal.app.session import Chunk, Session
from mixlocal.app.template import Message
from mixlocal.engine.generate import Prefilled
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import ContextOverflowError, MemoryBudgetError, NotFoundError, RefusedError, UsageError
from mixlocal.experts.plan import PREFILL_CHUNK
from mixlocal.store.paths import home


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("session")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=2048)
    return quantized(checkpoint, root / "models" / "tiny" / "q4").folder


@pytest.fixture(scope="module")
def session(store: Path) -> Session:
    return Session.open(str(store))


def answer(session: Session, prompt: str = "Hello", **params: object) -> list[Chunk]:
    return list(session.stream(prompt, SamplingParams(**{"max_tokens": 40, "seed": 5} | params), raw=True))


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_same_seed_same_answer(session: Session) -> None:
    first, again, other = answer(session), answer(session), answer(session, seed=6)
    assert text(first) == text(again) != text(other)


def test_streamed_text_is_the_decoded_tokens(session: Session) -> None:
    """Random bytes: characters are split over tokens, and many are malformed."""
    chunks = answer(session, temperature=1.5, max_tokens=200)
    ids = [chunk.choice.id for chunk in chunks if chunk.choice and chunk.choice.id not in session.tokenizer.eos_ids]
    assert text(chunks) == session.tokenizer.decode(ids, continuation=True)


def test_rows_of_the_embedding_that_are_no_tokens_have_no_text(store: Path, session: Session) -> None:
    """The tiny model has 260 rows and its tokenizer 258 tokens; hot enough, it chooses one of the two others."""
    assert session.config.vocab_size > session.tokenizer.vocab_size
    chunks = answer(session, temperature=50.0, max_tokens=400, top_p=1.0, seed=2)
    strays = [c for c in chunks if c.choice and c.choice.id >= session.tokenizer.vocab_size]
    assert strays
    assert all(c.text == "" for c in strays)
    assert session.token_bytes(259) == b""


def test_stop_string_over_token_borders_is_not_shown(session: Session) -> None:
    whole = text(answer(session, temperature=1.0))
    stop = whole[10:14]
    chunks = answer(session, temperature=1.0, stop=(stop,))
    assert text(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish == "stop"


def test_max_tokens_and_context_end_with_length(store: Path, session: Session) -> None:
    chunks = answer(session, max_tokens=3)
    assert chunks[-1].finish == "length"
    assert chunks[-1].stats is not None
    assert chunks[-1].stats.completion_tokens == 3
    small = Session.open(str(store), context=16)
    filled = list(small.stream("12345678", SamplingParams(seed=1, max_tokens=100), raw=True))
    assert filled[-1].stats is not None
    assert filled[-1].stats.completion_tokens + filled[-1].stats.prompt_tokens <= 16


def test_no_token_wanted(session: Session) -> None:
    chunks = answer(session, max_tokens=0)
    assert text(chunks) == ""
    assert chunks[-1].finish == "length"


def test_long_prompts_report_their_prefill(session: Session) -> None:
    chunks = answer(session, "x" * (PREFILL_CHUNK + 100), max_tokens=1)
    done = [chunk.prefilled.done for chunk in chunks if chunk.prefilled]
    assert done == [0, PREFILL_CHUNK, PREFILL_CHUNK + 100]


@pytest.mark.parametrize("common", [0, 1, 20, 39, 40])
def test_what_a_cache_holds_of_a_prompt_is_not_computed_again(session: Session, common: int) -> None:
    """And the answer is the same, to the last bit of its probabilities, as with an empty cache."""
    first = [(7 * n) % 256 for n in range(40)]
    second = first[:common] + [(5 * n + 3) % 256 for n in range(60)]
    params = SamplingParams(max_tokens=12, seed=5, repeat_penalty=1.3)
    cache = session.new_cache()
    list(session.stream_ids(first, params, cache=cache))
    again, fresh = list(session.stream_ids(second, params, cache=cache)), list(session.stream_ids(second, params))
    assert [chunk.choice for chunk in again] == [chunk.choice for chunk in fresh]
    assert again[0].prefilled == Prefilled(cache_kept(first, second), len(second), cache_kept(first, second))
    assert again[-1].stats.kept_tokens == cache_kept(first, second)


def cache_kept(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with, without the second's last."""
    return next(n for n, pair in enumerate(zip([*first, -1], second, strict=False)) if pair[0] != pair[1])


def test_the_same_prompt_again_computes_one_token(session: Session) -> None:
    cache, ids = session.new_cache(), list(range(50))
    chunks = [list(session.stream_ids(ids, SamplingParams(max_tokens=5, seed=1), cache=cache)) for _ in range(2)]
    assert chunks[1][0].prefilled == Prefilled(49, 50, 49)
    assert text(chunks[0]) == text(chunks[1])


def test_a_prompt_beyond_the_context_names_both_numbers(session: Session) -> None:
    with pytest.raises(ContextOverflowError, match="3000 tokens and the context holds 2048"):
        answer(session, "x" * 3000)


def test_base_models_take_one_text(session: Session) -> None:
    with pytest.raises(UsageError, match="no chat format"):
        session.encode([Message("system", "Be brief."), Message("user", "Hi")])


def test_options_out_of_range(store: Path) -> None:
    for wrong in ({"context": 0}, {"context": 4096}, {"experts_per_token": 0}, {"experts_per_token": 5}):
        with pytest.raises(UsageError, match="outside 1 to"):
            Session.open(str(store), **wrong)


def test_other_experts_per_token_warn(store: Path) -> None:
    assert "reduces quality and speed" in Session.open(str(store), experts_per_token=3).warnings[0]
    assert "trained with 2" in Session.open(str(store), experts_per_token=1).warnings[0]
    assert Session.open(str(store), experts_per_token=2).warnings == ()


def test_the_lack_of_compiled_kernels_is_said(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlocal.app import model_run

    monkeypatch.setattr(model_run, "MISSING", "no compiler")
    warning = Session.open(str(store)).warnings[0]
    assert "no compiler" in warning
    assert "slower" in warning


def test_memory_is_checked_before_loading(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixlocal.app import model_run as module

    monkeypatch.setattr(module, "load_trunk", lambda *_: pytest.fail("loaded although it cannot fit"))
    with pytest.raises(MemoryBudgetError, match=r"needs at least --ram 2\d\dM with a context of 2048"):
        Session.open(str(store), ram="250M")


def test_more_memory_than_is_free_is_not_taken_in_silence(store: Path) -> None:
    assert "using those" in Session.open(str(store), ram=1 << 60).warnings[0]


def test_int8_attention_runs(store: Path, tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    plain = Session.open(str(quantized(checkpoint, tmp_path / "a" / "bf16", "bf16").folder))
    short = Session.open(str(quantized(checkpoint, tmp_path / "b" / "bf16", "bf16", attention="int8").folder))
    assert short.encode("abc", raw=True) == plain.encode("abc", raw=True)
    greedy = {"temperature": 0, "max_tokens": 8}
    assert text(answer(plain, **greedy))[:2] == text(answer(short, **greedy))[:2]


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", vocab_size=200, bos_token_id=None, eos_token_id=None)
    store = quantized(checkpoint, tmp_path / "store")
    with pytest.raises(RefusedError, match="vocab_size = 200"):
        Session.open(str(store.folder))


def test_where_models_are_found(store: Path, tmp_path: Path) -> None:
    folders = home(store.parent.parent.parent)
    assert find_store("tiny", folders) == find_store("tiny:q4", folders) == find_store(str(store), folders) == store
    assert find_store(f"{store.parent}:q4", folders) == store
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    for model, hint in (
        ("tiny:q8", "mixlocal pull tiny:q8"), ("nobody", "mixlocal ls"), ("smolmix", "mixlocal pull smolmix"),
        (str(checkpoint), "mixlocal quantize"), ("/nowhere/at/all", ""),
    ):  # fmt: skip
        with pytest.raises(NotFoundError) as missing:
            find_store(model, folders)
        assert hint in missing.value.hint
    with pytest.raises(UsageError, match="no variant"):
        find_store("tiny:q5", folders)


def test_a_bare_name_takes_what_is_installed(store: Path, tmp_path: Path) -> None:
    """The catalogue's variant where it is there, else another: nothing is fetched that is not needed."""
    folders = home(tmp_path)
    shutil.copytree(store, tmp_path / "models" / "smolmix" / "q4")
    assert find_store("smolmix", folders) == tmp_path / "models" / "smolmix" / "q4"
    shutil.copytree(store, tmp_path / "models" / "smolmix" / "q8")
    assert find_store("smolmix", folders) == tmp_path / "models" / "smolmix" / "q8"
