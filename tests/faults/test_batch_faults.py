"""The shortened campaign; `python -m tests.faults.batch_faults` is the full one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).parent / "batch_faults.py"


def test_batch_survives_every_kind_of_death() -> None:
    command = [sys.executable, str(CAMPAIGN), "--kills", "12", "--rows", "60", "--every", "3"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    result = json.loads(run.stdout)
    assert [part["bad"] for part in result.values()] == [[], [], []]
    assert result["kill"]["kills"] == 12
    assert result["kill"]["recomputed"] > 0
    for name, least in (("new", 40), ("grown", 16)):
        assert result[name]["fired"] == result[name]["points"] > least
