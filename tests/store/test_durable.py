"""What is written is entirely old or entirely new, whatever the disk and the kernel do; one writer at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixlocal.errors import (
    CorruptError,
    DiskFullError,
    LockedError,
    MixlocalError,
    NotFoundError,
    PermissionDeniedError,
    UsageError,
)
from mixlocal.store import durable
from mixlocal.store.durable import BuildFile, named_errors, publish_folder, remove_folder, write_file
from mixlocal.store.lock import locked
from mixlocal.store.paths import Home, check_name

OLD, NEW = b"old" * 100, b"new and longer" * 1000
CLASSES = {
    errno.ENOSPC: DiskFullError, errno.EDQUOT: DiskFullError, errno.EFBIG: DiskFullError,
    errno.EACCES: PermissionDeniedError, errno.EPERM: PermissionDeniedError, errno.EROFS: PermissionDeniedError,
    errno.ELOOP: PermissionDeniedError,
    errno.EIO: CorruptError, errno.ESTALE: CorruptError,
    errno.ENOENT: NotFoundError, errno.ENOTDIR: NotFoundError, errno.ENAMETOOLONG: NotFoundError,
}  # fmt: skip
CALLS = ("open", "write", "fsync", "rename", "fsync")  # of one write_file


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    return path


@pytest.fixture(autouse=True)
def _undisturbed_afterwards() -> Iterator[None]:
    yield
    durable.on_call = None


def at_call(k: int, strike: Callable[[], None]) -> list[str]:
    """Strike at the k-th durable call, counted from 1; returns the names of all calls as they come."""
    names: list[str] = []

    def on_call(name: str, nbytes: int) -> int:
        names.append(name)
        if len(names) == k:
            strike()
        return nbytes

    durable.on_call = on_call
    return names


def failing(number: int) -> Callable[[], None]:
    def strike() -> None:
        raise OSError(number, os.strerror(number))

    return strike


def in_child(work: Callable[[], object]) -> int:
    """Exit code of a fork that does `work`, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_calls_of_one_write_are_known(target: Path) -> None:
    calls = at_call(0, lambda: None)
    write_file(target, NEW)
    assert tuple(calls) == CALLS
    assert target.read_bytes() == NEW


@pytest.mark.parametrize("k", range(1, len(CALLS) + 1))
@pytest.mark.parametrize("number", CLASSES, ids=errno.errorcode.get)
def test_a_failing_call_leaves_old_or_new_and_no_litter(number: int, k: int, target: Path) -> None:
    at_call(k, failing(number))
    with pytest.raises(CLASSES[number]) as caught:
        write_file(target, NEW)
    assert "file" in caught.value.message
    assert target.read_bytes() == (NEW if k == len(CALLS) else OLD)
    assert names_in(target.parent) == ["file"]


@pytest.mark.parametrize("k", range(1, len(CALLS) + 1))
def test_a_kill_leaves_old_or_new_and_the_next_write_succeeds(k: int, target: Path) -> None:
    def killed() -> None:
        at_call(k, lambda: os.kill(os.getpid(), signal.SIGKILL))
        write_file(target, NEW)

    assert in_child(killed) == -signal.SIGKILL
    assert target.read_bytes() == (NEW if k == len(CALLS) else OLD)
    write_file(target, NEW)
    assert target.read_bytes() == NEW


