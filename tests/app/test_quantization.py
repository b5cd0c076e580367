"""Tensors in any order, from source files that prove whole late, wrong or never: one store, or none."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch

from mixlocal.app import quantization as module
from mixlocal.app.blueprint import Blueprint
from mixlocal.app.quantization import Quantization, StoreJob
from mixlocal.app.quantize import QuantizeJob, quantize_checkpoint, read_small_files
from mixlocal.errors import CorruptError, DiskFullError, RefusedError
from mixlocal.store import durable
from mixlocal.store.building import Origin, building_folder, journal_path
from mixlocal.store.checkpoint import Checkpoint, TensorRef, read_tensor
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.manifest import Recipe, read_manifest
from mixlocal.store.model_store import TRUNK_FILE
from mixlocal.store.pieces import PieceMap

RECIPES = {
    "q4": Recipe("nf4", 16, "bf16"), "q4-32": Recipe("fp4", 32, "int8"), "q8": Recipe("int8", 16, "bf16"),
    "q8-int8": Recipe("int8", 16, "int8"), "bf16": Recipe("bf16", 16, "bf16"),
}  # fmt: skip
W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
SHA = "0" * 64


@dataclass(frozen=True)
class Case:
    """A checkpoint, and its store made in one go."""

    checkpoint: Checkpoint
    recipe: Recipe
    whole: Path

    @property
    def refs(self) -> list[TensorRef]:
        return list(self.checkpoint.tensors.values())

    @property
    def blueprint(self) -> Blueprint:
        return Blueprint.of(self.checkpoint.config, "config.json", self.recipe)

    def into(self, out: Path, fingerprint: str = "") -> Quantization:
        return Quantization(StoreJob(out, "tiny", "variant", self.recipe), self.blueprint, fingerprint)

    def finish(self, quantization: Quantization) -> None:
        """Nothing may be lacking; the store must have the bytes of the one made in one go."""
        source = read_manifest(self.whole).source
        quantization.finish(source, read_small_files(self.checkpoint.folder))
        assert contents(quantization.job.out) == contents(self.whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def case_of(root: Path, recipe: Recipe, **changes: object) -> Case:
    checkpoint = tiny.write_checkpoint(root / "checkpoint", **changes)
    job = StoreJob(root / "whole", "tiny", "variant", recipe)
    for _ in quantize_checkpoint(QuantizeJob(checkpoint, job, "tiny")):
        pass
    return Case(Checkpoint(checkpoint), recipe, root / "whole")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Widths that leave padding between the parts of a record."""
    root = tmp_path_factory.mktemp("quantization")
    return case_of(root, RECIPES["q4-32"], hidden_size=16, intermediate_size=10, vocab_size=20)


def split(refs: Iterable[TensorRef], rng: random.Random, shards: int = 4) -> dict[str, list[tuple[TensorRef, Origin]]]:
    """The tensors of a model, cut anew into source files."""
    cut: dict[str, list[tuple[TensorRef, Origin]]] = {f"shard-{i}": [] for i in range(shards)}
    ends = dict.fromkeys(cut, 0)
    for ref in rng.sample(list(refs), k=len(list(refs))):
        shard = rng.choice(list(cut))
        ends[shard] += ref.nbytes
        cut[shard].append((ref, Origin(shard, ends[shard])))
    return cut


def add_all(quantization: Quantization, refs: Iterable[tuple[TensorRef, Origin | None]]) -> None:
    """Each in memory that is used for something else at once."""
    for ref, origin in refs:
        if quantization.lacks(ref.name):
            tensor = read_tensor(ref)
            quantization.add(ref, tensor, origin)
            assert not quantization.lacks(ref.name)
            tensor.fill_(7)


def mixed(shards: Mapping[str, list[tuple[TensorRef, Origin]]], rng: random.Random) -> list[tuple[TensorRef, Origin]]:
    every = [piece for pieces in shards.values() for piece in pieces]
    return rng.sample(every, k=len(every))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tied", [False, True])
