"""Kill and fail `quantize` at every durable call and at random moments; each rerun must give identical bytes.

    python tests/faults/quantize_faults.py [--kills 20] [--every 1] [--consume]

--consume: of tensors that come in any order, out of source files that are gone once what was made of them is on disk.

One process imports everything and computes nothing; every attempt is a fork of it, so a fault costs milliseconds.
Prints what fired: {"calls": ..., "points": ..., "fired": ..., "kills": ..., "bad": [...]}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny

from faults.striking import CODES, KINDS, exit_code, fault
from mixlocal.app.blueprint import Blueprint
from mixlocal.app.install import QuantizeRequest, quantize_model
from mixlocal.app.quantization import Quantization, StoreJob
from mixlocal.app.quantize import read_small_files
from mixlocal.errors import MixlocalError
from mixlocal.store import durable
from mixlocal.store.building import Origin, sweep
from mixlocal.store.checkpoint import Checkpoint, TensorRef, read_tensor
from mixlocal.store.durable import make_folder, write_file
from mixlocal.store.lock import locked
from mixlocal.store.manifest import MANIFEST, Recipe, Source
from mixlocal.store.paths import home

RECIPE = Recipe(experts="nf4", scale_bits=16, attention="int8")
Work = Callable[[Path, Path], None]  # checkpoint, folder to work in


def quantize(checkpoint: Path, folder: Path) -> None:
    for _ in quantize_model(QuantizeRequest(str(checkpoint), "q4", RECIPE), home(folder)):
        pass


def consume(checkpoint: Path, folder: Path) -> None:
    """As a download does it. A file in `folder`/gone stands for a source file that was deleted."""
    source, out, gone = Checkpoint(checkpoint), home(folder).store("checkpoint", "q4"), folder / "gone"
    blueprint = Blueprint.of(source.config, "config.json", RECIPE)
    make_folder(gone)
    with locked(out):
        sweep(out)
        if (out / MANIFEST).is_file():
            return
        with Quantization(StoreJob(out, "checkpoint", "q4", RECIPE), blueprint, "") as quantization:
            for shard in source.shards:
                refs = [ref for ref in source.tensors.values() if ref.path == shard]
                if quantization.accepted(shard.name) is None:
                    use_up(quantization, refs, gone / shard.name)
                assert not any(quantization.lacks(ref.name) for ref in refs)
            quantization.finish(Source("checkpoint", None, ()), read_small_files(checkpoint))


def use_up(quantization: Quantization, refs: list[TensorRef], gone: Path) -> None:
    assert not gone.exists(), f"{gone.name} is needed once more"
    for ref in random.Random(gone.name).sample(refs, k=len(refs)):
        if quantization.lacks(ref.name):
            quantization.add(ref, read_tensor(ref), Origin(gone.name, ref.offset + ref.nbytes))
    quantization.accept(gone.name, "0" * 64)
    quantization.sync()
    write_file(gone, b"")


def attempt(work: Work, checkpoint: Path, folder: Path, on_call: Callable[[str, int], int] | None = None) -> int:
    """Fork and work; the child's pid."""
    return forked(lambda: work(checkpoint, folder), on_call)


def forked(work: Callable[[], object], on_call: Callable[[str, int], int] | None = None) -> int:
    """The pid of a child that does `work`; torch's threads do not survive a fork, so only children compute."""
    pid = os.fork()
    if pid:
        return pid
    durable.on_call = on_call
    code = 99  # an exception that is not ours: the child must say so and not run the parent's code
    try:
        work()
        code = 0
    except MixlocalError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def digest(folder: Path) -> str:
    """Of every file below the models folder, names included."""
    total = hashlib.sha256()
    for path in sorted((folder / "models").rglob("*")):
        if path.is_file() and not path.name.endswith(".lock"):
            total.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def count_calls(work: Work, checkpoint: Path, folder: Path) -> int:
    """Durable calls of an undisturbed run."""
    read_end, write_end = os.pipe()
    calls = 0

    def on_call(name: str, nbytes: int) -> int:
        nonlocal calls
        calls += 1
        os.write(write_end, b".")
        return nbytes

    pid = attempt(work, checkpoint, folder, on_call)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        calls = len(pipe.read())
    assert exit_code(pid) == 0
    return calls


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--every", type=int, default=1, help="strike at every n-th call")
    parser.add_argument("--consume", action="store_true", help="source files are deleted as they are used up")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    try:
        work = consume if args.consume else quantize
        print(json.dumps(campaign(work, root, args.kills, args.every, random.Random(args.seed))))
    finally:
        shutil.rmtree(root)


def campaign(work: Work, root: Path, kills: int, every: int, rng: random.Random) -> dict[str, object]:
    checkpoint, larger = root / "checkpoint", root / "larger"
    assert exit_code(forked(lambda: tiny.write_checkpoint(checkpoint, shards=2))) == 0
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_local_experts": 16}
    assert exit_code(forked(lambda: tiny.write_checkpoint(larger, **wide))) == 0
    calls = count_calls(work, checkpoint, root / "reference")
    expected = digest(root / "reference")
    points = [(k, kind) for k in range(1, calls + 1, every) for kind in KINDS]
    bad: list[str] = []
    fired = 0
    for k, kind in points:
        folder = root / "run"
        read_end, write_end = os.pipe()
        code = exit_code(attempt(work, checkpoint, folder, fault(kind, k, write_end)))
        os.close(write_end)
        with os.fdopen(read_end, "rb") as pipe:
            fired += bool(pipe.read())
        wanted = -signal.SIGKILL if kind == "KILL" else CODES[kind]
        if code not in (wanted, 0):  # 0: a full disk may not stop what only helps, such as the lock's process number
            bad.append(f"{kind} at call {k}: exit {code}")
        bad += finish(work, checkpoint, folder, expected, f"{kind} at call {k}")
    killed = kill_at_random(work, larger, root, kills, rng, bad)
    return {"calls": calls, "points": len(points), "fired": fired, "kills": killed, "bad": bad}


def kill_at_random(work: Work, checkpoint: Path, root: Path, kills: int, rng: random.Random, bad: list[str]) -> int:
    """`kill -9` until it has hit `kills` running processes."""
    start = time.monotonic()
    assert exit_code(attempt(work, checkpoint, root / "whole")) == 0
    seconds, expected, hit = time.monotonic() - start, digest(root / "whole"), 0
    for _ in range(4 * kills):
        pid = attempt(work, checkpoint, root / "run")
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        if exit_code(pid) == -signal.SIGKILL:
            hit += 1
        bad += finish(work, checkpoint, root / "run", expected, f"kill {hit}")
        if hit == kills:
            break
    return hit


def finish(work: Work, checkpoint: Path, folder: Path, expected: str, what: str) -> list[str]:
    """Rerun undisturbed; what went wrong."""
    code = exit_code(attempt(work, checkpoint, folder))
    same = code == 0 and digest(folder) == expected
    shutil.rmtree(folder, ignore_errors=True)
    return [] if same else [f"{what}: rerun gave exit {code} and other bytes"]


if __name__ == "__main__":
    main()
