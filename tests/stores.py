"""Model stores for tests: made from tiny checkpoints by the real quantizer."""

from __future__ import annotations

from pathlib import Path

from mixlocal.app.catalog import VARIANTS, Variant
from mixlocal.app.install import pull
from mixlocal.app.model_run import open_experts
from mixlocal.app.progress import Step
from mixlocal.app.quantization import StoreJob
from mixlocal.app.quantize import QuantizeJob, quantize_checkpoint
from mixlocal.kernels import select
from mixlocal.model.arch import read_config
from mixlocal.model.config import ModelConfig
from mixlocal.model.load import load_trunk
from mixlocal.model.transformer import Transformer
from mixlocal.store.durable import make_folder
from mixlocal.store.manifest import Recipe
from mixlocal.store.model_store import ModelStore
from mixlocal.store.paths import Home
from mixlocal.store.strict_json import read_json_object


def quantized(
    checkpoint: Path,
    out: Path,
    variant: str = "q4",
    attention: str = "bf16",
    *,
    name: str = "tiny",
    template: str | None = None,
) -> ModelStore:
    recipe = Recipe(experts=VARIANTS[variant], scale_bits=16, attention=attention)  # type: ignore[arg-type]
    make_folder(out.parent)
    job = StoreJob(out, name, variant, recipe, template=template)
    for _ in quantize_checkpoint(QuantizeJob(checkpoint, job, checkpoint.name)):
        pass
    return ModelStore.open(out)


def install_smolmix(variant: Variant, folders: Home) -> tuple[ModelStore, list[Step]]:
    """Pull it if it is not there, and keep the checkpoint it is made of; and the steps that this took."""
    steps: list[Step] = []
    work = pull("smolmix", variant, folders, keep_source=True)
    while True:
        try:
            steps.append(next(work))
        except StopIteration as end:
            return end.value, steps


def load_model(store: ModelStore, config: ModelConfig, top_k: int | None = None) -> Transformer:
    """A store with all its experts in memory."""
    return Transformer(config, load_trunk(store, config), open_experts(store), select("cpu"), top_k)


def open_model(store: ModelStore, top_k: int | None = None) -> tuple[Transformer, ModelConfig]:
    path = store.folder / "config.json"
    config = read_config(read_json_object(path), str(path))
    return load_model(store, config, top_k), config
