"""A model store as it will be run: checked against its config and this machine before anything large is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixlocal.app.hardware import probe
from mixlocal.errors import RefusedError, UsageError
from mixlocal.experts.plan import MemoryPlan, ModelBytes, plan_memory
from mixlocal.experts.resident import ResidentExperts
from mixlocal.experts.runtime import ExpertRuntime
from mixlocal.experts.tiered import TieredExperts
from mixlocal.kernels import Kernels, select
from mixlocal.kernels.isa import MISSING, set_threads
from mixlocal.model.arch import read_config
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import DEFAULT_KV_DTYPE, KV_DTYPES, KVCache, kv_bytes_per_token
from mixlocal.model.load import load_trunk
from mixlocal.model.transformer import Transformer
from mixlocal.store.manifest import MANIFEST
from mixlocal.store.model_store import TRUNK_FILE, ModelStore
from mixlocal.store.strict_json import read_json_object

# Seen with smolmix on two cores, PyTorch against avx512vnni: 18.6 and 103 tok/s at 8 bits, 2.7 and 131 at 4.
REFERENCE_COST = "PyTorch computes instead, 5 times slower at 8 bits, 50 at 4"
NO_KERNELS_COST = f"{REFERENCE_COST}: install a C++ compiler, then run install.sh again"
PLANNED_CONTEXT = 4096  # tokens of KV cache counted before loading when no context was asked for


@dataclass(frozen=True, slots=True)
class RunOptions:
    """context: tokens, at most the model's own. experts_per_token: None for what the model was trained with.
    threads: None for every physical core this process may use. kv_dtype: a key of `KV_DTYPES`. ram: bytes that the
    whole process may use; None for all that is free."""

    context: int | None = None
    experts_per_token: int | None = None
    threads: int | None = None
    kv_dtype: str = DEFAULT_KV_DTYPE
    ram: int | None = None


class ModelRun:
    """`load` it once; `new_cache` as often as there are sequences. `warnings` are for the user."""

    def __init__(self, store: ModelStore, options: RunOptions) -> None:
        """Raises `UsageError` for an option the model does not have, `MemoryBudgetError` if it does not fit."""
        hardware = probe(store.folder)
        set_threads(hardware.cores if options.threads is None else options.threads)
        self.store, self.options = store, options
        self.config = store_config(store)
        self.context = _context(self.config, options)
        self.kv_dtype = _kv_dtype(options)
        self.warnings = _warnings(self.config, options)
        _check_shape(store, self.config)
        ram = hardware.ram_free if options.ram is None else min(options.ram, hardware.ram_free)
        if options.ram is not None and options.ram > hardware.ram_free:
            self.warnings += (f"--ram is {options.ram / 1e9:.1f} GB and {ram / 1e9:.1f} GB are free: using those",)
        self.plan = plan_memory(
            model_bytes(store, self.config, options.context, self.kv_dtype), store.manifest.name, ram
        )
        if not self.plan.all_resident:
            self.warnings += (_disk_tier_note(store, self.plan),)

    def load(self) -> Transformer:
        """Trunk and experts, checked as they are read."""
        return load_model(self.store, self.config, self.options.experts_per_token, self.plan)

    def new_cache(self, limit: int) -> KVCache:
        """An empty cache for up to `limit` tokens."""
        return KVCache(self.config, limit, self.kv_dtype)


def store_config(store: ModelStore) -> ModelConfig:
    path = store.folder / "config.json"
    return read_config(read_json_object(path), str(path))


def load_model(
    store: ModelStore, config: ModelConfig, top_k: int | None = None, plan: MemoryPlan | None = None
) -> Transformer:
    """A store's trunk, and its experts as `plan` says; without one, all in memory."""
    kernels = select("cpu")
    return Transformer(config, load_trunk(store, config), _open_experts(store, kernels, plan), kernels, top_k)


def _open_experts(store: ModelStore, kernels: Kernels, plan: MemoryPlan | None) -> ExpertRuntime:
    file = store.experts()
    if plan is not None and not plan.all_resident:
        return TieredExperts(file, kernels, plan.ram_slots)
    try:
        return ResidentExperts(file, kernels)
    finally:
        file.close()


def model_bytes(store: ModelStore, config: ModelConfig, context: int | None, kv_dtype: torch.dtype) -> ModelBytes:
    """What running `store` takes."""
    manifest = store.manifest
    tokens = context or min(config.max_context, PLANNED_CONTEXT)
    return ModelBytes(
        trunk=manifest.files[TRUNK_FILE].nbytes,
        kv=tokens * kv_bytes_per_token(config, kv_dtype),
        context=tokens,
        n_records=len(manifest.records),
        record_bytes=manifest.stride,
        layer_records=manifest.n_experts,
    )


def _disk_tier_note(store: ModelStore, plan: MemoryPlan) -> str:
    total = len(store.manifest.records)
    return f"{plan.ram_slots} of {total} experts fit in memory; the others are read from disk when they are chosen"


def _context(config: ModelConfig, options: RunOptions) -> int:
    if options.context is None:
        return config.max_context
    if not 1 <= options.context <= config.max_context:
        raise UsageError(f"--ctx {options.context} is outside 1 to {config.max_context}, the model's own context")
    return options.context


def _kv_dtype(options: RunOptions) -> torch.dtype:
    if options.kv_dtype not in KV_DTYPES:
        raise UsageError(f"--kv-dtype {options.kv_dtype!r} is none of {', '.join(KV_DTYPES)}")
    return KV_DTYPES[options.kv_dtype]


def _warnings(config: ModelConfig, options: RunOptions) -> tuple[str, ...]:
    return (
        *((f"no compiled kernels ({MISSING}): {NO_KERNELS_COST}",) if MISSING else ()),
        *_top_k_warning(config, options),
    )


def _top_k_warning(config: ModelConfig, options: RunOptions) -> tuple[str, ...]:
    count, trained = options.experts_per_token, config.router.top_k
    if count is None or count == trained:
        return ()
    if not 1 <= count <= config.router.n_experts:
        raise UsageError(
            f"--experts-per-token {count} is outside 1 to {config.router.n_experts}, the experts of a layer"
        )
    effect = "more reduces quality and speed" if count > trained else "fewer reduces quality and is faster"
    return (f"{count} experts per token; the model was trained with {trained}: {effect}",)


def _check_shape(store: ModelStore, config: ModelConfig) -> None:
    manifest = store.manifest
    ours = (config.dim, config.expert_hidden, config.n_layers, config.router.n_experts)
    if ours != (manifest.dim, manifest.hidden, manifest.n_layers, manifest.n_experts):
        raise RefusedError(
            f"{store.folder}: config.json and {MANIFEST} are of different models", "pull the model again"
        )
