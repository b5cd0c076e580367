"""The process that runs a template: it comes when it is needed, goes with us, and holds up whatever is done to it."""

from __future__ import annotations

import ast
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from conversations import user

from mixlocal.app import template_child, template_sandbox
from mixlocal.app.template import ChatML, MistralV1, PlainTemplate
from mixlocal.app.template_jinja import JinjaTemplate
from mixlocal.app.template_sandbox import Limits, Sandbox
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.errors import MixlocalError, RefusedError, UsageError

ECHO = "{{ messages[0].content }}"
SLOW_FOR_A = (
    "{% if messages[0].content == 'A' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{{ messages[0].content }}"
)


def children() -> dict[int, psutil.Process]:
    found = {child.pid: child for child in psutil.Process().children()}
    return {pid: child for pid, child in found.items() if child.status() == psutil.STATUS_ZOMBIE or is_ours(child)}


def is_ours(process: psutil.Process) -> bool:
    return any("template_child.py" in word for word in process.cmdline())


def started_by(action: Callable[[], object]) -> psutil.Process:
    before = set(children())
    action()
    (child,) = [child for pid, child in children().items() if pid not in before]
    return child


@pytest.fixture
def template() -> Iterator[JinjaTemplate]:
    template = JinjaTemplate(ECHO, origin="f.jinja")
    yield template
    template.close()


@pytest.fixture
def child(template: JinjaTemplate) -> psutil.Process:
    """The process of `template`."""
    template.close()
    return started_by(lambda: template._sandbox.compile())


def test_one_process_serves_a_template(smol: Tokenizer, template: JinjaTemplate, child: psutil.Process) -> None:
    before = set(children())
    for content in ("A", "B", "漢字 😀 \0", "x" * 300_000):
        assert template.encode([user(content)], smol) == smol.encode(content)
    assert set(children()) == before
    assert child.pid in before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_process_is_replaced(smol: Tokenizer, template: JinjaTemplate, number: int) -> None:
    """At once, and when its death has been seen."""
    for pause in (0, 0, 0.1):
        for child in children().values():
            child.send_signal(number)
        time.sleep(pause)
        assert template.encode([user("A")], smol) == smol.encode("A")


def test_ctrl_c_in_the_terminal_does_not_reach_it(
    smol: Tokenizer, template: JinjaTemplate, child: psutil.Process
) -> None:
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    child.send_signal(signal.SIGINT)
    assert template.encode([user("A")], smol) == smol.encode("A")
    assert child.is_running()


def test_an_interrupt_while_waiting_spoils_nothing(smol: Tokenizer) -> None:
    template = JinjaTemplate(SLOW_FOR_A)
    for _ in range(2):
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
        began = time.monotonic()
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            template.encode([user("A")], smol)
        assert time.monotonic() - began < 1
        timer.join()
        for content in ("B", "C"):
            assert template.encode([user(content)], smol) == smol.encode(content)
    template.close()


def test_templates_that_go_leave_nothing(smol: Tokenizer) -> None:
    """No process, zombie or file descriptor, whether they were closed, dropped, refused, killed or interrupted."""
    gc.collect()
    files, processes = psutil.Process().num_fds(), set(children())
    for n in range(20):
        template = JinjaTemplate(ECHO)
        template.encode([user("A")], smol)
        if n % 4 == 0:
            template.close()
            template.close()
        elif n % 4 == 1:
            started = [child for pid, child in children().items() if pid not in processes]
            started[0].kill()
        elif n % 4 == 2:
            with pytest.raises(RefusedError):
                JinjaTemplate("{{")
        del template
        assert set(children()) == processes
    assert psutil.Process().num_fds() == files