def test_any_order_gives_the_same_bytes(name: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(tmp_path, RECIPES[name], tie_word_embeddings=tied)
    for seed in range(4):
        monkeypatch.setattr(module, "SLOT_BYTES", seed % 2 << 20)  # 0: the trunk's tensors find no buffer large enough
        rng = random.Random(seed)
        shards = split(case.refs, rng)
        with case.into(tmp_path / f"{seed}") as quantization:
            add_all(quantization, mixed(shards, rng))
            for shard in shards:
                quantization.accept(shard, SHA)
            case.finish(quantization)


def test_the_sizes_are_known_beforehand(case: Case) -> None:
    sizes = [(case.whole / name).stat().st_size for name in (TRUNK_FILE, EXPERTS_FILE)]
    assert case.blueprint.store_bytes == sum(sizes)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_interrupts_it_the_bytes_are_the_same(seed: int, case: Case, tmp_path: Path) -> None:
    """Sessions that end anywhere, shards that are accepted, lost in part or found wrong: then everything comes."""
    rng = random.Random(seed)
    shards = split(case.refs, rng)
    for _ in range(5):
        with case.into(tmp_path / "out") as quantization:
            add_all(quantization, mixed(shards, rng)[: rng.randrange(20)])
            shard = rng.choice(list(shards))
            end = max((origin.end for _, origin in shards[shard]), default=0)
            match rng.randrange(3):
                case 0:
                    quantization.revoke(shard, rng.randrange(end + 1))
                case 1 if not any(quantization.lacks(ref.name) for ref, _ in shards[shard]):
                    quantization.accept(shard, SHA)
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, mixed(shards, rng))
        for shard in shards:
            quantization.accept(shard, SHA)
        case.finish(quantization)


def test_pieces_of_a_shard_on_its_way_survive_but_do_not_count(case: Case, tmp_path: Path) -> None:
    shards = split(case.refs, random.Random(1))
    first = next(iter(shards))
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, shards[first])
    with case.into(tmp_path / "out") as quantization:
        assert not any(quantization.lacks(ref.name) for ref, _ in shards[first])
        assert quantization.accepted(first) is None
        for shard in shards.keys() - {first}:
            add_all(quantization, shards[shard])
            quantization.accept(shard, SHA)
        with pytest.raises(AssertionError, match="was not accepted"):
            case.finish(quantization)
        assert not (tmp_path / "out").exists()
        quantization.accept(first, SHA)
        assert quantization.accepted(first) == SHA
        case.finish(quantization)


def test_a_store_that_lacks_a_tensor_is_not_published(case: Case, tmp_path: Path) -> None:
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, [(ref, None) for ref in case.refs if ref.name != W1])
        with pytest.raises(AssertionError, match=r"layers\.1\.experts\.2\.w1 is missing"):
            case.finish(quantization)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("again", [False, True])
def test_revoking_takes_back_what_needed_later_bytes(again: bool, case: Case, tmp_path: Path) -> None:
    """In this session and in the next."""
    rng = random.Random(2)
    shards = split(case.refs, rng, shards=2)
    one, other = shards
    beyond = sorted(origin.end for _, origin in shards[one])[len(shards[one]) // 2]
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, mixed(shards, rng))
        quantization.accept(one, SHA)
        quantization.accept(other, SHA)
        quantization.revoke(one, beyond)
        if not again:
            check_revoked(quantization, shards[one], beyond)
    with case.into(tmp_path / "out") as quantization:
        check_revoked(quantization, shards[one], beyond)
        assert quantization.accepted(other) == SHA
        assert not any(quantization.lacks(ref.name) for ref, _ in shards[other])
        add_all(quantization, shards[one])
        quantization.accept(one, SHA)
        case.finish(quantization)


def check_revoked(quantization: Quantization, shard: list[tuple[TensorRef, Origin]], beyond: int) -> None:
    assert [quantization.lacks(ref.name) for ref, _ in shard] == [origin.end > beyond for _, origin in shard]
    assert quantization.accepted(shard[0][1].shard) is None


def test_wrong_bytes_that_were_revoked_leave_no_trace(case: Case, tmp_path: Path) -> None:
    with case.into(tmp_path / "out") as quantization:
        for ref in case.refs:
            quantization.add(ref, torch.full(ref.shape, 0.5, dtype=ref.dtype), Origin("wrong", 1))
        quantization.revoke("wrong")
        add_all(quantization, [(ref, Origin("right", 1)) for ref in case.refs])
        quantization.accept("right", SHA)
        case.finish(quantization)


def test_a_piece_that_comes_after_the_proof_needs_another(case: Case, tmp_path: Path) -> None:
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, [(ref, Origin("a", 1)) for ref in case.refs[1:]])
        quantization.accept("a", SHA)
        add_all(quantization, [(case.refs[0], Origin("a", 1))])
        quantization.settle()
        assert quantization.accepted("a") is None
    with case.into(tmp_path / "out") as quantization:
        assert quantization.accepted("a") is None
        quantization.accept("a", SHA)
        case.finish(quantization)


