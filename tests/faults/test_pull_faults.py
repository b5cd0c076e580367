"""The shortened campaign; `python tests/faults/pull_faults.py` is the full one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).parent / "pull_faults.py"


def test_pull_survives_every_kind_of_fault() -> None:
    options = ["--kills", "8", "--faults", "45", "--every", "12", "--interrupts", "2"]
    run = subprocess.run(
        [sys.executable, str(CAMPAIGN), *options], capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout)
    assert result["bad"] == []
    assert result["disturbed"] >= 45
    assert result["kinds"] >= 30
    assert result["struck"] == result["points"] > 60
    assert result["kills"] == 8
    assert result["interrupts"] == result["went_on_at_the_byte"] == 2
