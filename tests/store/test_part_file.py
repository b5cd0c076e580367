"""What of an unfinished download is trusted by the next run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from mixlocal.errors import CorruptError, PermissionDeniedError
from mixlocal.store import part_file
from mixlocal.store.digest import Digest
from mixlocal.store.listing import RepoFile
from mixlocal.store.part_file import PartFile

DATA = bytes(range(256)) * 2000
FILE = RepoFile("m.safetensors", len(DATA), Digest(hashlib.sha256(DATA).hexdigest()))
COMMIT = "a" * 40


def begun(folder: Path, nbytes: int, sync_at: int | None = None) -> PartFile:
    part = PartFile(folder, FILE, COMMIT)
    for end in sorted({sync_at or nbytes, nbytes}):
        part.append(DATA[part.landed : end])
        if end == sync_at:
            part.sync()
    return part


def reopened(folder: Path, commit: str = COMMIT, file: RepoFile = FILE) -> int:
    part = PartFile(folder, file, commit)
    part.close()
    return part.landed


def test_a_killed_run_loses_nothing_that_was_written(tmp_path: Path) -> None:
    begun(tmp_path, 100_000)  # neither synced nor closed
    assert reopened(tmp_path) == 100_000
    part = PartFile(tmp_path, FILE, COMMIT)
    part.append(DATA[part.landed :])
    assert part.rehash().value == FILE.digest.value
    part.keep()
    assert (tmp_path / "m.safetensors").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_after_a_power_loss_only_what_was_synced_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, 100_000, sync_at=60_000).close()
    monkeypatch.setattr(part_file, "BOOT_ID", tmp_path / "boot")
    (tmp_path / "boot").write_text("another run of the system")
    assert reopened(tmp_path) == 60_000
    assert (tmp_path / "m.safetensors.part").read_bytes() == DATA[:60_000]


def test_where_no_boot_id_is_known_only_what_was_synced_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_file, "BOOT_ID", tmp_path / "absent")
    begun(tmp_path, 100_000, sync_at=60_000).close()
    assert reopened(tmp_path) == 60_000


@pytest.mark.parametrize("what", ["commit", "digest", "size", "no note", "torn note", "other note"])
def test_bytes_of_anything_else_are_not_gone_on_from(what: str, tmp_path: Path) -> None:
    begun(tmp_path, 100_000).close()
    note, file, commit = tmp_path / "m.safetensors.part.json", FILE, COMMIT
    if what == "commit":
        commit = "b" * 40
    elif what == "digest":
        file = RepoFile(FILE.path, FILE.nbytes, Digest("c" * 64))
    elif what == "size":
        file = RepoFile(FILE.path, FILE.nbytes + 1, FILE.digest)
    elif what == "no note":
        note.unlink()
    elif what == "torn note":
        note.write_bytes(note.read_bytes()[:50])
    else:
        note.write_text(json.dumps({"synced": 10**9}))
    assert reopened(tmp_path, commit, file) == 0


def test_more_than_the_file_has_is_cut(tmp_path: Path) -> None:
    part = begun(tmp_path, len(DATA))
    part.close()
    with (tmp_path / "m.safetensors.part").open("ab") as file:
        file.write(b"more")
    assert reopened(tmp_path) == len(DATA)
    assert (tmp_path / "m.safetensors.part").stat().st_size == len(DATA)


@pytest.mark.parametrize("name", ["m.safetensors.part", "m.safetensors.part.json"])
def test_a_symbolic_link_is_not_written_through(name: str, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / name).symlink_to(victim)
    if name.endswith(".part"):
        with pytest.raises(PermissionDeniedError):
            PartFile(folder, FILE, COMMIT)
    else:
        begun(folder, 1000).close()
    assert victim.read_text() == "mine"


def test_wrong_bytes_are_put_aside_under_their_hash(tmp_path: Path) -> None:
    part = begun(tmp_path, 1000)
    bad = part.quarantine("f" * 64)
    assert bad.read_bytes() == DATA[:1000]
    assert (part.landed, part.etag) == (0, None)
    part.append(DATA)
    assert part.rehash().value == FILE.digest.value
    part.close()


def test_who_reads_while_bytes_are_put_aside_reads_no_other_file(tmp_path: Path) -> None:
    """The number of the open file stays its own until the end."""
    part = begun(tmp_path, 1000)
    number = part._file.fileno()
    part.quarantine("f" * 64)
    other = os.open(tmp_path, os.O_RDONLY)
    assert other != number
    assert os.pread(number, 1000, 0) == DATA[:1000]
    part.close()
    os.close(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_reading_beyond_what_has_landed_is_an_error(tmp_path: Path) -> None:
    part = begun(tmp_path, 1000)
    with pytest.raises(CorruptError, match="ends at byte"):
        part.read_into(990, memoryview(bytearray(20)))
    part.close()


def test_a_sync_on_the_way_that_fails_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_file, "SYNC_BYTES", 1000)
    part = PartFile(tmp_path, FILE, COMMIT)

    def fail() -> None:
        raise CorruptError("fsync failed")

    monkeypatch.setattr(part._file, "sync", fail)
    part.append(DATA[:1000])
    with pytest.raises(CorruptError, match="fsync failed"):
        part.append(DATA[1000:2000])
    part.close()
