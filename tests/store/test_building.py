"""A store under construction whose journal or bytes were damaged: what is still right is kept, the rest done again."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

from mixlocal.app.quantization import StoreJob
from mixlocal.app.quantize import QuantizeJob, quantize_checkpoint
from mixlocal.errors import PermissionDeniedError
from mixlocal.store.building import building_folder, journal_path, sweep
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.manifest import Manifest, Recipe, read_manifest
from mixlocal.store.model_store import TRUNK_FILE, ModelStore

STEPS = 32  # of progress before the interruption: the 17 tensors of the trunk, 4 of the 8 experts, and part of one


@dataclass(frozen=True)
class Work:
    job: QuantizeJob
    expected: Manifest

    @property
    def building(self) -> Path:
        return building_folder(self.job.store.out)

    @property
    def journal(self) -> Path:
        return journal_path(self.job.store.out)

    def finish(self) -> None:
        """Run to the end; the store must be the one an undisturbed run makes."""
        for _ in quantize_checkpoint(self.job):
            pass
        assert read_manifest(self.job.store.out) == self.expected
        for _ in ModelStore.open(self.job.store.out).verify():
            pass


def job(checkpoint: Path, out: Path) -> QuantizeJob:
    return QuantizeJob(checkpoint, StoreJob(out, "tiny", "q4", Recipe("nf4", 16, "int8")), "tiny")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Work:
    root = tmp_path_factory.mktemp("building")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", hidden_size=16, intermediate_size=16)
    for _ in quantize_checkpoint(job(checkpoint, root / "whole")):
        pass
    work = quantize_checkpoint(job(checkpoint, root / "q4"))
    for _ in range(STEPS):
        next(work)
    work.close()
    return Work(job(checkpoint, root / "q4"), read_manifest(root / "whole"))


@pytest.fixture
def work(interrupted: Work, tmp_path: Path) -> Work:
    """A copy to damage."""
    copy = Work(job(interrupted.job.checkpoint, tmp_path / "q4"), interrupted.expected)
    shutil.copytree(interrupted.building, copy.building)
    shutil.copy(interrupted.journal, copy.journal)
    return copy


def again(work: Work, interrupted: Work) -> None:
    """Back to what the interruption left."""
    for folder in (work.job.store.out, work.building):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(interrupted.building, work.building)
    shutil.copy(interrupted.journal, work.journal)


def test_an_undisturbed_resume_gives_the_same_store(work: Work) -> None:
    work.finish()
    assert not work.journal.exists()


@pytest.mark.parametrize("name", ["journal", EXPERTS_FILE, TRUNK_FILE])
def test_100_flipped_bits_leave_no_trace_in_the_store(name: str, work: Work, interrupted: Work) -> None:
    rng = random.Random(name)
    path = work.journal if name == "journal" else work.building / name
    for _ in range(100):
        again(work, interrupted)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        work.finish()


@pytest.mark.parametrize("name", ["journal", EXPERTS_FILE, TRUNK_FILE])
def test_a_file_cut_anywhere_leaves_no_trace_in_the_store(name: str, work: Work, interrupted: Work) -> None:
    path = work.journal if name == "journal" else work.building / name
    size = path.stat().st_size
    for length in (*range(0, size, size // 20), size - 1):
        again(work, interrupted)
        os.truncate(path, length)
        work.finish()


@pytest.mark.parametrize("name", [EXPERTS_FILE, TRUNK_FILE])
def test_a_file_that_is_gone_is_made_again(name: str, work: Work) -> None:
    (work.building / name).unlink()
    work.finish()


def test_a_journal_in_another_language_is_forgotten(work: Work) -> None:
    work.journal.write_bytes(b"\xff\n" + b"[" * 100_000 + b"\n")
    work.finish()


def test_a_building_folder_that_is_a_link_is_refused_and_nothing_goes_through(work: Work, tmp_path: Path) -> None:
    shutil.rmtree(work.building)
    (precious := tmp_path / "precious").mkdir()
    (precious / "file").write_text("mine")
    work.building.symlink_to(precious)
    with pytest.raises(PermissionDeniedError, match="symbolic link"):
        work.finish()
    assert [path.name for path in precious.iterdir()] == ["file"]


def test_a_sweep_removes_what_the_dead_left(work: Work) -> None:
    work.finish()
    work.journal.write_bytes(b"left")
    out = work.job.store.out
    shutil.copytree(out, out.with_name(".q4.4711.removed"))
    sweep(out)
    assert [path.name for path in out.parent.iterdir()] == ["q4"]
