"""install.sh with a Python and a pip that only pretend: every outcome a user can meet, and no download."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOBODY = 65534
MARK = "# mixlocal: written by install.sh"

# Answers what install.sh asks of a Python; `-m venv` copies it, and each use of pip is a line in $FAKE_CALLS.
FAKE_PYTHON = r"""#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
[ "$1" = -P ] && shift
case "$1 $2" in
    "-c "*version_info*) echo "${FAKE_VERSION:-3.11}" ;;
    "-c "*get_path*) echo "$FAKE_INCLUDE" ;;
    "-c "*MISSING*) echo "$FAKE_MISSING" ;;
    "-m venv")
        [ -z "$FAKE_NO_VENV" ] || { echo "ensurepip is not available"; exit 1; }
        mkdir -p "$3/bin" && touch "$3/pyvenv.cfg" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        shift 2
        [ "$1" = --version ] && exit
        echo "pip $*" >>"$FAKE_CALLS"
        sleep "${FAKE_PIP_TAKES:-0}"
        case "$*" in *"${FAKE_PIP_FAILS_ON:-no failure}"*) echo "$FAKE_PIP_SAYS"; exit 1 ;; esac
        case "$*" in
            *-e*) printf '#!/bin/sh\necho mixlocal "$@"\nexit ${FAKE_MIXLOCAL_EXIT:-0}\n' >"$here/mixlocal"
                chmod +x "$here/mixlocal" ;;
            *) mkdir -p "$here/../lib/python3.11/site-packages/torch-${*##*torch==}.dist-info" ;;
        esac ;;
    "-m "*)
        shift
        echo "$*" >>"$FAKE_CALLS"
        [ "$1" != "$FAKE_MODULE_FAILS" ] ;;
