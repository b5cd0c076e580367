"""A model store's trunk as weights of a transformer."""

from __future__ import annotations

import torch

from mixlocal.errors import CorruptError
from mixlocal.kernels import AttentionWeights
from mixlocal.model.config import ModelConfig
from mixlocal.model.tensors import EMBEDDING, FINAL_NORM, HEAD, TrunkTensor, trunk_tensors
from mixlocal.model.transformer import LayerWeights, TrunkWeights
from mixlocal.quant.format import QuantSpec, QuantTensor, Weight
from mixlocal.store.model_store import SCALES_SUFFIX, ModelStore


def load_trunk(store: ModelStore, config: ModelConfig, device: str = "cpu") -> TrunkWeights:
    """Read and check the trunk, and put it on `device`. Raises `CorruptError` if it does not fit the config."""
    arrays = {name: array.to(device) for name, array in store.read_trunk().items()}
    return trunk_weights(arrays, config, store.manifest.recipe.attention_spec, str(store.folder))


def trunk_weights(arrays: dict[str, torch.Tensor], config: ModelConfig, spec: QuantSpec, where: str) -> TrunkWeights:
    """The trunk from its arrays by name. Raises `CorruptError` beginning with `where` if they do not fit the config."""
    weights = {t.name: _weight(arrays, t, spec, where) for t in trunk_tensors(config)}

    def exact(name: str) -> torch.Tensor:
        weight = weights[name]
        assert isinstance(weight, torch.Tensor)
        return weight

    layers = tuple(
        LayerWeights(
            AttentionWeights(
                exact(f"layers.{i}.attention_norm"), *(weights[f"layers.{i}.attention.{x}"] for x in "qkvo")
            ),
            exact(f"layers.{i}.ffn_norm"),
            exact(f"layers.{i}.router"),
        )
        for i in range(config.n_layers)
    )
    head = weights[EMBEDDING if config.tied_embeddings else HEAD]
    return TrunkWeights(weights[EMBEDDING], layers, exact(FINAL_NORM), head)


def _weight(arrays: dict[str, torch.Tensor], tensor: TrunkTensor, spec: QuantSpec, where: str) -> Weight:
    array = arrays.get(tensor.name)
    if array is None or tuple(array.shape) != tensor.shape:
        raise CorruptError(f"{where}: trunk tensor {tensor.name} is missing or of the wrong shape")
    if not tensor.is_matrix or spec.kind != "int8":
        return array
    rows, columns = tensor.shape
    return QuantTensor(spec, (rows, columns), array, arrays[tensor.name + SCALES_SUFFIX])
