"""Records come from disk the same whether past the page cache or through it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import stores
import tiny
import torch

from mixlocal.errors import PermissionDeniedError
from mixlocal.store import disk_speed, expert_file
from mixlocal.store.disk_speed import record_seconds
from mixlocal.store.expert_file import EXPERTS_FILE, ExpertFile
from mixlocal.store.memory import page_memory
from mixlocal.store.model_store import ModelStore

needs_direct = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct reads")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    root = tmp_path_factory.mktemp("expert_file")
    return stores.quantized(tiny.write_checkpoint(root / "checkpoint"), root / "store")


def records(file: ExpertFile) -> list[bytes]:
    """All of them, read backwards into one slot."""
    manifest, found = file.manifest, []
    slot = page_memory(manifest.stride)
    for index in reversed(range(len(manifest.records))):
        file.read(index // manifest.n_experts, index % manifest.n_experts, slot)
        found.append(bytes(slot.numpy()))
    file.close()
    return found[::-1]


def recording(monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], None] = lambda flags: None) -> list[int]:
    """The flags of every open of the file; `answer` may raise."""
    opened, real = [], os.open

    def watched(path: Path, flags: int) -> int:
        opened.append(flags)
        answer(flags)
        return real(path, flags)

    monkeypatch.setattr(expert_file.os, "open", watched)
    return opened


def refusing(number: int) -> Callable[[int], None]:
    def answer(flags: int) -> None:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))

    return answer


def test_direct_and_buffered_reads_give_the_same_bytes(store: ModelStore) -> None:
    expected = (store.folder / EXPERTS_FILE).read_bytes()
    for direct in (True, False):
        assert b"".join(records(store.experts(direct=direct))) == expected


@needs_direct
def test_only_direct_reads_ask_for_them(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = recording(monkeypatch)
    buffered = store.experts()
    assert (buffered.direct, opened[0] & os.O_DIRECT) == (False, 0)
    direct = store.experts(direct=True)
    assert opened[1] & os.O_DIRECT
    assert direct.direct == (len(opened) == 2)  # a third open: this file system has none
    buffered.close()
    direct.close()


@needs_direct
def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = recording(monkeypatch, refusing(errno.EINVAL))
    file = store.experts(direct=True)
    assert not file.direct
    assert [bool(flags & os.O_DIRECT) for flags in opened] == [True, False]
    assert b"".join(records(file)) == (store.folder / EXPERTS_FILE).read_bytes()


@needs_direct
def test_another_refusal_is_no_reason_to_read_otherwise(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = recording(monkeypatch, refusing(errno.EACCES))
    with pytest.raises(PermissionDeniedError, match=EXPERTS_FILE):
        store.experts(direct=True)
    assert len(opened) == 1


def test_memory_starts_on_a_page_and_is_as_long_as_asked() -> None:
    for nbytes in (1, 4096, 5 << 20):
        memory = page_memory(nbytes)
        assert (len(memory), memory.dtype) == (nbytes, torch.uint8)
        assert memory.data_ptr() % 4096 == 0
        memory.fill_(7)
        assert int(memory[-1]) == 7


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_takes_some_time(store: ModelStore, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "SECONDS", 0.0)
    path, size = store.folder / EXPERTS_FILE, store.manifest.experts_bytes
    for nbytes in (store.manifest.stride, size // 4096 * 4096):
        assert (record_seconds(path, nbytes, direct=direct) or 0) > 0
        assert (record_seconds(path, nbytes, direct=direct, pause=1e-4) or 0) > 0
    assert record_seconds(path, size + 4096, direct=direct) is None
