"""OUT.batch and the output itself: what is published, what is refused."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path

import pytest

from mixlocal.errors import CorruptError, LockedError, NotFoundError, PermissionDeniedError, RefusedError
from mixlocal.store import batch_folder as module
from mixlocal.store import durable
from mixlocal.store.batch_folder import BatchFolder, BatchManifest, InputNote, batch_folder

MANIFEST = BatchManifest({"model": "tiny", "temperature": "0.5"}, 7, InputNote("in", "0" * 64, 3))


@pytest.fixture
def folder(tmp_path: Path) -> BatchFolder:
    found = BatchFolder(tmp_path / "out.jsonl")
    found.begin(MANIFEST)
    return found


def test_the_manifest_is_read_as_it_was_written(folder: BatchFolder) -> None:
    assert folder.read_manifest() == MANIFEST
    assert BatchFolder(folder.out.with_name("other")).read_manifest() is None


def test_every_changed_bit_of_the_manifest_is_seen(folder: BatchFolder) -> None:
    path = folder.path / "manifest.json"
    data = path.read_bytes()
    for at in range(len(data) - 1):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises((CorruptError, RefusedError)):
                folder.read_manifest()


def test_broken_manifests(folder: BatchFolder) -> None:
    path, rng = folder.path / "manifest.json", random.Random(2)
    data = path.read_bytes()
    for _ in range(500):
        path.write_bytes(
            data[: rng.randrange(len(data) - 1)] + bytes(rng.randrange(256) for _ in range(rng.randrange(9)))
        )
        with pytest.raises((CorruptError, RefusedError)):
            folder.read_manifest()
    path.write_bytes(data.replace(b'"format_version":1', b'"format_version":2'))
    with pytest.raises(RefusedError, match="format version 2; this mixlocal reads 1"):
        folder.read_manifest()


def test_to_begin_anew_drops_the_answers(folder: BatchFolder) -> None:
    journal = folder.open_journal()
    journal.append(bytes(32), True, b"{}")
    journal.close()
    folder.begin(MANIFEST)
    journal = folder.open_journal()
    assert list(journal.places()) == []
    journal.close()


@pytest.mark.parametrize("count", [0, 1, 3, 40_000])
def test_publish(folder: BatchFolder, count: int) -> None:
    lines = [b'{"row": %d, "x": "%s"}' % (n, b"x" * (n % 100)) for n in range(count)]
    assert folder.publish(lambda: lines)
    assert folder.out.read_bytes() == b"".join(line + b"\n" for line in lines)
    before = folder.out.stat()
    assert not folder.publish(lambda: lines)
    assert folder.out.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    "edit",
    [lambda data: data[:-1], lambda data: data + b"x\n", lambda data: b"", lambda data: data.replace(b"b", b"c")],
)
def test_an_edited_output_is_written_anew(folder: BatchFolder, edit) -> None:
    lines = [b"a", b"b"]
    folder.publish(lambda: lines)
    folder.out.write_bytes(edit(folder.out.read_bytes()))
    assert folder.publish(lambda: lines)
    assert folder.out.read_bytes() == b"a\nb\n"


def test_nothing_is_written_through_a_symbolic_link(folder: BatchFolder, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"a\n")
    folder.out.symlink_to(target)
    assert folder.publish(lambda: [b"a"])
    assert not folder.out.is_symlink()
    (tmp_path / "x.batch").symlink_to(tmp_path)
    with pytest.raises(PermissionDeniedError, match="symbolic link"), batch_folder(tmp_path / "x"):
        pass


def test_no_folder_to_write_to(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"), batch_folder(tmp_path / "none" / "out"):
        pass


def test_what_was_left_behind_goes(folder: BatchFolder, tmp_path: Path) -> None:
    orphan, other = tmp_path / ".out.jsonl.123.part", tmp_path / ".out.jsonl2.123.part"
    orphan.touch(), other.touch()
    with batch_folder(folder.out):
        assert not orphan.exists()
    assert other.exists()


def test_standard_input_is_kept_for_its_owner_and_only_meanwhile(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    with batch_folder(tmp_path / "out") as folder:
        kept = folder.keep_input(io.BytesIO(data))
        assert kept.read_bytes() == data
        assert kept.stat().st_mode & 0o777 == 0o600
        assert folder.keep_input(io.BytesIO(b"again")).read_bytes() == b"again"
    assert not folder.path.exists()


def test_a_second_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.2)
    holder = (
        "import sys, pathlib; from mixlocal.store.batch_folder import batch_folder\n"
        "with batch_folder(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(LockedError, match=f"in use by process {process.pid}"), batch_folder(tmp_path / "out"):
            pass
        process.communicate()
    with batch_folder(tmp_path / "out"):
        pass


def test_a_disk_that_fails_publishes_nothing(folder: BatchFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_call(name: str, nbytes: int) -> int:
        if name == "fsync":
            raise OSError(5, "input/output error")
        return nbytes

    monkeypatch.setattr(durable, "on_call", on_call)
    with pytest.raises(CorruptError):
        folder.publish(lambda: [b"a"])
    assert not folder.out.exists()
    assert not list(folder.out.parent.glob("*.part"))
