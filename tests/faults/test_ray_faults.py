"""The shortened campaign; `python -m tests.faults.ray_faults` is the full one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "ray_faults.py"


def test_killed_workers_cost_no_row() -> None:
    pytest.importorskip("ray")
    options = ("--kills", "4", "--rows", "30", "--delay", "0.4", "--pause", "1.2")
    run = subprocess.run(
        [sys.executable, str(CAMPAIGN), *options], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    report = json.loads(run.stdout)
    assert report["kills"] == 4
    assert report["deaths"] >= 3, "one may die when nothing is left to do"
    assert report["begun"] >= 30 * report["rounds"]
