"""The shortened campaign; `python tests/faults/quantize_faults.py` is the full one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parent / "quantize_faults.py"


@pytest.mark.parametrize("options", [(), ("--consume",)], ids=["quantize", "consume"])
def test_quantize_survives_every_kind_of_death(options: tuple[str, ...]) -> None:
    command = [sys.executable, str(CAMPAIGN), "--kills", "6", "--every", "5", *options]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout)
    assert result["bad"] == []
    assert result["fired"] == result["points"] > 80
    assert result["kills"] == 6
