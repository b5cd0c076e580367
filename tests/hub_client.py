"""The real huggingface-hub in a process of its own: one call a line in, what came of it a line out.

It reads its environment when it is imported, and its session is global; so no test imports it to call the double.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PYTHON = os.environ.get("HUB_DOUBLE_CLIENT_PYTHON", sys.executable)  # another one has another huggingface-hub
SETTINGS = {
    "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DOWNLOAD_TIMEOUT": "3",
}  # fmt: skip


class HubClient:
    """Calls methods of `HfApi`."""

    def __init__(self, home: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        kept = {name: value for name, value in kept.items() if not name.startswith(("HF_", "HUGGING"))}
        self._process = subprocess.Popen(
            [PYTHON, __file__], env=kept | SETTINGS | {"HF_HOME": str(home), "TRANSFORMERS_OFFLINE": "0"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.version = self._read()

    def call(self, endpoint: str, method: str, /, **arguments: Any) -> Any:
        """What it returned, as plain data; the name of the exception's class if there was one."""
        assert self._process.stdin
        print(json.dumps([endpoint, method, arguments]), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def serve() -> None:
    import huggingface_hub

    print(json.dumps(huggingface_hub.__version__), flush=True)
    for line in sys.stdin:
        endpoint, method, arguments = json.loads(line)
        try:
            result = getattr(huggingface_hub.HfApi(endpoint=endpoint), method)(**arguments)
            result = list(result) if hasattr(result, "__next__") else result
        except Exception as error:  # noqa: BLE001 - it is what the caller asked about
            result = type(error).__name__
        print(json.dumps(result, default=lambda value: getattr(value, "__dict__", None) or str(value)), flush=True)


if __name__ == "__main__":
    serve()
