"""Experts read from disk when they are chosen: the same tokens at every budget, and what a failing disk does."""

from __future__ import annotations

import errno
import gc
import linecache
import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from stores import load_model
from tiered_model import EXPERTS, IDS, LAYERS, PROFILE, logits, make_store

from mixlocal.app.model_run import store_config
from mixlocal.errors import CorruptError
from mixlocal.experts.profile import RoutingProfile
from mixlocal.experts.tiered import TieredExperts
from mixlocal.kernels import select
from mixlocal.model.kv_cache import own_cache
from mixlocal.model.load import load_trunk
from mixlocal.model.transformer import Transformer
from mixlocal.store import expert_file
from mixlocal.store.expert_file import ExpertFile
from mixlocal.store.model_store import ModelStore


@pytest.fixture(scope="module", params=["q4", "bf16"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    return make_store(tmp_path_factory.mktemp("tiered"), request.param)


def opened(
    store: ModelStore,
    slots: int,
    *,
    direct: bool = False,
    lookahead: bool = True,
    profile: RoutingProfile | None = None,
) -> tuple[Transformer, TieredExperts]:
    kernels, config = select("cpu"), store_config(store)
    experts = TieredExperts(store.experts(direct=direct), kernels, slots, profile, lookahead=lookahead)
    return Transformer(config, load_trunk(store, config), experts, kernels), experts


@pytest.fixture
def tiered(store: ModelStore) -> Iterator[tuple[Transformer, TieredExperts]]:
    model, experts = opened(store, EXPERTS + 2)
    yield model, experts
    experts.close()


@pytest.mark.parametrize("slots", [EXPERTS, EXPERTS + 1, EXPERTS + 3, 20, LAYERS * EXPERTS])
@pytest.mark.parametrize("lookahead", [True, False])
@pytest.mark.parametrize("profile", [None, PROFILE], ids=["cold", "profile"])
def test_the_budget_does_not_change_a_bit(
    store: ModelStore, slots: int, lookahead: bool, profile: RoutingProfile | None
) -> None:
    expected = logits(load_model(store, store_config(store)))
    model, experts = opened(store, slots, direct=lookahead, lookahead=lookahead, profile=profile)
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    counts = experts.counts
    assert counts.bytes_read == counts.reads * store.manifest.stride
    assert counts.looked_up == counts.ram_hits + counts.disk_hits
    if slots == LAYERS * EXPERTS:
        assert counts.reads <= slots
    else:
        assert counts.ram_hits > 0
    assert (counts.chosen > 0) == (lookahead and slots > EXPERTS)
    experts.close()


def test_an_expert_is_read_once_for_all_tokens_of_a_pass(store: ModelStore) -> None:
    model, experts = opened(store, EXPERTS, lookahead=False)
    model.forward(IDS, own_cache(model.config, len(IDS)))
    assert experts.counts.reads == experts.counts.disk_hits == experts.counts.looked_up <= LAYERS * EXPERTS
    experts.close()


def test_a_right_guess_is_a_read_that_began_before(store: ModelStore) -> None:
    model, experts = opened(store, 2 * EXPERTS)
    logits(model)
    counts = experts.counts
    assert 0 < counts.guessed <= counts.chosen
    assert 0.3 < (counts.prefetch_recall or 0) <= 1
    assert 0 < counts.prefetches_used <= counts.prefetches
    experts.close()


def test_a_profile_s_hottest_experts_are_there_before_they_are_asked_for(store: ModelStore) -> None:
    slots = EXPERTS + 4 + 6  # a layer, its reads ahead, and six more
    model, experts = opened(store, slots, profile=PROFILE)
    host = experts.host
    while waiting := [read for read in host._preloads.values() if not read.done]:
        host._reader.wait(waiting)
    host.settle(())
    assert sorted(key for key in range(EXPERTS * LAYERS) if host.residency.find(key) >= 0) == [2, 7, 10, 15, 18, 26]
    assert torch.equal(logits(model), logits(load_model(store, store_config(store))))
    experts.close()


def test_a_failed_read_is_one_named_error_and_leaves_nothing_wrong(
    tiered: tuple[Transformer, TieredExperts], store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiered
    expected = logits(load_model(store, store_config(store)))
    fill, calls = ExpertFile.fill, iter(range(10000))

    def failing(self: ExpertFile, layer: int, expert: int, slot: torch.Tensor) -> None:
        if next(calls) % 5 == 3:
            slot.fill_(77)
            raise CorruptError("the disk failed")
        fill(self, layer, expert, slot)

    monkeypatch.setattr(ExpertFile, "fill", failing)
    failures = 0
    for _ in range(6):
        try:
            logits(model)
        except CorruptError as error:
            failures += "the disk failed" in str(error)
    assert failures > 1
    monkeypatch.setattr(ExpertFile, "fill", fill)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("how_often", [1, 2])
def test_a_disk_error_is_tried_once_more(
    tiered: tuple[Transformer, TieredExperts], how_often: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiered
    preadv, failed = os.preadv, threading.local()

    def flaky(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        failed.count = getattr(failed, "count", 0) % (how_often + 1) + 1
        if failed.count <= how_often:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(expert_file.os, "preadv", flaky)
    if how_often == 1:
        assert torch.isfinite(logits(model)).all()
    else:
        with pytest.raises(CorruptError, match="input/output error"):
            logits(model)


def test_interrupts_at_any_moment_leave_nothing_wrong(store: ModelStore) -> None:
    """An exception between any two lines of the bookkeeping, as Ctrl-C raises one; the next pass has the right bits."""
    expected = logits(load_model(store, store_config(store)))
    model, experts = opened(store, EXPERTS + 3)
    draw, interrupted, countdown = random.Random(1), 0, 0

    def tick(frame: FrameType, event: str, argument: object) -> object:
        nonlocal countdown
        here = frame.f_code.co_filename
        leaves_a_lock = linecache.getline(here, frame.f_lineno).lstrip().startswith("with ")  # no signal is heard there
        if "/mixlocal/experts/" in here and not leaves_a_lock:
            countdown -= 1
            if countdown == 0:
                raise KeyboardInterrupt
        return tick

    for _ in range(60):
        countdown = draw.randint(1, 2500)
        sys.settrace(tick)
        try:
            logits(model)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert torch.equal(logits(model), expected)
    assert interrupted > 20
    experts.close()


@pytest.mark.parametrize("direct", [True, False])
def test_a_store_damaged_while_it_runs_gives_no_token(tmp_path: Path, direct: bool) -> None:
    store = make_store(tmp_path)
    model, experts = opened(store, EXPERTS, direct=direct)
    path = store.folder / "experts.bin"
    with path.open("r+b") as file:
        for record in range(LAYERS * EXPERTS):
            file.seek(record * store.manifest.stride + 100)
            file.write(b"\xff\x00\xff")
    with pytest.raises(CorruptError, match="is damaged"):
        logits(model)
    os.truncate(path, 5000)
    with pytest.raises(CorruptError, match=r"ends at byte|is damaged"):
        logits(model)
    experts.close()


def test_a_store_removed_or_replaced_while_it_runs_is_not_noticed(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    expected = logits(load_model(store, store_config(store)))
    model, experts = opened(store, EXPERTS)
    other = tmp_path / "other"
    other.write_bytes(bytes(store.manifest.experts_bytes))
    os.replace(other, store.folder / "experts.bin")
    assert torch.equal(logits(model), expected)
    shutil.rmtree(store.folder)
    assert torch.equal(logits(model), expected)
    experts.close()


@pytest.mark.parametrize("closes", [True, False])
def test_nothing_is_left_of_a_model(store: ModelStore, closes: bool) -> None:
    """Closed or forgotten, its threads end, and its file is closed."""
    before = set(threading.enumerate())
    model, experts = opened(store, EXPERTS)
    logits(model)
    descriptor, readers = experts.host._reader._file._descriptor, set(threading.enumerate()) - before
    assert readers
    if closes:
        experts.close()
    del model, experts
    gc.collect()
    for thread in readers:
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_slots_are_pages(tiered: tuple[Transformer, TieredExperts]) -> None:
    _, experts = tiered
    assert all(slot.data_ptr() % 4096 == 0 for slot in experts.host.slots)
