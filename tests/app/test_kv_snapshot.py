"""A KV cache comes back to the bit, and from a file that is not whole and right it does not come back at all."""

from __future__ import annotations

import errno
import os
import random
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from stores import open_model, quantized

from mixlocal.app import kv_snapshot
from mixlocal.app.kv_snapshot import load_snapshot, prune_snapshots, save_snapshot, snapshot_identity
from mixlocal.app.session import Session
from mixlocal.errors import CorruptError, DiskFullError
from mixlocal.kernels import PANEL
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import KV_DTYPES, KVCache, own_cache
from mixlocal.model.transformer import Transformer
from mixlocal.store import durable, kv_file
from mixlocal.store.kv_file import FORMAT_VERSION, MAGIC, Unusable, remove_kv_file, snapshot_path
from mixlocal.store.model_store import ModelStore

LENGTHS = (1, 15, 16, 17, 500)
LIMIT = 512
ME = "this model"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    root = tmp_path_factory.mktemp("kv")
    return quantized(tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=LIMIT), root / "tiny")


@pytest.fixture(scope="session")
def model(store: ModelStore) -> tuple[Transformer, ModelConfig]:
    return open_model(store)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kv" / "0123456789abcdef.kv"


@pytest.fixture(autouse=True)
def _undisturbed_afterwards() -> Iterator[None]:
    yield
    durable.on_call = None


def filled(model: tuple[Transformer, ModelConfig], length: int, dtype: str = "f16") -> KVCache:
    transformer, config = model
    cache = own_cache(config, LIMIT, KV_DTYPES[dtype])
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length))
    transformer.forward(ids, cache)
    return cache


def empty(model: tuple[Transformer, ModelConfig], limit: int = LIMIT, dtype: str = "f16") -> KVCache:
    """With memory in which a value that was not read is seen."""
    cache = own_cache(model[1], limit, KV_DTYPES[dtype])
    for rows, _ in cache.rows():
        rows.fill_(float("nan"))
    return cache


def used(cache: KVCache, length: int) -> list[torch.Tensor]:
    """Keys and values of the first tokens, layer by layer, as one bit pattern a number."""
    parts = []
    for rows, tokens in cache.rows():
        own = rows[cache.table]
        parts.append((own.movedim(-1, -2) if tokens > 1 else own).flatten(0, -2)[:length])
    return [part.contiguous().view(torch.uint8) for part in parts]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_it_comes_back_to_the_bit(
    model: tuple[Transformer, ModelConfig], path: Path, length: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_snapshot, "PIECE_BYTES", 3000)  # parts of several pieces
    before, after = filled(model, length, dtype), empty(model, dtype=dtype)
    save_snapshot(path, before, ME)
    assert load_snapshot(path, after, ME) is None
    assert after.ids == before.ids
    assert same(used(after, length), used(before, length))
    for token in (65, 66, 67):
        logits = [model[0].forward(torch.tensor([token]), cache) for cache in (before, after)]
        assert torch.equal(logits[0].view(torch.int32), logits[1].view(torch.int32))


def test_an_empty_cache_comes_back_empty(model: tuple[Transformer, ModelConfig], path: Path) -> None:
    save_snapshot(path, empty(model), ME)
    cache = filled(model, 5)
    assert load_snapshot(path, cache, ME) is None
    assert cache.ids == []


def test_no_memory_that_was_never_written_reaches_the_file(
    model: tuple[Transformer, ModelConfig], tmp_path: Path
) -> None:
    first, second = filled(model, 21), filled(model, 40)
    second.truncate(0)
    model[0].forward(torch.tensor(first.ids), second)  # over what is no longer used
    for n, cache in enumerate((first, second)):
        save_snapshot(tmp_path / f"{n}.kv", cache, ME)
    assert (tmp_path / "0.kv").read_bytes() == (tmp_path / "1.kv").read_bytes()


@pytest.mark.parametrize("limit", [1, 15, 16, 17, 99, 100, 101])
def test_a_smaller_limit_takes_what_fits(
    model: tuple[Transformer, ModelConfig], path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_snapshot, "PIECE_BYTES", 700)
    before, after = filled(model, 100), empty(model, limit)
    save_snapshot(path, before, ME)
    assert load_snapshot(path, after, ME) is None
    length = min(limit, 100)
    assert after.ids == before.ids[:length]
    assert same(used(after, length), used(before, length))


