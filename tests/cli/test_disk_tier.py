"""`prompt` with more experts than memory: the same answer at every budget, and what is seen when the disk fails."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from stores import quantized

from mixlocal.errors import MemoryBudgetError
from mixlocal.experts import tiered
from mixlocal.store.manifest import read_manifest

QUESTION = ("prompt", "-m", "many", "--raw", "--ctx", "128", "-n", "40", "--seed", "7", "where do experts live?")


@pytest.fixture(scope="module")
def many(home: Path) -> Path:
    """A model of 32 experts in the tests' home."""
    checkpoint = tiny.write_checkpoint(
        home / "many", num_local_experts=8, num_hidden_layers=4, hidden_size=256, intermediate_size=512
    )
    return quantized(checkpoint, home / "models" / "many" / "q4").folder


@pytest.fixture
def smallest(run, many: Path) -> str:
    """The least --ram, from the refusal."""
    refusal = run(*QUESTION, "--ram", "1M")
    assert refusal.code == 7
    found = re.search(r"--ram (\d+M)", refusal.err)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("sampling", [("-T", "0"), ("-T", "1.2")], ids=["greedy", "seeded"])
def test_the_answer_does_not_depend_on_the_budget(run, smallest: str, sampling: tuple[str, ...]) -> None:
    expected = json.loads(run(*QUESTION, *sampling, "--json").out)
    assert expected["offload"]["disk_hits"] == 0
    for more in range(0, 8, 2):
        ram = f"{int(smallest[:-1]) + more}M"
        for lookahead in ("--lookahead", "--no-lookahead"):
            answer = json.loads(run(*QUESTION, *sampling, "--ram", ram, lookahead, "--json").out)
            assert answer["token_ids"] == expected["token_ids"]
            assert answer["offload"]["ram_hits"] + answer["offload"]["disk_hits"] == expected["offload"]["ram_hits"]
            if more == 0:
                assert answer["offload"]["disk_hits"] > 0
                assert answer["offload"]["bytes_read"] > 0


def test_the_summary_says_where_experts_were_found(run, smallest: str) -> None:
    result = run(*QUESTION, "--ram", smallest)
    assert re.search(r"experts RAM \d+% disk \d+%, read .* MB, waited \d", result.err)
    assert "experts fit in memory; the others are read from disk" in result.err


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (errno.EIO, "input/output error"), (errno.ESTALE, "stale file handle"), ("short", "ends at byte"),
        ("flip", "is damaged"),
    ],
)  # fmt: skip
def test_a_failing_disk_is_one_line_and_no_wrong_token(
    run, many: Path, smallest: str, fault: int | str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(*QUESTION).out
    stride, preadv, records = read_manifest(many).stride, os.preadv, iter(range(10**6))

    def faulty(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if len(buffers[0]) != stride or next(records) < 60:
            return preadv(descriptor, buffers, offset)
        if isinstance(fault, int):
            raise OSError(fault, os.strerror(fault))
        count = preadv(descriptor, buffers, offset)
        buffers[0][100] ^= 1
        return count if fault == "flip" else 0

    monkeypatch.setattr(os, "preadv", faulty)
    result = run(*QUESTION, "--ram", smallest)
    assert result.code == 8
    assert says in result.err
    assert "Traceback" not in result.err
    assert len([line for line in result.err.splitlines() if not line.startswith("warning")]) <= 2
    assert whole.startswith(result.out)


def test_less_memory_than_the_system_said_is_a_smaller_plan(
    run, many: Path, smallest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once all slots cannot be had, and fewer can."""
    expected = run(*QUESTION)
    allocate, refused = tiered.page_memory, iter([True, True])

    def short(nbytes: int) -> torch.Tensor:
        if next(refused, False):
            raise MemoryBudgetError("the system does not give that")
        return allocate(nbytes)

    monkeypatch.setattr(tiered, "page_memory", short)
    result = run(*QUESTION, "--ram", f"{int(smallest[:-1]) + 4}M")
    assert result.code == 0
    assert result.out == expected.out
    assert "gives less memory than it says is free: room for" in result.err


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="RLIMIT_AS is not enforced elsewhere")
def test_any_limit_of_addresses_ends_well(many: Path, home: Path) -> None:
    """It answers, or says what is missing; the system kills nothing and nothing hangs."""
    codes = []
    for megabytes in (600, 1000, 1250, 1500, 2000, 3000):
        command = [sys.executable, "-m", "mixlocal", "--home", str(home), "-q", *QUESTION]
        limit = megabytes * 1_000_000
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),  # noqa: B023
        )  # fmt: skip
        assert done.returncode in (0, 7), done.stderr
        assert "Traceback" not in done.stderr
        codes.append(done.returncode)
    assert codes == sorted(codes, reverse=True)
    assert (codes[0], codes[-1]) == (7, 0)


SLOW_DISK = """
import os, sys, time
from mixlocal.cli import main
preadv, stride = os.preadv, int(sys.argv.pop(1))
def slow(descriptor, buffers, offset):
    if len(buffers[0]) == stride:
        print("reading", file=sys.stderr, flush=True)
        time.sleep(60)
    return preadv(descriptor, buffers, offset)
os.preadv = slow
main()
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_slow_disk_can_be_interrupted(many: Path, home: Path, smallest: str, sent: signal.Signals, code: int) -> None:
    command = [sys.executable, "-c", SLOW_DISK, str(read_manifest(many).stride), "--home", str(home), *QUESTION]
    with subprocess.Popen([*command, "--ram", smallest], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while process.stderr.readline() != "reading\n":
            assert process.poll() is None
        process.send_signal(sent)
        rest = process.communicate(timeout=20)[1]
    assert process.returncode == code
    assert "Traceback" not in rest