def test_a_journal_cut_anywhere_costs_only_what_it_no_longer_says(case: Case, tmp_path: Path) -> None:
    rng = random.Random(3)
    shards = split(case.refs, rng, shards=2)
    out = tmp_path / "out"
    with case.into(out) as quantization:
        for shard, pieces in shards.items():
            add_all(quantization, pieces)
            quantization.accept(shard, SHA)
    journal = journal_path(out).read_bytes()
    whole, kept = journal.splitlines(keepends=True), []
    for length in sorted(rng.sample(range(len(journal)), k=30)):
        journal_path(out).write_bytes(journal[:length] + b"0123 {" * rng.randrange(2))
        lines = len(journal[:length].splitlines(keepends=True)) - (length not in ends_of(whole))
        with case.into(out) as quantization:
            kept.append(sum(not quantization.lacks(ref.name) for ref in case.refs))
            assert kept[-1] == sum(b'"piece"' in line for line in whole[:lines])
            add_all(quantization, mixed(shards, rng))
            for shard in shards:
                quantization.accept(shard, SHA)
            quantization._building.check_complete()
    assert kept == sorted(kept)
    with case.into(out) as quantization:
        case.finish(quantization)


def ends_of(lines: list[bytes]) -> set[int]:
    return {sum(map(len, lines[:count])) for count in range(len(lines) + 1)}


@pytest.mark.parametrize("name", [EXPERTS_FILE, TRUNK_FILE])
def test_a_flipped_bit_costs_one_piece_and_the_proof_of_its_shard(name: str, case: Case, tmp_path: Path) -> None:
    """Wherever it is: there is no byte that no piece answers for, but for the trunk's header, which is written anew."""
    rng = random.Random(4)
    out, blueprint = tmp_path / "out", case.blueprint
    shards = split(case.refs, rng, shards=3)
    with case.into(out) as quantization:
        add_all(quantization, mixed(shards, rng))
        for shard in shards:
            quantization.accept(shard, SHA)
    where = {ref.name: origin.shard for pieces in shards.values() for ref, origin in pieces}
    places = PieceMap(blueprint.layouts, 4, blueprint.trunk_specs)
    path = building_folder(out) / name
    for _ in range(40):
        flip(path, at := rng.randrange(path.stat().st_size), rng.randrange(8))
        hit = [
            source
            for source, ours in blueprint.sources.items()
            for place in places.ranges[ours]
            if place.file == name and place.offset <= at < place.offset + place.nbytes + place.padding
        ]
        assert len(hit) == (name == EXPERTS_FILE or at >= len(places.header))
        with case.into(out) as quantization:
            assert [ref.name for ref in case.refs if quantization.lacks(ref.name)] == hit
            for shard in shards:
                assert (quantization.accepted(shard) is None) == (shard in map(where.get, hit))
            add_all(quantization, mixed(shards, rng))
            for shard in shards:
                quantization.accept(shard, SHA)
    with case.into(out) as quantization:
        case.finish(quantization)


def flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("change", ["fingerprint", "name", "recipe"])
def test_the_work_on_another_source_or_store_is_not_continued(change: str, case: Case, tmp_path: Path) -> None:
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, [(case.refs[0], None)])
    recipe = RECIPES["q8"] if change == "recipe" else case.recipe
    job = StoreJob(tmp_path / "out", "other" if change == "name" else "tiny", "variant", recipe)
    blueprint = Blueprint.of(case.checkpoint.config, "config.json", recipe)
    with Quantization(job, blueprint, "other" if change == "fingerprint" else "") as quantization:
        assert quantization.lacks(case.refs[0].name)


def test_fresh_begins_again(case: Case, tmp_path: Path) -> None:
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, [(case.refs[0], None)])
    job = StoreJob(tmp_path / "out", "tiny", "variant", case.recipe, fresh=True)
    with Quantization(job, case.blueprint, "") as quantization:
        assert quantization.lacks(case.refs[0].name)