def test_it_replaces_what_the_cache_held(model: tuple[Transformer, ModelConfig], path: Path) -> None:
    save_snapshot(path, filled(model, 20), ME)
    cache = filled(model, 30)
    assert load_snapshot(path, cache, ME) is None
    assert cache.ids == filled(model, 20).ids
    assert load_snapshot(path.with_name("other.kv"), cache, ME) is Unusable.ABSENT
    assert cache.ids == []


def refusal(path: Path, cache: KVCache, identity: str = ME) -> Unusable | None:
    """Why not; whatever it was, the cache is empty and works."""
    why = load_snapshot(path, cache, identity)
    assert why is None or cache.ids == []
    return why


def test_another_model_or_shape_is_refused(model: tuple[Transformer, ModelConfig], path: Path) -> None:
    transformer, config = model
    save_snapshot(path, filled(model, 20), ME)
    assert refusal(path, empty(model), "another model") is Unusable.IDENTITY
    assert refusal(path, empty(model, dtype="f32")) is Unusable.IDENTITY
    others = (replace(config, n_layers=1), replace(config, n_kv_heads=4), replace(config, head_dim=32))
    for other in others:
        assert refusal(path, empty((transformer, other))) is Unusable.IDENTITY


def test_another_version_is_refused(model: tuple[Transformer, ModelConfig], path: Path) -> None:
    save_snapshot(path, filled(model, 20), ME)
    data = bytearray(path.read_bytes())
    data[len(MAGIC)] = FORMAT_VERSION + 1
    path.write_bytes(data)
    assert refusal(path, empty(model)) is Unusable.VERSION


def test_flipped_bits_and_cuts_are_refused(model: tuple[Transformer, ModelConfig], path: Path) -> None:
    before, dice = filled(model, 33), random.Random(0)
    save_snapshot(path, before, ME)
    whole, cache = path.read_bytes(), empty(model)
    places = [*range(0, 8 * 250, 7), *(dice.randrange(8 * len(whole)) for _ in range(300))]
    for bit in places:  # closely in the head, then anywhere
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        assert refusal(path, cache) in (Unusable.DAMAGED, Unusable.VERSION), bit
    for cut in [*range(20), *(dice.randrange(len(whole)) for _ in range(50)), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        assert refusal(path, cache) is Unusable.DAMAGED, cut
    path.write_bytes(whole + b"\0")
    assert refusal(path, cache) is Unusable.DAMAGED
    logits = [model[0].forward(torch.tensor([70, 71]), fresh) for fresh in (cache, own_cache(model[1], LIMIT))]
    assert torch.equal(*logits)
    cache.truncate(0)
    path.write_bytes(whole)
    assert load_snapshot(path, cache, ME) is None
    assert same(used(cache, 33), used(before, 33))


def test_parts_of_another_file_or_place_are_refused(model: tuple[Transformer, ModelConfig], path: Path) -> None:
    """Every checksum is right, but of something else."""
    save_snapshot(path, filled(model, 16), ME)
    first = path.read_bytes()
    save_snapshot(path, filled(model, 16), "another model")
    second = path.read_bytes()
    part = 16 * model[1].head_dim * 2 + kv_file.DIGEST_BYTES
    path.write_bytes(first[:-part] + second[-part:])
    assert refusal(path, empty(model)) is Unusable.DAMAGED
    path.write_bytes(first[: -2 * part] + first[-part:] + first[-2 * part : -part])
    assert refusal(path, empty(model)) is Unusable.DAMAGED


def test_what_is_no_file_is_absent(model: tuple[Transformer, ModelConfig], path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to(path.with_name("x"))
    assert refusal(path, empty(model)) is Unusable.ABSENT
    path.unlink()
    os.mkfifo(path)
    assert refusal(path, empty(model)) is Unusable.DAMAGED
    path.unlink()
    path.mkdir()
    assert refusal(path, empty(model)) is Unusable.DAMAGED


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EIO, CorruptError)])
def test_a_failing_disk_leaves_the_old_file_and_no_other(
    model: tuple[Transformer, ModelConfig], path: Path, number: int, kind: type[Exception]
) -> None:
    calls: list[str] = []
    durable.on_call = lambda name, nbytes: calls.append(name) or nbytes  # type: ignore[func-returns-value]
    save_snapshot(path, filled(model, 5), ME)
    count = len(calls)
    assert {"open", "write", "fsync", "rename"} <= set(calls)
    old, new = filled(model, 5), filled(model, 40)
    for k in range(count - 1):  # the last is the folder's fsync, when the new file is there already
        calls.clear()

        def strike(name: str, nbytes: int, k: int = k) -> int:
            calls.append(name)
            if len(calls) == k + 1:
                raise OSError(number, os.strerror(number))
            return nbytes

        durable.on_call = strike
        with pytest.raises(kind):
            save_snapshot(path, new, ME)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        cache = empty(model)
        assert load_snapshot(path, cache, ME) is None
        assert cache.ids == old.ids


