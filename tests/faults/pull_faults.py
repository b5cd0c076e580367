"""Kill, fail and disturb `pull` in every way; each rerun must end with identical bytes.

    python tests/faults/pull_faults.py [--kills 100] [--faults 600] [--every 1] [--interrupts 20] [--seed 0]

The Hub double runs in a process of its own, and every attempt is a fork of this one, which computes nothing and has no
threads. Prints what fired: a JSON object whose "bad" is empty.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_secret"}

import huggingface_hub.hf_api  # noqa: F401 - here, so that no fork has to import it
import tiny
from hub_double import HubDouble
from hub_faults import CATALOGUE, Fault
from quantize_faults import digest, forked

from faults.striking import CODES, KINDS, exit_code, fault
from mixlocal.app.pull.carry_out import PullOptions, disk_needs
from mixlocal.app.pull.job import PullJob
from mixlocal.app.reference import hub_model
from mixlocal.errors import AccessError, CorruptError, NetworkError, NotFoundError, RefusedError
from mixlocal.store import download
from mixlocal.store.manifest import MANIFEST
from mixlocal.store.paths import home
from mixlocal.store.patience import Patience

SMALL, LARGE = "org/small", "org/large"
JOBS = 2
RATE = 30_000_000  # bytes/s of a connection, where a run is to be killed midway
MIB = 1 << 20
HURRIED = Patience(give_up=1.5, reach=0.7, read=0.3, longest_wait=0.05, slowest=1000.0, window=0.5)
REFUSALS = {kind.exit_code for kind in (AccessError, CorruptError, NetworkError, NotFoundError, RefusedError)}

# Where else than at its own place a kind of fault may strike.
ELSEWHERE = dict.fromkeys(
    ("status", "retry_after", "close_before_headers", "tls_garbage", "slow_headers", "html_200"),
    ("revision", "tree", "resolve", "cdn"),
)
HOW = {"cut": ("fin", "rst", "stall"), "retry_after": ("", "date", "ratelimit", "huge")}
LEFT_OUT = {"ref_moves"}  # a commit more, so another manifest: it has a test of its own


@dataclass(frozen=True)
class Hub:
    """The double, in a child."""

    pipe: Any
    endpoint: str
    pid: int

    @classmethod
    def start(cls, repositories: dict[str, Path]) -> Hub:
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _serve(theirs, repositories)
        theirs.close()
        return cls(ours, ours.recv(), pid)

    def ask(self, **settings: Any) -> dict[str, Any]:
        """Set `faults` or `rate`; what has been counted since the faults were last set."""
        self.pipe.send(settings)
        answer: dict[str, Any] = self.pipe.recv()
        return answer

    def stop(self) -> None:
        self.pipe.close()
        os.waitpid(self.pid, 0)


def _serve(pipe: Any, repositories: dict[str, Path]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with contextlib.suppress(EOFError), HubDouble(repositories, token="hf_secret") as hub:
            pipe.send(hub.endpoint)
            while True:
                settings = pipe.recv()
                state = {"fired": hub.fired, "sent": hub.sent(".safetensors"), "leaks": sum(hub.leaks.values())}
                hub.rate = settings.get("rate", hub.rate)
                if "faults" in settings:
                    hub.faults, hub.fired, hub.requests = settings["faults"], Counter(), []
                pipe.send(state)
    finally:
        os._exit(0)


def pull(model: str, folder: Path) -> None:
    """As the command does, without measuring this machine."""
    download.FIRST_WAIT = 0.01
    wanted = hub_model(model)
    assert wanted is not None
    job = PullJob.begin(wanted, home(folder), PullOptions(JOBS), offline=False, patience=HURRIED.give_up)
    assert job.line.client is not None
    job.line.client.patience = HURRIED
    if job.installed() is None:
        found = _result(job.survey())
        needs = disk_needs(found, job.home, job.options)
        _result(job.run(found, needs))


def _result(work: Any) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def attempt(model: str, folder: Path, on_call: Callable[[str, int], int] | None = None) -> int:
    return forked(lambda: pull(model, folder), on_call)


class Campaign:
    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.rng = root, random.Random(seed)
        self.bad: list[str] = []
        small, large = root / "small", root / "large"
        wide = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 8, "num_hidden_layers": 2}
        assert exit_code(forked(lambda: tiny.write_checkpoint(small, shards=3))) == 0
        assert exit_code(forked(lambda: tiny.write_checkpoint(large, shards=4, **wide))) == 0
        self.hub = Hub.start({SMALL: small, LARGE: large})
        os.environ |= {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(root / "hf")}
        self.expected = {model: self._whole(model) for model in (SMALL, LARGE)}
        self.shards = sorted(path.name for path in small.glob("*.safetensors"))
        self.large_bytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))

    def _whole(self, model: str) -> str:
        folder = self.root / "whole"
        assert exit_code(attempt(model, folder)) == 0
        found = digest(folder)
        shutil.rmtree(folder)
        return found

    def finish(self, model: str, folder: Path, what: str) -> None:
        """Run undisturbed to the end: the bytes must be those of a run that never was disturbed."""
        self.hub.ask(faults=[], rate=0)
        code = exit_code(attempt(model, folder))
        if code != 0 or digest(folder) != self.expected[model]:
            self.bad.append(f"{what}: the rerun gave exit {code} and other bytes")
        left = [path for path in (folder / "cache" / "downloads").rglob("*") if path.suffix != ".lock"]
        if left and code == 0:
            self.bad.append(f"{what}: left {left[0].name}")
        shutil.rmtree(folder, ignore_errors=True)

    def network(self, count: int) -> dict[str, Any]:
        """Until `count` pulls have met a fault."""
        fired: Counter[str] = Counter()
        disturbed: Counter[str] = Counter()
        kinds, tries = [kind for kind in CATALOGUE if kind not in LEFT_OUT], 0
        while disturbed.total() < count and tries < 3 * count:
            chosen = self._fault(kinds[tries % len(kinds)])
            tries += 1
            self.hub.ask(faults=[chosen], rate=0)
            folder = self.root / "run"
            code = exit_code(attempt(SMALL, folder))
            state = self.hub.ask()
            fired += state["fired"]
            disturbed[chosen.kind] += bool(state["fired"])
            self._check_outcome(code, folder, f"{chosen}")
            if state["leaks"]:
                self.bad.append(f"{chosen}: the token went elsewhere")
            if code == 0:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self.finish(SMALL, folder, f"{chosen}")
        return {"disturbed": disturbed.total(), "kinds": len(+disturbed), "fired": fired.total(), "by_kind": disturbed}

    def _check_outcome(self, code: int, folder: Path, what: str) -> None:
        published = any((folder / "models").rglob(MANIFEST))
        if code == 0 and digest(folder) != self.expected[SMALL]:
            self.bad.append(f"{what}: exit 0 and other bytes")
        if code and (code not in REFUSALS or published):
            self.bad.append(f"{what}: exit {code}, published: {published}")

    def _fault(self, kind: str) -> Fault:
        pick = self.rng.choice
        where = pick((*ELSEWHERE.get(kind, ()), CATALOGUE[kind].where))
        content = where in ("resolve", "cdn")
        return Fault(
            kind, where, pick(self.shards) if content else "", nth=pick((1, 2)) if content else 1,
            times=1 if kind == "drip" else pick((1, 1, 2, -1)), at=self.rng.randrange(100_000),
            how=pick(HOW.get(kind, ("",))), step=10, seconds=0.05 if kind == "drip" else 1.0,
            code=pick((408, 429, 500, 502, 503, 504)) if kind == "status" else 0,
        )  # fmt: skip

    def calls(self, first: int, every: int) -> dict[str, Any]:
        """Every kind of failure at every `every`-th durable call from the `first` on."""
        total = self._count_calls()
        points = [(k, kind) for k in range(first, total + 1, every) for kind in KINDS]
        fired = 0
        for k, kind in points:
            folder = self.root / "run"
            self.hub.ask(faults=[], rate=0)
            read_end, write_end = os.pipe()
            code = exit_code(attempt(SMALL, folder, fault(kind, k, write_end)))
            os.close(write_end)
            with os.fdopen(read_end, "rb") as pipe:
                fired += bool(pipe.read())
            wanted = -signal.SIGKILL if kind == "KILL" else CODES[kind]
            if code not in (wanted, 0):
                self.bad.append(f"{kind} at call {k}: exit {code}")
            self.finish(SMALL, folder, f"{kind} at call {k}")
        return {"calls": total, "points": len(points), "struck": fired}

    def _count_calls(self) -> int:
        read_end, write_end = os.pipe()

        def on_call(name: str, nbytes: int) -> int:
            os.write(write_end, b".")
            return nbytes

        pid = attempt(SMALL, self.root / "count", on_call)
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            calls = len(pipe.read())
        assert exit_code(pid) == 0
        shutil.rmtree(self.root / "count")
        return calls

    def kills(self, count: int) -> dict[str, Any]:
        """`kill -9` at random moments, again and again within one pull; bytes sent again per kill."""
        hit, again, most = 0, 0, 0.0
        while hit < count:
            folder, struck, sent = self.root / "run", 0, 0
            self.hub.ask(faults=[], rate=RATE)
            while hit < count and struck < 10:
                pid = attempt(LARGE, folder)
                time.sleep(self.rng.uniform(0.1, 0.7))
                os.kill(pid, signal.SIGKILL)
                if exit_code(pid) == 0:
                    break
                hit, struck = hit + 1, struck + 1
            assert exit_code(attempt(LARGE, folder)) == 0
            sent = self.hub.ask()["sent"]
            again += sent - self.large_bytes
            most = max(most, (sent - self.large_bytes) / max(struck, 1))
            self.finish(LARGE, folder, f"{struck} kills")
        if most > JOBS * MIB:
            self.bad.append(f"{most:.0f} bytes were sent again per kill")
        return {"kills": hit, "sent_again_per_kill": again // max(hit, 1), "most": int(most), "jobs": JOBS}

    def interrupts(self, count: int) -> dict[str, Any]:
        """SIGINT while a shard trickles in: how long it takes to end, and whether the rerun goes on at the byte."""
        slowest, exact = 0.0, 0
        for _ in range(count):
            folder = self.root / "run"
            self.hub.ask(faults=[], rate=1_000_000)
            pid = attempt(LARGE, folder)
            time.sleep(self.rng.uniform(0.8, 1.5))
            os.kill(pid, signal.SIGINT)
            begun = time.monotonic()
            exit_code(pid)
            slowest = max(slowest, time.monotonic() - begun)
            landed = sum(path.stat().st_size for path in folder.rglob("*.part"))
            headers = 4 * (1 << 14)
            self.hub.ask(faults=[], rate=0)
            assert exit_code(attempt(LARGE, folder)) == 0
            sent = self.hub.ask()["sent"]
            exact += sent <= self.large_bytes - landed + headers and landed > 0
            self.finish(LARGE, folder, "interrupt")
        if slowest > 1 or exact != count:
            self.bad.append(f"interrupts: {slowest:.2f} s at worst, {exact} of {count} went on at the byte")
        return {"interrupts": count, "slowest_s": round(slowest, 3), "went_on_at_the_byte": exact}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--faults", type=int, default=600)
    parser.add_argument("--every", type=int, default=1, help="strike at every n-th call; 0 for none")
    parser.add_argument("--first", type=int, default=1, help="the first call to strike at")
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        campaign = Campaign(root, args.seed)
        result: dict[str, Any] = campaign.network(args.faults)
        result |= campaign.kills(args.kills) | campaign.interrupts(args.interrupts)
        if args.every:
            result |= campaign.calls(args.first, args.every)
        campaign.hub.stop()
        print(json.dumps(result | {"bad": campaign.bad}))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