def test_a_full_disk_is_told_again_and_again(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that failed in another thread cannot be passed over."""

    def full(name: str, nbytes: int) -> int:
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return nbytes

    def fill_the_disk() -> None:
        with case.into(tmp_path / "out") as quantization:
            monkeypatch.setattr(durable, "on_call", full)
            quantization.add(case.refs[0], read_tensor(case.refs[0]))
            for action in (quantization.settle, quantization.settle, lambda: quantization.accept("a", SHA)):
                with pytest.raises(DiskFullError):
                    action()
            with pytest.raises(DiskFullError):
                quantization.add(case.refs[1], read_tensor(case.refs[1]))

    with pytest.raises(DiskFullError):
        fill_the_disk()
    monkeypatch.undo()
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, [(ref, None) for ref in case.refs])
        case.finish(quantization)


@pytest.mark.parametrize("name", [EXPERTS_FILE, TRUNK_FILE])
def test_a_disk_that_does_not_keep_what_it_is_given_is_noticed(
    name: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, struck = durable.BuildFile.write, []

    def wrong(file: durable.BuildFile, offset: int, data: memoryview) -> None:
        strike = file.path.name == name and offset and not struck
        struck.extend([offset] if strike else [])
        write(file, offset, bytes([data[0] ^ 1]) + bytes(data[1:]) if strike else data)

    def build() -> None:
        with case.into(tmp_path / "out") as quantization:
            add_all(quantization, [(ref, None) for ref in case.refs])
            case.finish(quantization)

    monkeypatch.setattr(durable.BuildFile, "write", wrong)
    with pytest.raises(CorruptError, match=f"{name}: other bytes were read than written"):
        build()
    build()


def test_a_tensor_that_is_refused_may_come_again(case: Case, tmp_path: Path) -> None:
    """As when bytes on their way were wrong, and were fetched again."""
    with case.into(tmp_path / "out") as quantization:
        for ref in case.refs:
            bad = read_tensor(ref)
            bad.view(-1)[3] = float("inf")
            with pytest.raises(RefusedError, match=f"{ref.name} holds inf"):
                quantization.add(ref, bad)
            add_all(quantization, [(ref, None)])
        case.finish(quantization)


def test_a_shard_may_go_only_when_all_of_it_is_on_disk(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, [(ref, Origin("a", 1)) for ref in case.refs])
        quantization.accept("a", SHA)
        synced: list[Path] = []
        monkeypatch.setattr(durable.BuildFile, "sync", lambda file: synced.append(file.path))
        quantization.sync()
    building = building_folder(tmp_path / "out")
    assert synced == [building / TRUNK_FILE, building / EXPERTS_FILE, journal_path(tmp_path / "out")]


def test_the_tied_head_is_not_lacking(tmp_path: Path) -> None:
    case = case_of(tmp_path, RECIPES["q4"], tie_word_embeddings=True)
    with case.into(tmp_path / "out") as quantization:
        assert not quantization.lacks("lm_head.weight")
        assert quantization.lacks("model.embed_tokens.weight")


class Disk:
    """Remembers what each write replaced, until its file is synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.unsynced: list[tuple[Path, int, bytes, int]] = []
        self._write, self._sync = durable.BuildFile.write, durable.BuildFile.sync
        monkeypatch.setattr(durable.BuildFile, "write", lambda file, offset, data: self.write(file, offset, data))
        monkeypatch.setattr(durable.BuildFile, "sync", lambda file: self.sync(file))

    def write(self, file: durable.BuildFile, offset: int, data: memoryview) -> None:
        before = os.pread(file.fileno(), len(data), offset)
        self.unsynced.append((file.path, offset, before.ljust(len(data), b"\0"), file.size()))
        self._write(file, offset, data)

    def sync(self, file: durable.BuildFile) -> None:
        self._sync(file)
        self.unsynced = [write for write in self.unsynced if write[0] != file.path]

    def cut_power(self, rng: random.Random | None) -> None:
        """What was not synced is lost, or some of it: a page is as it was, a file's end is not there or zeros."""
        for path, offset, before, size in reversed(self.unsynced):
            if rng is None or rng.randrange(2):
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(before)
                    if offset == size and (rng is None or rng.randrange(2)):
                        file.truncate(size)
        self.unsynced.clear()


@pytest.mark.parametrize("seed", range(8))
def test_a_power_cut_never_asks_for_a_shard_that_was_let_go(
    seed: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    shards = split(case.refs, rng, shards=5)
    disk = Disk(monkeypatch)
    gone: set[str] = set()
    for _ in range(4):
        with case.into(tmp_path / "out") as quantization:
            assert all(quantization.accepted(shard) == SHA for shard in gone)
            assert not any(quantization.lacks(ref.name) for shard in gone for ref, _ in shards[shard])
            for shard in rng.sample(sorted(shards.keys() - gone), k=min(2, len(shards) - len(gone))):
                add_all(quantization, shards[shard])
                quantization.accept(shard, SHA)
                if rng.randrange(2):
                    quantization.sync()
                    gone.add(shard)
            add_all(quantization, mixed(shards, rng)[: rng.randrange(9)])
        disk.cut_power(rng)
    assert gone
    with case.into(tmp_path / "out") as quantization:
        for shard in shards.keys() - gone:
            add_all(quantization, shards[shard])
            quantization.accept(shard, SHA)
        case.finish(quantization)


def test_a_power_cut_does_not_revive_wrong_bytes(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source file may be half fetched again by then, and prove right in the end."""
    disk = Disk(monkeypatch)
    with case.into(tmp_path / "out") as quantization:
        for ref in case.refs:
            quantization.add(ref, torch.full(ref.shape, 0.5, dtype=ref.dtype), Origin("a", 1))
        quantization.settle()
        quantization.sync()
        quantization.revoke("a")
        add_all(quantization, [(ref, Origin("a", 1)) for ref in case.refs])
        quantization.settle()
    disk.cut_power(None)
    with case.into(tmp_path / "out") as quantization:
        add_all(quantization, [(ref, Origin("a", 1)) for ref in case.refs])
        quantization.accept("a", SHA)
        case.finish(quantization)