esac
"""
OFFLINE = """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(...)': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)
ERROR: No matching distribution found for torch==2.13.0"""
UNKNOWN = "ERROR: No matching distribution found for torch==2.13.0"
ANY_PIP = "install"


@dataclass(frozen=True)
class Machine:
    """A checkout, a home and a fake Python below one folder."""

    folder: Path

    @property
    def checkout(self) -> Path:
        return self.folder / "a check'out"

    @property
    def venv(self) -> Path:
        return self.checkout / ".venv"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def command(self) -> Path:
        return self.home / ".local" / "bin" / "mixlocal"

    def set_up(self) -> Machine:
        native = self.checkout / "mixlocal" / "kernels" / "native"
        native.mkdir(parents=True)
        self.home.mkdir()
        (self.folder / "stubs").mkdir()
        (native / "CMakeLists.txt").write_text("project(x)\n")
        (self.checkout / "mixlocal" / "__init__.py").touch()
        (self.checkout / "pyproject.toml").write_text('[project]\nname = "mixlocal"\n')
        shutil.copy(ROOT / "install.sh", self.checkout)
        self.stub("python", FAKE_PYTHON)
        return self

    def stub(self, name: str, text: str) -> Path:
        """A program that is found before the real one."""
        path = self.folder / "stubs" / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def environment(self, **changes: str | None) -> dict[str, str]:
        values: dict[str, str | None] = {
            "HOME": str(self.home),
            "PATH": f"{self.folder / 'stubs'}{os.pathsep}{os.environ['PATH']}",
            "MIXLOCAL_PYTHON": str(self.folder / "stubs" / "python"),
            "FAKE_CALLS": str(self.folder / "calls"),
        } | changes
        return {name: value for name, value in values.items() if value is not None}

    def install(self, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.checkout / "install.sh", *arguments],
            env=self.environment(**changes), cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def snapshot(self) -> dict[str, object]:
        return {str(path): _content(path) for path in sorted(self.folder.rglob("*"))}


def _content(path: Path) -> object:
    status = path.lstat()
    return stat.filemode(status.st_mode), path.read_bytes() if path.is_file() else "", status.st_mtime_ns


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path).set_up()


def refuses(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """It stopped with `code` and one line for the user, which has these words."""
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("==> ")]
    assert done.returncode == code, done.stderr
    assert len(complaints) == 1, done.stderr
    assert complaints[0].startswith("install.sh: ")
    for word in words:
        assert word in complaints[0]


# ---- setting up


def test_sets_up_pytorch_first_then_mixlocal_then_the_command(machine: Machine) -> None:
    done = machine.install()
    assert done.returncode == 0, done.stderr
    assert machine.calls() == ["pip -v install torch==2.13.0", "pip -v install -e . torch==2.13.0"]
    assert done.stdout == ""
    answer = subprocess.check_output([machine.command, "prompt", "a b"], env=machine.environment(), text=True)
    assert answer == "mixlocal prompt a b\n"


def test_second_run_does_nothing(machine: Machine) -> None:
    machine.install()
    before = machine.snapshot()
    started = time.monotonic()
    done = machine.install()
    assert time.monotonic() - started < 2
    assert done.returncode == 0
    assert machine.snapshot() == before


@pytest.mark.parametrize("changed", ["pyproject.toml", "mixlocal/new.py", "mixlocal/kernels/native/CMakeLists.txt"])
def test_a_change_of_what_is_installed_installs_again_without_pytorch(machine: Machine, changed: str) -> None:
    machine.install()
    (machine.checkout / changed).write_text("# changed\n")
    assert machine.install().returncode == 0
    assert machine.calls()[2:] == ["pip -v install -e . torch==2.13.0"]


def test_a_change_inside_a_python_file_installs_nothing(machine: Machine) -> None:
    machine.install()
    (machine.checkout / "mixlocal" / "__init__.py").write_text("x = 1\n")
    machine.install()
    assert len(machine.calls()) == 2


def test_an_unfinished_run_is_taken_up(machine: Machine) -> None:
    failed = machine.install(FAKE_PIP_FAILS_ON="-e", FAKE_PIP_SAYS="ERROR: broken")
    assert failed.returncode == 1
    assert machine.install().returncode == 0
    assert machine.calls()[2:] == ["pip -v install -e . torch==2.13.0"]


def test_works_through_a_link_from_anywhere(machine: Machine) -> None:
    link = machine.folder / "link to it"
    link.symlink_to(Path("a check'out") / "install.sh")
    done = subprocess.run([link], env=machine.environment(), cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (machine.venv / "bin" / "mixlocal").exists()


def test_relative_folders_are_the_callers(machine: Machine) -> None:
    done = machine.install(MIXLOCAL_VENV="other venv", MIXLOCAL_PYTHON="stubs/python")
    assert done.returncode == 0, done.stderr
    assert (machine.folder / "other venv" / "bin" / "mixlocal").exists()


def test_an_environment_that_was_there_is_used_and_never_removed(machine: Machine) -> None:
    subprocess.run([machine.folder / "stubs" / "python", "-m", "venv", machine.venv], check=True)
    assert machine.install().returncode == 0
    machine.install("--uninstall")
    assert (machine.venv / "bin" / "python").exists()


def test_without_compiled_kernels_it_says_the_cost_and_tries_again_when_that_changes(machine: Machine) -> None:
    done = machine.install(FAKE_MISSING="No module named _native")
    assert done.returncode == 0
    assert "no compiled kernels" in done.stderr
    assert "5 to 50 times slower" in done.stderr
    headers = machine.folder / "include"
    headers.mkdir()
    (headers / "Python.h").touch()
    machine.install(FAKE_INCLUDE=str(headers), CXX=str(machine.stub("c++", "#!/bin/sh\n")))
    assert machine.calls()[2:] == ["pip -v install -e . torch==2.13.0"]


def test_compiled_kernels_outlive_the_compiler(machine: Machine) -> None:
    machine.install(CXX=str(machine.stub("c++", "#!/bin/sh\n")))
    (machine.folder / "stubs" / "c++").unlink()
    machine.install()
    assert len(machine.calls()) == 2


def test_broken_pythons_on_the_path_are_passed_over(machine: Machine) -> None:
    for name in ("python3.13", "python3.12"):
        machine.stub(name, "#!/bin/sh\nexit 127\n")
    machine.stub("python3.11", FAKE_PYTHON)
    done = machine.install(MIXLOCAL_PYTHON=None)
    assert done.returncode == 0, done.stderr


# ---- PyTorch's builds


def test_cpu_takes_the_cpu_build(machine: Machine) -> None:
    assert machine.install("--cpu").returncode == 0
    assert machine.calls()[0] == "pip -v install torch==2.13.0+cpu"
    machine.install("--cpu")
    machine.install()
    assert len(machine.calls()) == 2


def test_cpu_without_a_cpu_build_takes_the_default_and_says_so(machine: Machine) -> None:
    done = machine.install("--cpu", FAKE_PIP_FAILS_ON="+cpu", FAKE_PIP_SAYS=UNKNOWN)
    assert done.returncode == 0
    assert "no PyTorch 2.13.0+cpu" in done.stderr
    assert machine.calls()[1] == "pip -v install torch==2.13.0"


def test_pytorch_from_an_index_of_the_users(machine: Machine) -> None:
    assert machine.install(MIXLOCAL_TORCH_INDEX="file:///wheels").returncode == 0
    assert machine.calls()[0] == "pip -v install --no-deps --index-url file:///wheels torch==2.13.0"
    assert machine.calls()[1] == "pip -v install -e . torch==2.13.0"


# ---- the command on the PATH


def test_says_the_line_that_puts_the_command_on_the_path(machine: Machine) -> None:
    line = 'export PATH="$HOME/.local/bin:$PATH"'
    assert line in machine.install().stderr
    path = machine.environment()["PATH"] + os.pathsep + str(machine.command.parent)
    assert line not in machine.install(PATH=path).stderr


def test_no_modify_path_leaves_home_alone(machine: Machine) -> None:
    assert machine.install("--no-modify-path").returncode == 0
    assert list(machine.home.iterdir()) == []


@pytest.mark.parametrize("home", [None, "", "nowhere"])
def test_without_a_home_there_is_no_command(machine: Machine, home: str | None) -> None:
    done = machine.install(HOME=home)
    assert done.returncode == 0, done.stderr
    assert "no mixlocal command goes on the PATH" in done.stderr


def test_a_foreign_command_is_neither_overwritten_nor_removed(machine: Machine) -> None:
    machine.command.parent.mkdir(parents=True)
    machine.command.write_text("#!/bin/sh\necho someone else's\n")
    done = machine.install()
    assert done.returncode == 0
    assert "is not ours" in done.stderr
    machine.install("--uninstall")
    assert machine.command.read_text() == "#!/bin/sh\necho someone else's\n"


# ---- refusals


def test_help_does_nothing(machine: Machine) -> None:
    before = machine.snapshot()
    done = machine.install("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for flag in ("--cpu", "--no-modify-path", "--demo", "--test", "--uninstall", "--dry-run"):
        assert flag in done.stdout
    assert machine.snapshot() == before


@pytest.mark.parametrize("flags", [[], ["--demo", "--test", "--cpu"], ["--uninstall"]])
def test_dry_run_says_and_does_nothing(machine: Machine, flags: list[str]) -> None:
    if flags == ["--uninstall"]:
        machine.install()
    before = machine.snapshot()
    done = machine.install("--dry-run", *flags)
    assert done.returncode == 0, done.stderr
    assert "(dry run)" in done.stdout
    assert machine.snapshot() == before


@pytest.mark.parametrize("flags", [["--frobnicate"], ["stray"], ["--uninstall", "--demo"], ["--", "-k", "x"]])
def test_usage(machine: Machine, flags: list[str]) -> None:
    before = machine.snapshot()
    refuses(machine.install(*flags), 2)
    assert machine.snapshot() == before


def test_old_python(machine: Machine) -> None:
    refuses(machine.install(FAKE_VERSION="3.10"), 4, "3.11", "3.10", "MIXLOCAL_PYTHON")


def test_no_python(machine: Machine) -> None:
    refuses(machine.install(MIXLOCAL_PYTHON="no-such-python"), 3, "MIXLOCAL_PYTHON")


def test_python_without_venv(machine: Machine) -> None:
    refuses(machine.install(FAKE_NO_VENV="1"), 3, "python3-venv")


def test_a_folder_that_is_no_environment_is_left_alone(machine: Machine) -> None:
    machine.venv.mkdir()
    (machine.venv / "precious").touch()
    refuses(machine.install(), 4, "MIXLOCAL_VENV")
    machine.install("--uninstall")
    assert (machine.venv / "precious").exists()


def test_a_file_where_a_folder_must_be(machine: Machine) -> None:
    (machine.folder / "file").touch()
    refuses(machine.install(MIXLOCAL_VENV="file/venv"), 14, "MIXLOCAL_VENV")
    (machine.home / ".local").touch()
    refuses(machine.install(), 14, "--no-modify-path")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_no_permission_to_write(open_folder: Path) -> None:
    machine = Machine(open_folder).set_up()
    machine.checkout.chmod(0o555)
    user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run(
        [machine.checkout / "install.sh"], env=machine.environment(), cwd="/", capture_output=True, text=True, **user
    )
    refuses(done, 14, str(machine.checkout))
    machine.checkout.chmod(0o755)


def test_disk_too_small_for_pytorch(machine: Machine) -> None:
    machine.stub("df", "#!/bin/sh\necho Filesystem\necho /dev/disk 9000 7000 2000 78% /\n")
    refuses(machine.install(), 6, "3000 MB", "2000 MB")
    assert not machine.venv.exists()


@pytest.mark.parametrize(
    ("says", "code", "word"),
    [
        (OFFLINE, 5, "network"),
        ("ERROR: HTTP error 503 while getting /simple/torch/", 5, "network"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", 6, "disk"),
        ("ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: 'x'", 14, "permission"),
        (UNKNOWN, 3, "PyTorch 2.13.0"),
        ("error: something new", 1, "something new"),
    ],
)
def test_pip_fails(machine: Machine, says: str, code: int, word: str) -> None:
    done = machine.install(FAKE_PIP_FAILS_ON=ANY_PIP, FAKE_PIP_SAYS=says)
    refuses(done, code, word, str(machine.venv / "install.log"))
    assert says in (machine.venv / "install.log").read_text()
    assert not machine.command.exists()


def test_offline_with_cpu_is_a_network_failure(machine: Machine) -> None:
    refuses(machine.install("--cpu", FAKE_PIP_FAILS_ON=ANY_PIP, FAKE_PIP_SAYS=OFFLINE), 5, "network")


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock here, so nothing is locked")
def test_two_at_once(machine: Machine) -> None:
    with (machine.checkout / "install.sh").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses(machine.install(), 13, "another install.sh")
    assert machine.install().returncode == 0


def test_interrupted(machine: Machine) -> None:
    process = subprocess.Popen(
        [machine.checkout / "install.sh"],
        env=machine.environment(FAKE_PIP_TAKES="10"), stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not machine.calls():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    refuses(subprocess.CompletedProcess([], process.returncode, "", stderr), 130, "run it again")
    assert machine.install().returncode == 0


# ---- the other jobs


def test_demo_pulls_and_asks(machine: Machine) -> None:
    done = machine.install("--demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mixlocal pull smolmix\nmixlocal prompt --seed 3 Why is the sky blue?\n"


def test_demo_ends_as_mixlocal_does(machine: Machine) -> None:
    done = machine.install("--demo", FAKE_MIXLOCAL_EXIT="7")
    assert done.returncode == 7
    assert done.stdout == "mixlocal pull smolmix\n"


def test_test_runs_everything_and_hands_arguments_to_pytest(machine: Machine) -> None:
    done = machine.install("--test", "--", "-k", "a b")
    assert done.returncode == 0, done.stderr
    assert machine.calls()[1:] == ["pip -v install -e .[test] torch==2.13.0", "ruff check", "mypy", "pytest -q -k a b"]


def test_test_tells_what_failed_and_runs_the_rest(machine: Machine) -> None:
    refuses(machine.install("--test", "--no-modify-path", FAKE_MODULE_FAILS="mypy"), 1, "mypy")
    assert machine.calls()[-1] == "pytest -q"


def test_the_tests_extra_is_added_once_and_kept(machine: Machine) -> None:
    machine.install()
    machine.install("--test")
    machine.install("--test")
    machine.install()
    (machine.checkout / "pyproject.toml").write_text("# changed\n")
    machine.install()
    pip = [call for call in machine.calls() if "-e" in call]
    assert [call.split()[4] for call in pip] == [".", ".[test]", ".[test]"]


def test_uninstall_removes_ours_and_tells_where_models_are(machine: Machine) -> None:
    machine.install()
    (machine.checkout / "build").mkdir()
    models = machine.home / "data" / "models"
    models.mkdir(parents=True)
    (machine.command.parent / "other").touch()
    done = machine.install("--uninstall", MIXLOCAL_HOME=str(machine.home / "data"))
    assert done.returncode == 0, done.stderr
    assert f"rm -r {models}" in done.stderr
    assert not machine.venv.exists()
    assert not (machine.checkout / "build").exists()
    assert [path.name for path in machine.command.parent.iterdir()] == ["other"]
    assert models.exists()


def test_uninstall_leaves_the_command_of_another_checkout(machine: Machine) -> None:
    machine.install()
    theirs = f"#!/bin/sh\n{MARK}, removed by install.sh --uninstall\nexec '/elsewhere/bin/mixlocal' \"$@\"\n"
    machine.command.write_text(theirs)
    machine.install("--uninstall")
    assert machine.command.read_text() == theirs


def test_uninstall_without_an_installation(machine: Machine) -> None:
    done = machine.install("--uninstall")
    assert done.returncode == 0
    assert "was not made by install.sh" in done.stderr
