"""Speeds of several models, measured in turns.

A machine is not equally fast from one minute to the next. So every repetition of a test, a round, goes through all
models before the next one begins: what slows a whole round down is in the speeds of all, and not in their ratios.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mixlocal.app.bench import BenchModel, BenchTarget, describe_model, open_bench, prepare_bench, time_test, token_ids
from mixlocal.app.bench_request import BenchRequest, BenchTest
from mixlocal.app.budgets import FREE_SHARE, RunOptions
from mixlocal.app.hardware import probe
from mixlocal.app.measure import Running
from mixlocal.app.model_run import ModelRun
from mixlocal.app.sizes import parse_size
from mixlocal.engine.generate import prefill
from mixlocal.kernels.isa import set_threads
from mixlocal.store.paths import Home


class Turns:
    """Planned; `measure` once. A model is told by its place among `models`.

    labels: what tells a model from the others. together: all are in memory at once; else each is loaded again for
    every round. options: with the threads of the tests. models, samples: when they are measured; tokens/s of a model
    and test, a round each. warnings: for the user.
    """

    def __init__(self, models: Sequence[str], tests: BenchRequest, options: RunOptions, folders: Home) -> None:
        """Raises as `prepare_bench` for a model that cannot be measured."""
        self._names, self._tests, self._folders = models, tests, folders
        self.options = replace(options, threads=tests.threads[0])
        runs = [prepare_bench(model, tests, self.options, folders) for model in models]
        self.labels = _labels(runs, models)
        self.together = fit_together(runs)
        self.warnings: list[str] = []
        for run in runs:
            self._warn(run.warnings)
        if not self.together:
            self._warn(("the models do not fit in memory together: each is loaded again for every round",))
        self.models: dict[int, BenchModel] = {}
        self.samples: dict[tuple[int, BenchTest], list[float]] = {
            (model, test): [] for model in range(len(models)) for test in tests.tests()
        }

    def measure(self, loaded: Callable[[], None]) -> Iterator[Running]:
        """loaded: called when models are in memory, before they are timed."""
        everyone, rounds = range(len(self._names)), range(self._tests.repetitions)
        if self.together:
            yield from self._sit(everyone, rounds, loaded)
            return
        for number in rounds:
            for model in everyone:
                yield from self._sit((model,), (number,), loaded)

    def _sit(self, models: Sequence[int], rounds: Sequence[int], loaded: Callable[[], None]) -> Iterator[Running]:
        """Load `models`, take them through `rounds` in turns, free them."""
        targets: dict[int, BenchTarget] = {}
        try:
            for model in models:
                yield Running(f"loading {self.labels[model]}", 0, 0)
                targets[model] = self._open(model)
            loaded()
            set_threads(self._tests.threads[0])
            for depth in dict.fromkeys(self._tests.n_depths):
                yield from self._sit_at(depth, targets, rounds)
        finally:
            _free(targets)

    def _open(self, model: int) -> BenchTarget:
        target = open_bench(self._names[model], self._tests, self.options, self._folders)
        self._warn(target.run.warnings)
        self.models[model] = describe_model(target)
        return target

    def _sit_at(self, depth: int, targets: dict[int, BenchTarget], rounds: Sequence[int]) -> Iterator[Running]:
        """The tests behind `depth` tokens, each timed once for each model and round."""
        tests = [test for test in self._tests.tests() if test.n_depth == depth]
        limit = depth + max(test.n_tokens for test in tests)
        caches = {model: target.run.new_cache(limit) for model, target in targets.items()}
        for model, target in targets.items():
            for progress, _ in prefill(target.model, token_ids(target, depth, "depth"), caches[model]):
                yield Running(f"{self.labels[model]}: filling the cache to d{depth}", progress.done, progress.total)
        for model, target in targets.items():
            for test in tests if self._tests.warmup else ():
                yield Running(f"{self.labels[model]}: {test.name}: warm-up", 0, 0)
                time_test(target, test, caches[model], token_ids(target, test.n_prompt or 1, "warm-up"))
        for number in rounds:
            for model, target in targets.items():
                for test in tests:  # so that a test of every model comes behind the same
                    yield Running(f"{self.labels[model]}: {test.name}", number, self._tests.repetitions)
                    ids = token_ids(target, test.n_tokens, str(number))
                    speed = test.n_tokens * 1e9 / time_test(target, test, caches[model], ids)
                    self.samples[model, test].append(speed)

    def _warn(self, warnings: Sequence[str]) -> None:
        self.warnings += [warning for warning in warnings if warning not in self.warnings]


def fit_together(runs: Sequence[ModelRun]) -> bool:
    """Whether all of them, each as it is planned alone, have room in one process."""
    plans = [run.plan for run in runs]
    base = max(plan.base_bytes for plan in plans)
    ram = base + sum(plan.ram_bytes - plan.base_bytes for plan in plans)
    vram = sum(plan.vram_bytes for plan in plans)
    return ram <= min(plan.budget for plan in plans) and (not vram or vram <= _vram_budget(runs[0]))


def _vram_budget(run: ModelRun) -> int:
    gpu = probe(run.store.folder).gpus[int(run.options.gpu_name.partition(":")[2] or 0)]
    most, asked = int(gpu.free * FREE_SHARE), run.options.vram
    wanted = parse_size("--vram", asked, gpu.total) if isinstance(asked, str) else asked
    return most if wanted is None else min(wanted, most)


def _labels(runs: Sequence[ModelRun], given: Sequence[str]) -> tuple[str, ...]:
    """name:variant, as the user gave it where two stores have the same; counted where one store comes again."""
    folders = [run.store.folder.resolve() for run in runs]
    names = [f"{run.store.manifest.name}:{run.store.manifest.variant}" for run in runs]
    stores = set(zip(names, folders, strict=True))
    labels = []
    for place, (name, folder) in enumerate(zip(names, folders, strict=True)):
        is_shared = sum(name == theirs for theirs, _ in stores) > 1
        again = folders[:place].count(folder)
        labels.append((given[place] if is_shared else name) + (f" #{again + 1}" if again else ""))
    return tuple(labels)


def _free(targets: dict[int, BenchTarget]) -> None:
    while targets:
        targets.popitem()[1].model.experts.close()  # what random tokens choose is not worth learning
    gc.collect()  # their memory is the next one's
