"""What a run may use of this machine, and what its user should hear about that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil

from mixlocal.app.hardware import Gpu, Hardware
from mixlocal.app.sizes import parse_size
from mixlocal.errors import MemoryBudgetError, UsageError
from mixlocal.experts.plan import PREFILL_CHUNK, Budgets, MemoryPlan, ModelBytes, plan_memory
from mixlocal.kernels import select
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import DEFAULT_KV_DTYPE

FREE_SHARE = 0.95  # of the memory that nobody uses: what one takes when not told, so that the system keeps some


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a model.

    context: tokens, at most the model's own; None for what the memory holds. experts_per_token: None for what the model
    was trained with. threads: None for every physical core this process may use. kv_dtype: a key of `KV_DTYPES`. ram:
    what the whole process may use, in bytes or as people write it ("12G", "80%"); None for all that is free. device:
    "cpu", "cuda", "cuda:N", or "auto" for a GPU if there is one that holds what is outside the experts. vram: as ram,
    of the GPU. lookahead: read what the next layer is thought to need, where it pays. sequences: the most that are
    computed at once; they share the KV cache's memory. beside: bytes of `ram` that the caller needs for itself.
    """

    context: int | None = None
    experts_per_token: int | None = None
    threads: int | None = None
    kv_dtype: str = DEFAULT_KV_DTYPE
    ram: int | str | None = None
    device: str = "auto"
    vram: int | str | None = None
    lookahead: bool = True
    sequences: int = 1
    beside: int = 0

    @property
    def gpu_name(self) -> str:
        """The GPU meant, if one is used."""
        return "cuda:0" if self.device == "auto" else self.device


def plan_run(models: Sequence[ModelBytes], hardware: Hardware, options: RunOptions) -> MemoryPlan:
    """What lies where. models: the same one with ever smaller temporaries; the first that fits is taken. With the
    device left to us, none of which fits a GPU that is there, it is planned without.

    Raises `MemoryBudgetError` if it cannot run, `UsageError` for a device or size that makes no sense.
    """
    budgets = _budgets(hardware, options)
    choices = [budgets]
    if options.device == "auto" and options.vram is None and budgets.vram is not None:
        choices.append(replace(budgets, vram=None))
    refusals = []
    for choice in choices:
        for model in models:
            try:
                return plan_memory(model, choice)
            except MemoryBudgetError as error:
                refusals.append(error)
    raise refusals[-1]


def plan_notes(plan: MemoryPlan, hardware: Hardware, config: ModelConfig, options: RunOptions) -> tuple[str, ...]:
    """What a user should hear about a plan before its first token."""
    notes = []
    wanted = _size("--ram", options.ram, hardware.ram_total)
    if wanted is not None and wanted > plan.budget:
        notes.append(f"--ram is {wanted / 1e9:.1f} GB and {plan.budget / 1e9:.1f} GB are free: using those")
    if plan.disk_records:
        notes.append(
            f"{plan.gpu_slots + plan.ram_slots} of {plan.n_records} experts fit in memory; the others are read from "
            "disk when they are chosen (mixlocal plan tells how fast that is)"
        )
    if hardware.gpus and options.device == "auto" and not plan.on_gpu:
        why = gpu_trouble(options) or "it has no room for what is outside the experts"
        notes.append(f"{hardware.gpus[0].name} is not used: {why}")
    if plan.chunk < PREFILL_CHUNK:
        notes.append(f"memory is tight: prompts are read {plan.chunk} tokens at a time, which is slower")
    if options.context is None and plan.context < config.max_context:
        notes.append(
            f"the context is {plan.context} tokens of the model's {config.max_context}, so that more experts fit; "
            "--ctx sets another"
        )
    return tuple(notes)


def check_context(config: ModelConfig, context: int | None) -> None:
    """Raises `UsageError` for a context that the model does not have."""
    if context is not None and not 1 <= context <= config.max_context:
        raise UsageError(f"--ctx {context} is outside 1 to {config.max_context}, the model's own context")


def check_top_k(config: ModelConfig, count: int | None) -> None:
    """Raises `UsageError` for experts per token that a layer does not have."""
    if count is not None and not 1 <= count <= config.router.n_experts:
        raise UsageError(
            f"--experts-per-token {count} is outside 1 to {config.router.n_experts}, the experts of a layer"
        )


def _budgets(hardware: Hardware, options: RunOptions) -> Budgets:
    free = hardware.ram_free + psutil.Process().memory_info().rss  # what this process has taken already is its own
    gpu = _gpu(hardware, options)
    ram = _within("--ram", options.ram, hardware.ram_total, free)
    vram = _within("--vram", options.vram, gpu.total, gpu.free) if gpu else None
    return Budgets(ram, free, vram, options.context, options.sequences, options.beside)


def _gpu(hardware: Hardware, options: RunOptions) -> Gpu | None:
    """The one to use. Raises `UsageError` if a certain one is asked for and not there, or VRAM where there is none."""
    if options.device != "auto":
        select(options.device)
    if options.device == "cpu" or (options.device == "auto" and (not hardware.gpus or gpu_trouble(options))):
        if options.vram is not None:
            raise UsageError("--vram needs a GPU, and none is used", "mixlocal doctor tells what this machine has")
        return None
    return hardware.gpus[int(options.gpu_name.partition(":")[2] or 0)]


def gpu_trouble(options: RunOptions) -> str:
    """Why the GPU meant cannot be computed on; empty if it can."""
    try:
        select(options.gpu_name)
    except UsageError as error:
        return f"{error.message} ({error.hint})"
    return ""


def _within(option: str, asked: int | str | None, whole: int, free: int) -> int:
    most = int(free * FREE_SHARE)
    wanted = _size(option, asked, whole)
    return most if wanted is None else min(wanted, most)


def _size(option: str, asked: int | str | None, whole: int) -> int | None:
    """Bytes of a size or of a share of `whole`. Raises `UsageError` for what is neither."""
    return parse_size(option, asked, whole) if isinstance(asked, str) else asked