def test_an_interrupted_write_leaves_no_litter(target: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    at_call(2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(target, NEW)
    assert names_in(target.parent) == ["file"]


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_short_writes_are_continued(piece: int, target: Path) -> None:
    durable.on_call = lambda name, nbytes: min(nbytes, piece)
    write_file(target, NEW[:5000])
    assert target.read_bytes() == NEW[:5000]


def test_a_write_that_makes_no_progress_ends(target: Path) -> None:
    durable.on_call = lambda name, nbytes: 0
    with pytest.raises(CorruptError):
        write_file(target, NEW)
    assert target.read_bytes() == OLD


def test_a_short_write_on_a_full_disk_is_a_full_disk(target: Path) -> None:
    wrote = 0

    def on_call(name: str, nbytes: int) -> int:
        nonlocal wrote
        wrote += name == "write"
        if wrote == 2:
            failing(errno.ENOSPC)()
        return nbytes // 2

    durable.on_call = on_call
    with pytest.raises(DiskFullError):
        write_file(target, NEW)
    assert target.read_bytes() == OLD
    assert names_in(target.parent) == ["file"]


def test_a_real_file_size_limit_is_a_full_disk(target: Path) -> None:
    script = (
        "import resource, signal, sys; from pathlib import Path; from mixlocal.store.durable import write_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "from mixlocal.errors import DiskFullError\n"
        "try: write_file(Path(sys.argv[1]), b'x' * 9000)\n"
        "except DiskFullError: print('full')"
    )
    run = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert run.stdout == "full\n"
    assert target.read_bytes() == OLD
    assert names_in(target.parent) == ["file"]


@pytest.mark.parametrize("number", CLASSES, ids=errno.errorcode.get)
def test_an_os_error_becomes_the_error_of_its_kind(number: int, tmp_path: Path) -> None:
    with pytest.raises(MixlocalError) as caught, named_errors(tmp_path / "name"):
        failing(number)()
    assert type(caught.value) is CLASSES[number]
    assert str(tmp_path / "name") in caught.value.message
    assert isinstance(caught.value.__cause__, OSError)


def test_names_that_cannot_be_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    for path in (tmp_path / ("x" * 300), tmp_path / "absent" / "x", tmp_path / "file" / "x"):
        with pytest.raises(NotFoundError):
            write_file(path, NEW)
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize("exclusive", [False, True])
def test_nothing_is_written_through_a_symbolic_link(exclusive: bool, target: Path) -> None:
    link = target.with_name("link")
    link.symlink_to(target)
    if exclusive:
        BuildFile(link, exclusive=True).close()
    else:
        with pytest.raises(PermissionDeniedError):
            BuildFile(link)
    assert target.read_bytes() == OLD


def test_replacing_a_symbolic_link_leaves_what_it_points_to(target: Path) -> None:
    link = target.with_name("link")
    temp = target.with_name(f".link.{os.getpid()}.part")
    for planted in (link, temp):
        planted.symlink_to(target)
    write_file(link, NEW)
    assert target.read_bytes() == OLD
    assert not link.is_symlink()
    assert link.read_bytes() == NEW


def folder(path: Path) -> Path:
    (path / "sub").mkdir(parents=True)
    (path / "sub" / "file").write_bytes(OLD)
    return path


def test_a_removed_folder_is_gone_and_so_are_its_traces(tmp_path: Path) -> None:
    remove_folder(folder(tmp_path / "f"))
    assert names_in(tmp_path) == []


def test_a_kill_while_removing_hides_the_folder_and_stops_no_later_removal(tmp_path: Path) -> None:
    def killed() -> None:
        at_call(2, lambda: os.kill(os.getpid(), signal.SIGKILL))
        remove_folder(folder(tmp_path / "f"))

    assert in_child(killed) == -signal.SIGKILL
    (grave,) = tmp_path.iterdir()
    assert grave.name.startswith(".f.")
    grave.rename(tmp_path / f".f.{os.getpid()}.removed")  # in a container the next process often has the same number
    remove_folder(folder(tmp_path / "f"))
    assert names_in(tmp_path) == []


def test_a_symbolic_link_to_a_folder_is_not_removed(tmp_path: Path) -> None:
    folder(tmp_path / "precious")
    (tmp_path / "f").symlink_to(tmp_path / "precious")
    with pytest.raises(PermissionDeniedError, match="symbolic link"):
        remove_folder(tmp_path / "f")
    assert (tmp_path / "precious" / "sub" / "file").read_bytes() == OLD
    assert names_in(tmp_path) == ["f", "precious"]


def test_a_removal_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        remove_folder(tmp_path / "absent")
    at_call(1, failing(errno.EROFS))
    with pytest.raises(PermissionDeniedError):
        remove_folder(folder(tmp_path / "f"))
    assert (tmp_path / "f" / "sub" / "file").exists()


@pytest.mark.parametrize("k", range(1, 4))
def test_a_folder_is_published_whole_or_not_at_all(k: int, tmp_path: Path) -> None:
    def killed() -> None:
        at_call(k, lambda: os.kill(os.getpid(), signal.SIGKILL))
        publish_folder(tmp_path / "building", tmp_path / "final")

    folder(tmp_path / "building")
    assert in_child(killed) == -signal.SIGKILL
    (there,) = tmp_path.iterdir()
    assert there.name == ("final" if k == 3 else "building")
    assert (there / "sub" / "file").read_bytes() == OLD


HOLD = "import sys, time; from pathlib import Path; from mixlocal.store.lock import locked\n" + (
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "store")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_writer_is_told_who_the_first_is(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    for _ in range(2):  # the first refusal must not have wiped the name
        start = time.monotonic()
        with pytest.raises(LockedError, match=f"process {holder.pid}$"), locked(tmp_path / "store", wait=0.1):
            pytest.fail("two writers")
        assert time.monotonic() - start < 5


def test_a_kill_frees_the_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    with locked(tmp_path / "store", wait=5):
        pass


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "store"):
        raise ZeroDivisionError
    with locked(tmp_path / "store", wait=0.1):
        pass


def test_the_lock_is_not_written_through_a_symbolic_link(target: Path) -> None:
    target.with_name(".store.lock").symlink_to(target)
    with pytest.raises(PermissionDeniedError), locked(target.with_name("store"), wait=0.1):
        pytest.fail("locked through a link")
    assert target.read_bytes() == OLD


PIECES = (
    "..", "/etc/passwd", "../x", "a/b", "a/../b", "", ".", "~", "C:\\x", "\\\\host\\x", "a\0b", "a\nb", "a ", "-rf",
    ".git", "a" * 201,
)  # fmt: skip
FRAMES = (
    "{}", "{}/", "./{}", "/{}", "../{}", "../../{}", "a/{}", "a\\{}", "{}\0", "{}\n", "{}\u202e", "\u202e{}",
    "{}/..", "%2e{}",
)  # fmt: skip
TRAVERSALS = sorted({frame.format(piece) for piece in PIECES for frame in FRAMES})


def test_a_name_that_could_leave_the_models_folder_is_refused(tmp_path: Path) -> None:
    assert len(TRAVERSALS) >= 200
    home = Home(tmp_path / "data", tmp_path / "cache")
    for name in TRAVERSALS:
        for refuse in (check_name, lambda name: home.store(name, "q4")):
            with pytest.raises(UsageError) as caught:
                refuse(name)
            assert caught.value.message.isprintable()
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["a", "Mixtral-8x7B-Instruct-v0.1", "x_1", "a..b", "9", "a" * 200])
def test_an_ordinary_name_is_kept(name: str, tmp_path: Path) -> None:
    assert Home(tmp_path, tmp_path).store(name, "q4") == tmp_path / "models" / name / "q4"
