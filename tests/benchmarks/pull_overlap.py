"""Whether downloading and quantizing really overlap: pull against download alone and quantize alone, in turns.

    python tests/benchmarks/pull_overlap.py CHECKPOINT [--rounds 3] [--rate BYTES_PER_S] [--jobs 2] [--variant q4]

CHECKPOINT is a folder in Hugging Face format; the Hub double serves it on this machine and shares its cores. rate: of
each connection, as a network would have it. Prints each round and the medians; `ratio` is pull over the longer of the
two alone, 1 being perfect. What lies on the disk meanwhile is watched, and so is the memory of the pull.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))

DOWNLOAD = """
import sys
from collections import deque
from pathlib import Path
from mixlocal.store.download import Failed, Fetcher, FileDownload, Remote
from mixlocal.store.http import Client
from mixlocal.store.hub import hub_settings, list_repository
from mixlocal.store.part_file import PartFile
from mixlocal.store.patience import Cancellation, Patience, RateLimit
client, events = Client(hub_settings().endpoint, Patience(), Cancellation()), deque()
listing = list_repository(client, sys.argv[1], "main", events.append)
remote = Remote(client, sys.argv[1], listing.commit)
parts = [PartFile(Path(sys.argv[2]), f, listing.commit) for f in listing.files.values() if f.nbytes > 1 << 20]
work = [FileDownload(remote, part, events.append, RateLimit(None)) for part in parts]
fetcher = Fetcher(work, int(sys.argv[3]), 2 * len(work), events.append)
fetcher.start()
for thread in fetcher._threads:
    thread.join()
assert not any(isinstance(event, Failed) for event in events), events
"""


class Watch:
    """The most bytes below a folder and the most memory of a process, looked at every 50 ms."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.disk = self.rss = 0
        self._folder, self._status, self._over = folder, Path(f"/proc/{pid}/status"), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            try:
                files = [path for path in self._folder.rglob("*") if path.is_file()]
                self.disk = max(self.disk, sum(path.stat().st_blocks * 512 for path in files))
                line = next(line for line in self._status.read_text().splitlines() if line.startswith("VmHWM"))
                self.rss = max(self.rss, int(line.split()[1]) * 1024)
            except (OSError, StopIteration):
                continue


def timed(command: list[str], environment: dict[str, str], folder: Path) -> tuple[float, Watch]:
    begun = time.monotonic()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        watch = Watch(folder, process.pid)
        complaint = process.communicate()[1]
        watch.stop()
    assert process.returncode == 0, complaint.decode()[-2000:]
    return time.monotonic() - begun, watch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--variant", default="q4")
    args = parser.parse_args()
    model = f"org/{args.checkpoint.resolve().name}"
    serve = [sys.executable, str(Path(__file__).parent.parent / "hub_double.py"), str(args.checkpoint)]
    with subprocess.Popen([*serve, "--rate", str(args.rate)], stdout=subprocess.PIPE, text=True) as hub:
        assert hub.stdout is not None
        endpoint = hub.stdout.readline().strip().removeprefix("HF_ENDPOINT=")
        try:
            measure(args, model, endpoint)
        finally:
            hub.terminate()


def measure(args: argparse.Namespace, model: str, endpoint: str) -> None:
    results: dict[str, list[float]] = {"download": [], "quantize": [], "pull": []}
    for round_ in range(args.rounds):
        for what, seconds in results.items():
            folder = Path(tempfile.mkdtemp())
            places = {"HF_ENDPOINT": endpoint, "MIXLOCAL_HOME": str(folder), "HF_HOME": str(folder / "hf")}
            environment = os.environ | places
            run = [sys.executable, "-m", "mixlocal"]
            command = {
                "download": [sys.executable, "-c", DOWNLOAD, model, str(folder), str(args.jobs)],
                "quantize": [*run, "quantize", str(args.checkpoint), "--bits", args.variant[1:]],
                "pull": [*run, "pull", f"{model}:{args.variant}", "--jobs", str(args.jobs), "--force"],
            }[what]
            took, watch = timed(command, environment, folder)
            seconds.append(took)
            final = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            print(f"round {round_ + 1} {what}: {took:.1f} s, {watch.disk / 1e9:.2f} GB of disk at most and "
                  f"{final / 1e9:.2f} in the end, {watch.rss / 1e6:.0f} MB of memory", flush=True)  # fmt: skip
            shutil.rmtree(folder)
    alone = [max(pair) for pair in zip(results["download"], results["quantize"], strict=True)]
    ratios = [pull / longer for pull, longer in zip(results["pull"], alone, strict=True)]
    print("medians: " + ", ".join(f"{what} {median(seconds):.1f} s" for what, seconds in results.items()))
    print(f"ratio: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