PARENT = """
import sys, time
from mixlocal.app.template_sandbox import Sandbox
sandbox = Sandbox(sys.argv[1], "x")
sandbox.compile()
print("ready", flush=True)
if sys.argv[2] == "busy":
    sandbox.render([[{"role": "user", "content": "A"}]], {}, 999)
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_it_ends_when_we_are_killed(state: str) -> None:
    """Its input ends; and one that is busy runs into its limit."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, SLOW_FOR_A, state], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    time.sleep(0.1)
    (child,) = psutil.Process(parent.pid).children()
    assert is_ours(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.skipif(sys.platform != "linux", reason="what a process may do is read from /proc")
def test_what_the_process_is_given(child: psutil.Process) -> None:
    assert child.environ().keys() <= {"LD_LIBRARY_PATH"}
    assert child.cwd() == "/"
    assert sorted(os.listdir(f"/proc/{child.pid}/fd")) == ["0", "1", "2"]
    assert child.rlimit(resource.RLIMIT_AS) == (512 << 20, 512 << 20)
    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        assert child.rlimit(limit) == (0, 0)


def test_it_imports_the_standard_library_and_jinja2_only() -> None:
    tree = ast.parse(Path(template_child.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "jinja2"}


def test_our_own_process_does_not_import_jinja2(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(ECHO)
    code = (
        "import sys; from pathlib import Path; from mixlocal.app.template import Message;"
        "from mixlocal.app.templates import load_template;"
        f"template = load_template(Path({str(tmp_path)!r}), None);"
        "note = template.system_note([Message('system', 'S'), Message('user', 'A')]);"
        "sys.exit(note is not None or 'jinja2' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_built_in_templates_start_no_process(smol: Tokenizer, v1: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "_Child", None)
    assert ChatML().encode([user("A")], smol)
    assert MistralV1().encode([user("A")], v1)
    assert PlainTemplate().encode([user("A")], v1)


def test_threads_share_a_template(smol: Tokenizer, template: JinjaTemplate) -> None:
    contents = [f"question {n}" for n in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda content: template.encode([user(content)], smol), contents))
    assert found == [smol.encode(content) for content in contents]


def test_the_clock_is_the_same_in_both_renderings(smol: Tokenizer) -> None:
    template = JinjaTemplate("{{ strftime_now('%f') }}" + ECHO)
    seen = {smol.decode(template.encode([user("A")], smol)) for _ in range(20)}
    assert len(seen) > 1
    template.close()


def test_half_a_surrogate_pair_is_named(smol: Tokenizer, template: JinjaTemplate) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        template.encode([user("a\ud800")], smol)
    assert template.encode([user("A")], smol) == smol.encode("A")
    for source in ("\ud800", "{{ '\\ud800' }}"):
        with pytest.raises(RefusedError):
            JinjaTemplate(source).encode([user("A")], smol)


def test_processor_time_is_limited_for_each_answer() -> None:
    """Whatever the clock says, and not for all of them together."""
    sandbox = Sandbox(SLOW_FOR_A, "f.jinja", Limits(cpu=0.3, wall=60))
    answers = 0
    child = started_by(sandbox.compile)
    spent = child.cpu_times().user
    while child.cpu_times().user < spent + 0.5:
        assert sandbox.render([[{"role": "user", "content": "B" * 9999}]] * 99, {}, 99999)
        answers += 1
    assert answers > 3
    began = time.monotonic()
    with pytest.raises(RefusedError, match=r"took more than 0\.3 s"):
        sandbox.render([[{"role": "user", "content": "A"}]], {}, 999)
    assert time.monotonic() - began < 3
    assert sandbox.render([[{"role": "user", "content": "B"}]], {}, 999) == ["B"]
    sandbox.close()


def test_the_clock_limits_where_nothing_else_does() -> None:
    """As on a system that keeps no account of processor time or memory."""
    sandbox = Sandbox(SLOW_FOR_A, "f.jinja", Limits(cpu=60, wall=0.5, memory=resource.RLIM_INFINITY))
    began = time.monotonic()
    with pytest.raises(RefusedError, match=r"f\.jinja: the chat template took more than 0\.5 s"):
        sandbox.render([[{"role": "user", "content": "A"}]], {}, 999)
    assert time.monotonic() - began < 2
    assert sandbox.render([[{"role": "user", "content": "B"}]], {}, 999) == ["B"]
    sandbox.close()


def test_a_system_without_limits_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def refuse(number: int, limits: tuple[int, int]) -> None:
        calls.append(number)
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    monkeypatch.delattr(resource, "RLIMIT_NPROC")
    template_child._limit_resources(512 << 20)
    assert len(calls) == 4


READY = r"""
import sys, time
out = sys.stdout.buffer
out.write(b"\0\0\0\2{}")
out.flush()
sys.stdin.buffer.read(9)
"""
BROKEN = {
    "silent": READY + "time.sleep(60)",
    "gone": READY,
    "not ready": "import sys\nsys.exit(3)",
    "chatty at the start": "import sys\nsys.stdout.buffer.write(b'hello, world')",
    "endless": READY + "out.write(b'\\xff\\xff\\xff\\xff')\nwhile True:\n    out.write(bytes(4096))",
    "half": READY + "out.write(b'\\0\\0\\0\\x20{')",
    "no JSON": READY + "out.write(b'\\0\\0\\0\\3abc')",
    "deep JSON": READY + "out.write((4000).to_bytes(4, 'big') + b'[' * 4000)",
    "other JSON": READY + "out.write(b'\\0\\0\\0\\x0d{\"texts\": [5]}')",
    "unknown error": READY + 'out.write(b\'\\0\\0\\0\\x0e{"error": "a"}\')',
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_process_that_is_not_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Even if a template took it over, it could only talk to us, and we listen with care."""
    script = tmp_path / "child.py"
    script.write_text(BROKEN[name])
    monkeypatch.setattr(template_sandbox, "_CHILD", script)
    began = time.monotonic()
    with pytest.raises(RefusedError, match=r"f\.jinja") as caught:
        Sandbox("", "f.jinja", Limits(wall=0.5)).compile()
    assert ("took more than" in caught.value.message) == (name == "silent")
    assert time.monotonic() - began < 3


def test_a_process_that_cannot_be_started_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RefusedError, match=r"f\.jinja: no process could be started for the chat template") as caught:
        JinjaTemplate("", origin="f.jinja")
    assert isinstance(caught.value, MixlocalError)
    assert "\n" not in caught.value.message
