"""What a store will hold, and from which tensors of its source: known from config.json and the recipe alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mixlocal.errors import RefusedError
from mixlocal.model.arch import Architecture, find_architecture
from mixlocal.model.config import ModelConfig
from mixlocal.model.tensors import HEAD, TrunkTensor, trunk_tensors
from mixlocal.quant.format import ExpertLayouts, QuantSpec
from mixlocal.store.checkpoint import TensorRef
from mixlocal.store.manifest import Recipe, expert_layouts
from mixlocal.store.model_store import SCALES_SUFFIX
from mixlocal.store.pieces import expert_of, expert_piece, file_sizes
from mixlocal.store.shard_writer import TensorSpec

READABLE = (torch.bfloat16, torch.float16, torch.float32)
SHOWN = 3  # names of each kind of difference


@dataclass(frozen=True, slots=True)
class Blueprint:
    """raw: what is in config.json.  architecture: its name, and `module` what it offers.

    trunk: the tensors outside the experts, by our name.  sources: the source's name of each tensor -> our name, in the
    order of the store.  store_bytes: of trunk.safetensors and experts.bin together.
    """

    raw: Mapping[str, Any]
    architecture: str
    module: Architecture
    config: ModelConfig
    recipe: Recipe
    layouts: ExpertLayouts
    trunk: Mapping[str, TrunkTensor]
    trunk_specs: tuple[TensorSpec, ...]
    sources: Mapping[str, str]
    store_bytes: int

    @classmethod
    def of(cls, raw: dict[str, Any], where: str, recipe: Recipe) -> Blueprint:
        """From a config.json that was read from `where`. Raises `RefusedError` for what we cannot compute or pack."""
        architecture, module = find_architecture(raw, where)
        config = module.read_config(raw, where)
        n_records = config.n_layers * config.router.n_experts
        layouts = expert_layouts(config.dim, config.expert_hidden, recipe, n_records)
        for part, shape in layouts[0].shapes.items():
            recipe.expert_spec.check_shape(module.expert_source(0, 0, part), shape)
        trunk = {tensor.name: tensor for tensor in trunk_tensors(config)}
        specs = tuple(spec for tensor in trunk.values() for spec in _trunk_specs(tensor, recipe.attention_spec))
        sizes = file_sizes(layouts, specs)
        return cls(
            raw, architecture, module, config, recipe, layouts, trunk, specs,
            dict(_sources(module, config, layouts, trunk)), sum(sizes.values()),
        )  # fmt: skip

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, by our name."""
        if name in self.trunk:
            return self.trunk[name].shape
        return self.layouts[0].shapes[name.rpartition(".")[2]]

    def spec(self, name: str) -> QuantSpec | None:
        """How a tensor, by our name, is written; None: as float32."""
        if name not in self.trunk:
            layer, expert, part = expert_of(name)
            return self.layouts[layer * self.config.router.n_experts + expert].spec_of(part)
        return self.recipe.attention_spec if self.trunk[name].is_matrix else None

    def check_tensors(self, where: str, tensors: Mapping[str, TensorRef]) -> None:
        """Raises one `RefusedError` that names every kind of difference between the tensors of `where` and these."""
        expected = self.sources.keys()
        extra = tensors.keys() - expected
        if self.config.tied_embeddings:
            extra -= {self.module.trunk_source(HEAD)}  # some writers store the tied head once more
        wanted = [(tensors[name], self.shape(ours)) for name, ours in self.sources.items() if name in tensors]
        shapes = [f"{r.name} {list(r.shape)} instead of {list(shape)}" for r, shape in wanted if r.shape != shape]
        types = [f"{ref.name} {ref.dtype}" for ref, _ in wanted if ref.dtype not in READABLE]
        problems = [
            *_problem(sorted(expected - tensors.keys()), "missing"),
            *_problem(sorted(extra), "unexpected"),
            *_problem(shapes, "of the wrong shape"),
            *_problem(types, "of a type that is no weight"),
        ]
        if problems:
            raise RefusedError(f"{where}: tensors do not match config.json: {'; '.join(problems)}")


def _problem(names: list[str], what: str) -> Iterable[str]:
    if names:
        yield f"{len(names)} {what}: {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"


def _trunk_specs(tensor: TrunkTensor, spec: QuantSpec) -> Iterator[TensorSpec]:
    if not tensor.is_matrix:
        yield TensorSpec(tensor.name, torch.float32, tensor.shape)
        return
    if spec.kind != "bf16":
        yield TensorSpec(tensor.name + SCALES_SUFFIX, spec.scale_dtype, spec.scales_shape(tensor.matrix))
    yield TensorSpec(tensor.name, spec.code_dtype, spec.codes_shape(tensor.matrix))


def _sources(
    module: Architecture, config: ModelConfig, layouts: ExpertLayouts, trunk: Mapping[str, TrunkTensor]
) -> Iterator[tuple[str, str]]:
    for name in trunk:
        yield module.trunk_source(name), name
    for layer in range(config.n_layers):
        for expert in range(config.router.n_experts):
            for part in layouts[0].shapes:
                yield module.expert_source(layer, expert, part), expert_piece(layer, expert, part)