def test_only_the_owner_can_read_it(model: tuple[Transformer, ModelConfig], path: Path) -> None:
    save_snapshot(path, filled(model, 5), ME)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for n, name in enumerate(("a", "b", "c", "d")):
        file = snapshot_path(tmp_path, name)
        file.write_bytes(bytes(100))
        os.utime(file, (n, n))
    abandoned, at_work, foreign = tmp_path / ".a.kv.1.part", tmp_path / ".b.kv.2.part", tmp_path / "note.txt"
    for file in (abandoned, at_work, foreign):
        file.write_bytes(b"x")
    os.utime(abandoned, (time.time() - 7200,) * 2)
    prune_snapshots(tmp_path, 250)
    assert {file.name for file in tmp_path.iterdir()} == {"c.kv", "d.kv", at_work.name, foreign.name}
    remove_kv_file(tmp_path, "d")
    remove_kv_file(tmp_path, "d")
    prune_snapshots(tmp_path, 0)
    assert {file.name for file in tmp_path.iterdir()} == {at_work.name, foreign.name}
    prune_snapshots(tmp_path / "nowhere", 0)


def test_identity_is_of_all_that_decides_the_numbers(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MIXLOCAL_ISA", raising=False)
    other = quantized(tiny.write_checkpoint(tmp_path / "checkpoint", seed=1), tmp_path / "tiny").folder

    def identity(folder: Path = store.folder, **options: object) -> str:
        with Session.open(str(folder), **options) as session:  # type: ignore[arg-type]
            return snapshot_identity(session)

    usual = identity()
    assert identity(context=64, threads=1) == identity(experts_per_token=2) == usual
    changed = {identity(kv_dtype="f32"), identity(experts_per_token=1), identity(other)}
    monkeypatch.setenv("MIXLOCAL_ISA", "reference")
    changed.add(identity())
    assert len(changed - {usual}) >= 3  # 4 where there are compiled kernels


def test_loaded_chat_goes_on_as_if_it_had_never_ended(store: ModelStore, path: Path) -> None:
    prompt = [256, *b"Once upon a time there was a king who"]
    with Session.open(str(store.folder)) as session:
        params = replace(session.defaults, temperature=0.0, max_tokens=8)
        cache, again = session.new_cache(), session.new_cache()
        first = list(session.stream_ids(prompt, params, cache=cache))
        save_snapshot(path, cache, snapshot_identity(session))
        assert load_snapshot(path, again, snapshot_identity(session)) is None
        longer = [*again.ids, *b" said"]
        answers = [list(session.stream_ids(longer, params, cache=c)) for c in (again, session.new_cache())]
    assert first[-1].finish is not None
    kept = [next(c.prefilled.kept for c in chunks if c.prefilled) for chunks in answers]
    assert kept == [len(longer) - len(b" said"), 0]
    texts = [[c.choice.id for c in chunks if c.choice] for chunks in answers]
    assert texts[0] == texts[1]


def test_panels_are_what_this_file_counts_on() -> None:
    assert PANEL == 16
