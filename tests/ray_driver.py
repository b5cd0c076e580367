"""A program that answers a batch with Ray, for tests that disturb it: python ray_driver.py LOG

Its stdout has a line of JSON for each thing that happened. It goes on when it is interrupted, and says so.
"""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from types import FrameType

import ray_double
from ray_double import RayDouble, request

from mixlocal.app.batch.engine import Reply
from mixlocal.app.batch.ray_cluster import Cluster, import_ray
from mixlocal.app.batch.ray_engine import RayEngine
from mixlocal.app.budgets import RunOptions
from mixlocal.errors import NetworkError
from mixlocal.store.paths import home


def say(**what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def interrupted(_signal: int, _frame: FrameType | None) -> None:
    say(interrupted=True)


def terminated(_signal: int, _frame: FrameType | None) -> None:
    say(terminated=True)


def main() -> None:
    say(ray="ray" in sys.modules)
    signal.signal(signal.SIGINT, interrupted)
    signal.signal(signal.SIGTERM, terminated)
    import_ray(local=True).cloudpickle.register_pickle_by_value(ray_double)
    try:
        Cluster("127.0.0.1:1", gpus=False)
    except NetworkError as error:
        say(refused=error.message, hint=error.hint)
    double = partial(RayDouble, sys.argv[1], delay=0.3)
    engine = RayEngine("double", RunOptions(device="cpu"), home(), workers=2, make_engine=double)
    for event in engine.answer(request(n) for n in range(10_000)):
        if isinstance(event, Reply):
            say(answered=event.id)
        elif event.note:
            say(note=event.note)


if __name__ == "__main__":
    main()
