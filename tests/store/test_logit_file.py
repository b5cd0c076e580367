"""Reference logits on disk: what is whole is read to the bit, and what is torn or changed is known as such."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from mixlocal.errors import CorruptError, DiskFullError, NotFoundError, RefusedError
from mixlocal.store import durable
from mixlocal.store.logit_file import LogitHead, LogitReader, LogitWriter, create

HEAD = LogitHead(
    model="tiny:bf16", manifest_sha256="a", text_sha256="b", tokens_sha256="c", context=8, experts_per_token=2,
    arithmetic="native", kv_dtype="f16", mixlocal="0", scored=3, vocab_size=5,
)  # fmt: skip
CHUNKS = 4


def logits(chunk: int) -> torch.Tensor:
    return torch.randn(HEAD.scored, HEAD.vocab_size, generator=torch.Generator().manual_seed(chunk))


def append(writer: LogitWriter, chunk: int) -> None:
    writer.write(logits(chunk)[:2])
    writer.write(logits(chunk)[2:])
    writer.end_chunk()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A whole file."""
    path = tmp_path / "reference.logits"
    create(path, HEAD)
    with LogitWriter(path, HEAD, 0) as writer:
        for chunk in range(CHUNKS):
            append(writer, chunk)
    return path


def good(path: Path) -> int:
    with LogitReader(path) as reader:
        return reader.good_chunks(CHUNKS)


def test_chunks_come_back_to_the_bit(path: Path) -> None:
    with LogitReader(path) as reader:
        assert (reader.head, reader.good_chunks(CHUNKS), reader.good_chunks(2)) == (HEAD, CHUNKS, 2)
        for chunk in (1, 0, 3):
            assert torch.equal(reader.read(chunk, 0, 3), logits(chunk))
        pieces = [reader.read(2, first, 1) for first in range(3)]
        assert torch.equal(torch.cat(pieces), logits(2))
    assert path.stat().st_size == HEAD.file_bytes(CHUNKS)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_cut_short_goes_on_behind_its_last_whole_chunk(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(HEAD.file_bytes(0), len(whole), 13):
        path.write_bytes(whole[:size])
        ready = good(path)
        assert ready == (size - HEAD.file_bytes(0)) // HEAD.record_bytes
        with LogitWriter(path, HEAD, ready) as writer:
            for chunk in range(ready, CHUNKS):
                append(writer, chunk)
        assert path.read_bytes() == whole


def test_any_changed_byte_is_seen(path: Path) -> None:
    whole = path.read_bytes()
    for place in range(HEAD.file_bytes(0), len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert good(path) == (place - HEAD.file_bytes(0)) // HEAD.record_bytes


def test_a_chunk_that_changes_behind_the_count_is_an_error(path: Path) -> None:
    with LogitReader(path) as reader:
        assert reader.good_chunks(CHUNKS) == CHUNKS
        with path.open("r+b") as file:
            file.seek(HEAD.file_bytes(1) + 7)
            file.write(b"\xff")
        reader.read(0, 0, 3)
        reader.read(1, 0, 2)
        with pytest.raises(CorruptError, match="chunk 1 was changed"):
            reader.read(1, 2, 1)
        os.truncate(path, HEAD.file_bytes(3) + 9)
        with pytest.raises(CorruptError, match="cut short"):
            reader.read(3, 0, 3)


def test_no_chunk_passes_for_another(path: Path) -> None:
    whole, start, size = path.read_bytes(), HEAD.file_bytes(0), HEAD.record_bytes
    swapped = whole[: start + size] + whole[start + 2 * size : start + 3 * size] + whole[start + 2 * size :]
    path.write_bytes(swapped)
    assert good(path) == 1
    other = msgspec.structs.replace(HEAD, text_sha256="x")
    create(path, other)
    path.write_bytes(path.read_bytes() + whole[start:])
    assert good(path) == 0, "of another text"


def test_other_files_are_refused_by_name(path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        LogitReader(tmp_path / "nowhere")
    whole = path.read_bytes()
    for data, error, words in (
        (b"my notes, not logits " * 4, RefusedError, "not a file of reference logits"),
        (b"", RefusedError, "not a file of reference logits"),
        (whole[:8] + b"\x09" + whole[9:], RefusedError, "format version 9"),
        (whole[:40] + b"?" + whole[41:], CorruptError, "head is damaged"),
        (whole[:50], CorruptError, "head is damaged"),
    ):
        path.write_bytes(data)
        with pytest.raises(error, match=words):
            LogitReader(path)


def test_a_full_disk_leaves_what_was_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def full(name: str, nbytes: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 7:  # in the second chunk
            raise OSError(28, "No space left on device")
        return nbytes

    create(path, HEAD)
    monkeypatch.setattr(durable, "on_call", full)
    with LogitWriter(path, HEAD, 0) as writer:
        append(writer, 0)
        with pytest.raises(DiskFullError):
            append(writer, 1)
    assert good(path) == 1


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_logit_file import HEAD, append
from pathlib import Path
from mixlocal.store import durable
from mixlocal.store.logit_file import LogitWriter, create
path, calls = Path(sys.argv[1]), 0
create(path, HEAD)
def strike(name, nbytes):
    global calls
    calls += 1
    if calls == 12:  # open, truncate, 4 a chunk: in chunk 2, behind its first rows
        os.kill(os.getpid(), signal.SIGKILL)
    return nbytes
durable.on_call = strike
with LogitWriter(path, HEAD, 0) as writer:
    for chunk in range(4):
        append(writer, chunk)
"""


def test_a_kill_costs_no_whole_chunk(path: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.logits"
    command = [sys.executable, "-c", CHILD, str(torn), str(Path(__file__).parent)]
    killed = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert torn.stat().st_size > HEAD.file_bytes(2), "torn in chunk 2"
    ready = good(torn)
    assert ready == 2
    with LogitWriter(torn, HEAD, ready) as writer:
        for chunk in range(ready, CHUNKS):
            append(writer, chunk)
    assert torn.read_bytes() == path.read_bytes()
