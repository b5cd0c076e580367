"""The SkyPilot task that answers a batch on a rented GPU.

SkyPilot is too heavy for the test extra (a minute, half a gigabyte, its own versions of what mixlocal uses), so its
parser is asked by a command of its own:

    python -m venv /tmp/sky && /tmp/sky/bin/pip install skypilot
    SKY_PYTHON=/tmp/sky/bin/python .venv/bin/python -m pytest tests/app/test_skypilot_task.py
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixlocal.app.batch.sky_task import sky_task
from mixlocal.app.catalog import find_entry

SKY = os.environ.get("SKY_PYTHON") or (sys.executable if importlib.util.find_spec("sky") else None)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def task() -> dict[str, Any]:
    return yaml.safe_load(sky_task())


def command(run: str, name: str) -> list[str]:
    """The words of a command in a script."""
    start = run.index(name)
    return shlex.split(run[start:].replace("\\\n", " ").partition("\n")[0])


@pytest.mark.skipif(SKY is None, reason="SkyPilot is not installed; see this file's docstring")
def test_skypilot_accepts_it(tmp_path: Path) -> None:
    """Its parser, which refuses what it does not know."""
    code = "import sky, sys; t = sky.Task.from_yaml(sys.argv[1]); print(t.name, sorted(t.storage_mounts), t.workdir)"
    environment = os.environ | {"HOME": str(tmp_path)}

    def parse(text: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "task.yaml"
        path.write_text(text)
        return subprocess.run(
            [str(SKY), "-c", code, path], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )

    (tmp_path / "prompts.jsonl").touch()
    found = parse(sky_task())
    assert found.stdout.split()[:2] == ["mixlocal-batch", "['/mixlocal/output']"], found.stderr
    misspelt = parse(sky_task().replace("file_mounts:", "file_mount:"))
    assert misspelt.returncode != 0
    assert "file_mount" in misspelt.stderr


def test_it_serves_a_model_of_the_catalogue(task: dict[str, Any]) -> None:
    entry = find_entry("mixtral-8x7b-instruct")
    assert entry is not None
    assert task["envs"]["MODEL"] == entry.source.repository
    assert task["envs"]["REVISION"] == (entry.source.revision or "main")
    weights = 2 * entry.parameters.total
    gigabytes = {"H200": 141, "B200": 180, "H100": 80, "A100-80GB": 80, "L40S": 48}
    for name, count in task["resources"]["accelerators"].items():
        assert 0.9 * gigabytes[name] * count * 1e9 > weights, name
    assert task["resources"]["disk_size"] * 1e9 > 2 * weights


def test_every_flag_exists(task: dict[str, Any]) -> None:
    from mixlocal.cli.batch import batch

    known = {name for parameter in batch.params for name in (*parameter.opts, *parameter.secondary_opts)}
    words = command(task["run"], ".venv/bin/mixlocal batch")
    assert words[:3] == [".venv/bin/mixlocal", "batch", "/mixlocal/input"]
    flags = {word for word in words if word.startswith("-")}
    assert flags >= {"-o", "--engine", "--base-url", "--api-model", "--concurrency"}
    assert flags <= known
    filled = [word.replace("$CONCURRENCY", str(task["envs"]["CONCURRENCY"])) for word in words[2:]]
    with batch.make_context("batch", filled) as context:
        assert context.params["engine"] == "openai"
        assert context.params["concurrency"] == task["envs"]["CONCURRENCY"]


def test_install_flags_exist(task: dict[str, Any]) -> None:
    words = command(task["setup"], "./install.sh")
    usage = subprocess.run([ROOT / "install.sh", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(word in usage for word in words[1:])
    assert "MIXLOCAL_PYTHON" in usage


def test_every_variable_is_known(task: dict[str, Any]) -> None:
    """`set -u` would end the job at one that nobody set."""
    variables = {*task["envs"], *task["secrets"], "SKYPILOT_NUM_GPUS_PER_NODE", "HOME", "PATH", "server"}
    for script in (task["setup"], task["run"], json.dumps(task["file_mounts"])):
        names = re.findall(r"\$\{?([A-Za-z_]\w*)", script)
        assert names
        assert set(names) <= variables


class Node:
    """A machine on which SkyPilot would run the task, with a vLLM of ours."""

    def __init__(self, folder: Path, task: dict[str, Any], vllm: str, mixlocal: str) -> None:
        self.folder, self.task = folder, task
        self.port = free_port()
        self._program("home/vllm/bin/vllm", vllm)
        self._program(".venv/bin/mixlocal", mixlocal)
        (folder / "output").mkdir()
        (folder / "input").write_text('{"prompt": "hello"}\n')

    def _program(self, name: str, script: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/bash\n{textwrap.dedent(script)}")
        path.chmod(0o755)

    def run(self) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {name: str(value) for name, value in self.task["envs"].items()}
        environment |= {"HOME": str(self.folder / "home"), "PORT": str(self.port), "SKYPILOT_NUM_GPUS_PER_NODE": "2"}
        script = self.task["run"].replace("/mixlocal/", f"{self.folder}/") + "\necho behind: $?\n"
        return subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, env=environment, cwd=self.folder, timeout=60,
            check=False,
        )  # fmt: skip

    def is_left(self) -> bool:
        """Whether nothing serves there any more, soon."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) != 0:
                    return True
            time.sleep(0.05)
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


VLLM = f"""
    echo "$@" > "$HOME/vllm.words"
    exec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / "tests/openai_double.py"))} --model "$2" --port "$PORT"
"""


def test_it_runs(tmp_path: Path, task: dict[str, Any]) -> None:
    """The server is asked once it is up, told what to serve, and ended with the job; SkyPilot's lines come behind."""
    node = Node(tmp_path, task, VLLM, f'exec {shlex.quote(sys.executable)} -m mixlocal "$@"')
    found = node.run()
    assert found.stdout.endswith("behind: 0\n"), found.stdout + found.stderr
    (line,) = (tmp_path / "output/answers.jsonl").read_text().splitlines()
    assert "olleh" in json.loads(line)["response"]["body"]["choices"][0]["message"]["content"]
    words = (tmp_path / "home/vllm.words").read_text().split()
    assert words[:2] == ["serve", task["envs"]["MODEL"]]
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert node.is_left()


def test_rows_that_failed_end_the_server_too(tmp_path: Path, task: dict[str, Any]) -> None:
    node = Node(tmp_path, task, VLLM, "exit 10")
    assert node.run().stdout.endswith("behind: 10\n")
    assert node.is_left()


def test_a_server_that_cannot_load_the_model(tmp_path: Path, task: dict[str, Any]) -> None:
    node = Node(tmp_path, task, "echo out of memory >&2; exit 3", "touch asked")
    found = node.run()
    assert "out of memory" in found.stdout
    assert found.stdout.endswith("behind: 1\n")
    assert not (tmp_path / "asked").exists()
