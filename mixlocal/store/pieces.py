"""Pieces: a store's two large files, divided by the tensor of the source that fills each part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from mixlocal.quant.format import ExpertLayouts
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.model_store import SCALES_SUFFIX, TRUNK_FILE
from mixlocal.store.shard_writer import TensorSpec, header_of, offsets_of


@dataclass(frozen=True, slots=True)
class Range:
    """`nbytes` of a piece at `offset` of a file, and the zeros between them and what comes next."""

    piece: str
    file: str
    offset: int
    nbytes: int
    padding: int = 0


def expert_piece(layer: int, expert: int, part: str) -> str:
    """Our name of w1, w2 or w3 of an expert."""
    return f"layers.{layer}.experts.{expert}.{part}"


def expert_of(piece: str) -> tuple[int, int, str]:
    """The layer, expert and matrix of what `expert_piece` named."""
    _, layer, _, expert, part = piece.split(".")
    return int(layer), int(expert), part


def piece_hasher(name: str) -> xxhash.xxh3_128:
    """Takes a piece's ranges in the order they lie in the file; the name is in it."""
    return xxhash.xxh3_128(f"{name}\0".encode())


def file_sizes(layouts: ExpertLayouts, trunk_specs: Sequence[TensorSpec]) -> dict[str, int]:
    """Bytes of the two large files of a store."""
    trunk = len(header_of(trunk_specs)) + sum(spec.nbytes for spec in trunk_specs)
    return {TRUNK_FILE: trunk, EXPERTS_FILE: layouts.nbytes}


class PieceMap:
    """Every byte of experts.bin, and every one of trunk.safetensors behind its header, belongs to one piece.

    ranges: by piece; its codes, then its scales where it has any.  sizes: of the files.
    """

    def __init__(self, layouts: ExpertLayouts, n_experts: int, trunk_specs: Sequence[TensorSpec]) -> None:
        self.header = header_of(trunk_specs)
        self.sizes = file_sizes(layouts, trunk_specs)
        self._layouts, self._n_experts = layouts, n_experts
        self.ranges: dict[str, tuple[Range, ...]] = dict(self._trunk_ranges(trunk_specs))
        self.trunk = tuple(self.ranges)
        for index in range(len(layouts)):
            self._add_record(index)

    def record(self, index: int) -> tuple[str, str, str]:
        """The pieces of one record: w1, w3, w2."""
        w1, w3, w2 = (expert_piece(*divmod(index, self._n_experts), part) for part in self._layouts[index].shapes)
        return w1, w3, w2

    def index(self, piece: str) -> int | None:
        """The record that a piece is part of, if it is not of the trunk."""
        first = self.ranges[piece][0]
        return self._layouts.at(first.offset) if first.file == EXPERTS_FILE else None

    def in_file_order(self, pieces: Iterable[str]) -> list[Range]:
        return sorted((part for piece in pieces for part in self.ranges[piece]), key=lambda part: part.offset)

    def _trunk_ranges(self, specs: Sequence[TensorSpec]) -> Iterator[tuple[str, tuple[Range, ...]]]:
        start = len(self.header)
        places = {
            spec.name: (start + offset, spec.nbytes) for spec, offset in zip(specs, offsets_of(specs), strict=True)
        }
        for name in places:
            if name.endswith(SCALES_SUFFIX) and name.removesuffix(SCALES_SUFFIX) in places:
                continue  # belongs to that tensor's piece
            arrays = (array for array in (name, name + SCALES_SUFFIX) if array in places)
            yield name, tuple(Range(name, TRUNK_FILE, *places[array]) for array in arrays)

    def _add_record(self, index: int) -> None:
        layout, start = self._layouts[index], self._layouts.offsets[index]
        names = dict(zip(layout.shapes, self.record(index), strict=True))
        parts = [part for part in layout.parts if part.nbytes]
        ends = [part.offset for part in parts[1:]] + [layout.stride]
        for part, end in zip(parts, ends, strict=True):
            name = names[part.name.partition(".")[0]]
            padding = end - part.offset - part.nbytes
            place = Range(name, EXPERTS_FILE, start + part.offset, part.nbytes, padding)
            self.ranges[name] = (*self.ranges.get(name, ()), place)
