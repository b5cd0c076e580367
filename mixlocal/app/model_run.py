"""A model store as it will be run: checked against its config and this machine before anything large is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from mixlocal.app.budgets import RunOptions, check_context, check_top_k, plan_notes, plan_run
from mixlocal.app.footprint import stored_bytes, with_shorter_passes
from mixlocal.app.hardware import probe
from mixlocal.errors import MemoryBudgetError, RefusedError, UsageError
from mixlocal.experts.device import CudaDevice
from mixlocal.experts.offloaded import OffloadedExperts, TierSlots
from mixlocal.experts.plan import MemoryPlan
from mixlocal.experts.profile import RoutingProfile, learn, load_profile, save_profile
from mixlocal.experts.resident import ResidentExperts
from mixlocal.experts.runtime import ExpertRuntime
from mixlocal.experts.tiered import TieredExperts
from mixlocal.kernels import select
from mixlocal.kernels.isa import MISSING, set_threads
from mixlocal.model.arch import read_config
from mixlocal.model.config import ModelConfig
from mixlocal.model.kv_cache import KV_DTYPES, KVCache, KVPool, own_cache, page_count
from mixlocal.model.load import load_trunk
from mixlocal.model.transformer import Transformer, TrunkWeights
from mixlocal.store.manifest import MANIFEST
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home
from mixlocal.store.strict_json import read_json_object

# Seen with smolmix on two cores, PyTorch against avx512vnni: 18.6 and 103 tok/s at 8 bits, 2.7 and 131 at 4.
REFERENCE_COST = "PyTorch computes instead, 5 times slower at 8 bits, 50 at 4"
NO_KERNELS_COST = f"{REFERENCE_COST}: install a C++ compiler, then run install.sh again"
Wrap = Callable[[ExpertRuntime, TrunkWeights], ExpertRuntime]


class ModelRun:
    """`load` it once; `new_cache` as often as there are sequences; `finish` when all is done. `warnings` are for the
    user."""

    def __init__(self, store: ModelStore, options: RunOptions, folders: Home | None = None) -> None:
        """folders: where what is learnt of the model's routing is kept; nowhere without.

        Raises `UsageError` for an option the model does not have, `MemoryBudgetError` if it does not fit.
        """
        hardware = probe(store.folder)
        set_threads(hardware.cores if options.threads is None else options.threads)
        self.store, self.options = store, options
        self.config = store_config(store)
        self.kv_dtype = kv_dtype(options.kv_dtype)
        self.warnings = _warnings(self.config, options)
        _check_shape(store, self.config)
        check_context(self.config, options.context)
        needs = stored_bytes(store.manifest, self.config, self.kv_dtype)
        self.plan = plan_run(with_shorter_passes(needs, self.config, store.manifest.recipe), hardware, options)
        self.device = options.gpu_name if self.plan.on_gpu else "cpu"
        self.warnings += plan_notes(self.plan, hardware, self.config, options)
        manifest = store.manifest
        self._profile_path = folders.profile(manifest.name, manifest.variant) if folders else None
        self._experts: ExpertRuntime | None = None
        self._profile: RoutingProfile | None = None

    @property
    def context(self) -> int:
        """Tokens that a sequence may have."""
        return self.plan.context

    def load(self, wrap: Wrap | None = None) -> Transformer:
        """Trunk and experts, checked as they are read. With less memory than planned, fewer experts stay, aloud.

        wrap: puts something around the experts that are opened.
        """
        if self._profile_path is not None:
            self._profile = load_profile(self._profile_path, self.config.n_layers, self.config.router.n_experts)
        trunk = load_trunk(self.store, self.config, self.device)
        self._experts = self._open_experts()
        experts = wrap(self._experts, trunk) if wrap else self._experts
        top_k, chunk = self.options.experts_per_token, self.plan.chunk
        return Transformer(self.config, trunk, experts, select(self.device), top_k, chunk)

    def new_cache(self, limit: int) -> KVCache:
        """An empty cache for up to `limit` tokens."""
        return own_cache(self.config, limit, self.kv_dtype, self.device)

    def new_pool(self) -> KVPool:
        """For the caches of all sequences that run at once, each with up to `context` tokens."""
        return KVPool(self.config, page_count(self.plan.kv_tokens), self.kv_dtype, self.device)

    def finish(self) -> None:
        """Let go of the experts and keep what was learnt of the routing. Does nothing the second time.

        Raises what writing a file can raise; all that is lost then is a warm start.
        """
        experts, self._experts = self._experts, None
        if experts is None:
            return
        experts.close()
        profile = learn(experts.trace, self._profile) if self._profile_path else None
        if profile is not None and self._profile_path is not None:
            save_profile(self._profile_path, profile)

    def _open_experts(self) -> ExpertRuntime:
        plan = self.plan
        while True:
            try:
                return open_experts(self.store, plan, self._profile, self.device, lookahead=self.options.lookahead)
            except MemoryBudgetError:
                fewer = max(self.config.router.n_experts, plan.ram_slots * 3 // 4)
                if fewer == plan.ram_slots:
                    raise
                plan = replace(plan, ram_slots=fewer)
            self.warnings += (f"the system gives less memory than it says is free: room for {fewer} experts",)
            self.plan = plan


def open_experts(
    store: ModelStore,
    plan: MemoryPlan | None = None,
    profile: RoutingProfile | None = None,
    device: str = "cpu",
    *,
    lookahead: bool = True,
) -> ExpertRuntime:
    """A store's experts as `plan` says; without one, all in memory."""
    file, kernels = store.experts(direct=plan is not None and plan.direct_io), select("cpu")
    if plan is not None and plan.on_gpu:
        slots = TierSlots(plan.gpu_slots, plan.staging_slots, plan.ram_slots)
        return OffloadedExperts(file, kernels, CudaDevice(device), slots, profile, lookahead=lookahead)
    if plan is not None and not plan.all_in_ram:
        return TieredExperts(file, kernels, plan.ram_slots, profile, lookahead=lookahead)
    try:
        return ResidentExperts(file, kernels)
    finally:
        file.close()


def store_config(store: ModelStore) -> ModelConfig:
    path = store.folder / "config.json"
    return read_config(read_json_object(path), str(path))


def kv_dtype(name: str) -> torch.dtype:
    if name not in KV_DTYPES:
        raise UsageError(f"--kv-dtype {name!r} is none of {', '.join(KV_DTYPES)}")
    return KV_DTYPES[name]


def _warnings(config: ModelConfig, options: RunOptions) -> tuple[str, ...]:
    return (
        *((f"no compiled kernels ({MISSING}): {NO_KERNELS_COST}",) if MISSING else ()),
        *_top_k_warning(config, options),
    )


def _top_k_warning(config: ModelConfig, options: RunOptions) -> tuple[str, ...]:
    count, trained = options.experts_per_token, config.router.top_k
    check_top_k(config, count)
    if count is None or count == trained:
        return ()
    effect = "more reduces quality and speed" if count > trained else "fewer reduces quality and is faster"
    return (f"{count} experts per token; the model was trained with {trained}: {effect}",)


def _check_shape(store: ModelStore, config: ModelConfig) -> None:
    manifest = store.manifest
    ours = (config.dim, config.expert_hidden, config.n_layers, config.router.n_experts)
    if ours != (manifest.dim, manifest.hidden, manifest.n_layers, manifest.n_experts):
        raise RefusedError(
            f"{store.folder}: config.json and {MANIFEST} are of different models", "pull the model again"
        )
