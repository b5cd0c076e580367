"""Hostile and damaged checkpoints: refused by name before a tensor is allocated, and pickles are never opened."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import random
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixlocal.errors import CorruptError, MixlocalError, NotFoundError, RefusedError
from mixlocal.store.checkpoint import INDEX, Checkpoint, read_header

WEIGHTS = {
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "b": torch.arange(4, dtype=torch.float32),
    "c": torch.tensor(7, dtype=torch.int64),
    "none": torch.zeros(0, 5, dtype=torch.float16),
}
DATA = bytes(range(12))
GOOD = {
    "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    "y": {"dtype": "U8", "shape": [2, 4], "data_offsets": [4, 12]},
}
_watchers: list[list[tuple[str, str]]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    for seen in _watchers:
        seen.append((event, os.fsdecode(args[0]) if args and isinstance(args[0], str | bytes | os.PathLike) else ""))


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_audit)


@contextlib.contextmanager
def audited() -> Iterator[list[tuple[str, str]]]:
    """Every audit event of the block, with its first argument. A hook lasts as long as the process: there is one."""
    _install_hook()
    seen: list[tuple[str, str]] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)


def opened(events: list[tuple[str, str]]) -> set[Path]:
    return {Path(path) for event, path in events if event == "open"}


def shard(path: Path, header: object = None, data: bytes = DATA, *, length: int | None = None) -> Path:
    """A safetensors file with this header, given as JSON text, bytes or an object; `length` if it should lie."""
    text = (
        header
        if isinstance(header, bytes)
        else header.encode()
        if isinstance(header, str)
        else json.dumps(header).encode()
    )
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def folder_of(root: Path, shards: dict[str, dict[str, torch.Tensor]], weight_map: object = None) -> Path:
    (root / "config.json").write_text("{}")
    for name, weights in shards.items():
        save_file(weights, root / name)
    if weight_map is not None:
        (root / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return root


def one(**changes: Any) -> dict[str, Any]:
    """The good header with a change in tensor y."""
    return {"x": GOOD["x"], "y": GOOD["y"] | changes}


def test_every_tensor_is_read_as_it_was_written(tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder_of(tmp_path, {"model.safetensors": WEIGHTS}))
    assert checkpoint.tensors.keys() == WEIGHTS.keys()
    for name, expected in WEIGHTS.items():
        actual = checkpoint.read(checkpoint.tensors[name])
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert torch.equal(actual, expected)


def test_every_prefix_of_a_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CorruptError, match=r"model\.safetensors"):
            read_header(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CorruptError, match="bytes on disk"):
        read_header(path)


def test_a_shard_that_shrinks_after_it_was_checked_is_a_clean_error(tmp_path: Path) -> None:
    checkpoint = Checkpoint(folder_of(tmp_path, {"model.safetensors": WEIGHTS}))
    os.truncate(tmp_path / "model.safetensors", checkpoint.tensors["b"].offset + 3)
    with pytest.raises(CorruptError, match="bytes early"):
        checkpoint.read(checkpoint.tensors["b"])


def test_the_good_header_is_read(tmp_path: Path) -> None:
    refs = read_header(shard(tmp_path / "s", GOOD | {"__metadata__": {"format": "pt"}}))
    assert [(ref.name, ref.nbytes) for ref in refs] == [("x", 4), ("y", 8)]


def test_empty_tensors_may_stand_anywhere_in_the_header(tmp_path: Path) -> None:
    empty = {"dtype": "F16", "shape": [0], "data_offsets": [4, 4]}
    assert len(read_header(shard(tmp_path / "s", {"y": GOOD["y"], "e": empty, "x": GOOD["x"]}))) == 3


HUGE = 10**4299
LYING_HEADERS: dict[str, object] = {
    "overlap": one(data_offsets=[0, 8]),
    "overlap inside": one(data_offsets=[3, 11]),
    "gap": one(shape=[7], data_offsets=[5, 12]),
    "twice the same place": {"x": GOOD["y"], "y": GOOD["y"]},
    "not all data claimed": {"x": GOOD["x"]},
    "more than the file": one(shape=[9], data_offsets=[4, 13]),
    "nothing claimed": {},
    "negative begin": one(data_offsets=[-4, 4]),
    "negative end": one(data_offsets=[4, -4]),
    "end before begin": one(data_offsets=[12, 4]),
    "end of 4300 digits": one(data_offsets=[4, HUGE]),
    "difference of 4301 digits": one(data_offsets=[-9 * HUGE, 9 * HUGE]),
    "offsets past 64 bits": one(data_offsets=[1 << 64, (1 << 64) + 8]),
    "false for an offset": {"x": GOOD["x"] | {"data_offsets": [False, 4]}, "y": GOOD["y"]},
    "float offset": one(data_offsets=[4.0, 12.0]),
    "infinite offset": json.dumps(one(data_offsets=[4, 12])).replace("[4, 12]", "[4, 1e400]"),
    "one offset": one(data_offsets=[4]),
    "three offsets": one(data_offsets=[4, 12, 12]),
    "offsets that are an object": one(data_offsets={"0": 4, "1": 12}),
    "offsets that are text": one(data_offsets="ab"),
    "another dtype": one(dtype="F64"),
    "a shape too small": one(shape=[7]),
    "a shape too large": one(shape=[2, 5]),
    "negative shape": one(shape=[-2, -4]),
    "shape of true": one(shape=[True, 8]),
    "shape of floats": one(shape=[2.0, 4.0]),
    "shape that overflows 64 bits": one(shape=[1 << 32, 1 << 32, 8]),
    "shape that is a number": one(shape=8),
    "shape of null": one(shape=None),
    "shape of a million dimensions": one(shape=[(1 << 40) - 1] * 1_000_000),
    "shape of a million ones": one(shape=[8] + [1] * 1_000_000),
    "unknown dtype": one(dtype="F8_E4M3"),
    "dtype of control characters": one(dtype="\x1b[2J\n"),
    "dtype that is a number": one(dtype=8),
    "dtype that is a list": one(dtype=["U8"]),
    "an entry more": one(extra=1),
    "entry missing": {"x": GOOD["x"], "y": {"dtype": "U8", "shape": [8]}},
    "entry that is a list": {"x": GOOD["x"], "y": []},
    "entry that is null": {"x": GOOD["x"], "y": None},
    "name of control characters": {"x": GOOD["x"], "\x1b]52;c;\x07\n": GOOD["y"]},
    "empty name": {"x": GOOD["x"], "": GOOD["y"]},
    "name of 100,000 characters": {"x": GOOD["x"], "y" * 100_000: GOOD["y"]},
    "name that is half a surrogate": {"x": GOOD["x"], "\ud800": GOOD["y"]},
    "duplicate name": json.dumps(GOOD).replace('"y"', '"x"'),
    "duplicate key": json.dumps(GOOD).replace('"shape": [1]', '"shape": [1], "shape": [1]'),
    "NaN": json.dumps(GOOD).replace("[0, 4]", "[NaN, 4]"),
    "Infinity": json.dumps(GOOD).replace("[0, 4]", "[0, Infinity]"),
    "5000 digits": json.dumps(GOOD).replace("[0, 4]", "[0, " + "9" * 5000 + "]"),
    "nested lists": '{"x": ' + "[" * 200_000,
    "nested objects": '{"x":' * 200_000,
    "not UTF-8": json.dumps(GOOD).encode().replace(b'"x"', b'"\xff"'),
    "UTF-16": json.dumps(GOOD).encode("utf-16"),
    "a list": [GOOD],
    "null": None,
    "no bytes": b"",
    "text behind the object": json.dumps(GOOD) + "x",
    "zeros behind the object": json.dumps(GOOD).encode() + b"\0\0",
}  # fmt: skip


@pytest.mark.parametrize("header", LYING_HEADERS.values(), ids=LYING_HEADERS)
def test_a_lying_header_is_refused_in_one_line(header: object, tmp_path: Path) -> None:
    path = shard(tmp_path / "s.safetensors", header)
    with pytest.raises((CorruptError, RefusedError)) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{path}: ")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) - len(str(path)) < 400


@pytest.mark.parametrize("length", [0, 1, 7, 1 << 20, 25_000_001, 1 << 31, 1 << 63, (1 << 64) - 1, (1 << 64) - 8])
def test_a_lying_header_length_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises((CorruptError, RefusedError)):
        read_header(shard(tmp_path / "s", GOOD, length=length))


def test_5000_mutated_headers_read_the_same_tensors_or_raise_our_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(WEIGHTS, path)
    good = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", good[:8])
    allowed = {(ref.dtype, ref.shape, ref.offset, ref.nbytes) for ref in read_header(path)}
    rng = random.Random(5)
    refused = 0
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            rng.choice(MUTATIONS)(data, rng.randrange(8 + header_bytes), rng)
        path.write_bytes(data)
        try:
            refs = read_header(path)
        except MixlocalError:
            refused += 1
            continue
        assert sum(ref.nbytes for ref in refs) + min(ref.offset for ref in refs) == len(data)
        if len(data) == len(good):  # names and types of one size may differ: what the config implies catches those
            assert {(ref.offset, ref.nbytes) for ref in refs} <= {(offset, n) for _, _, offset, n in allowed}
    assert refused > 4000


def _flip(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _replace(data: bytearray, at: int, rng: random.Random) -> None:
    data[at] = rng.choice(b'0123456789-"[]{},:.eE \\\0\xff')


def _insert(data: bytearray, at: int, rng: random.Random) -> None:
    data.insert(at, rng.choice(b'0123456789-"[]{},:'))


def _delete(data: bytearray, at: int, _: random.Random) -> None:
    del data[at]


def _digit(data: bytearray, _: int, rng: random.Random) -> None:
    """Another digit for a digit: the header stays valid JSON."""
    digits = [i for i, byte in enumerate(data[:400]) if chr(byte).isdigit()]
    data[rng.choice(digits)] = rng.choice(b"0123456789")


MUTATIONS: list[Callable[[bytearray, int, random.Random], None]] = [_flip, _replace, _insert, _delete, _digit]


A, B = "model-1.safetensors", "model-2.safetensors"
PAIR = {A: {"a": WEIGHTS["a"]}, B: {"b": WEIGHTS["b"]}}


def test_two_shards_with_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    assert Checkpoint(folder_of(tmp_path, PAIR, {"a": A, "b": B})).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize(
    ("shards", "weight_map", "error", "what"),
    [
        (PAIR, {"a": A, "b": "model-3.safetensors"}, NotFoundError, "model-3.safetensors"),
        (PAIR, {"a": A, "b": B, "z": B}, RefusedError, "tensor z is not in"),
        (PAIR, {"a": B, "b": A}, RefusedError, "is not in"),
        (PAIR, {"a": A, "b": A}, RefusedError, "tensor b is not in"),
        ({A: {"a": WEIGHTS["a"], "x": WEIGHTS["b"]}}, {"a": A}, RefusedError, "tensor x is not in the index"),
        ({A: PAIR[A], B: {**PAIR[A], **PAIR[B]}}, {"a": A, "b": B}, RefusedError, "tensor a is also in"),
        (PAIR, {}, RefusedError, "missing or empty"),
        (PAIR, [A, B], RefusedError, "missing or empty"),
        (PAIR, {"a": A, "b": [B]}, RefusedError, "names the file"),
        (PAIR, {"a": A, "b": None}, RefusedError, "names the file"),
        (PAIR, {"a": A, "b\n\x1b": B}, RefusedError, "names a tensor"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    shards: dict[str, dict[str, torch.Tensor]], weight_map: object, error: type[Exception], what: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=what):
        Checkpoint(folder_of(tmp_path, shards, weight_map))


def test_two_shards_without_an_index_may_not_share_a_tensor(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="tensor a is also in"):
        Checkpoint(folder_of(tmp_path, {A: PAIR[A], B: PAIR[A]}))


def test_swapped_shards_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, {A: PAIR[B], B: PAIR[A]}, {"a": A, "b": B})
    with pytest.raises(RefusedError, match="is not in"):
        Checkpoint(tmp_path)


OUTSIDE = (
    "../{}", "/etc/{}", "sub/{}", "./{}", "a/../{}", "//{}", "~/{}", "..", ".", "", ".{}", "-{}", "{}\n", "\n{}",
    "a\0{}",    "..\\{}", "C:\\{}", "\\\\host\\share\\{}", "%2e%2e%2f{}", "\uff0e\uff0e\uff0f{}", "\x1b[2J{}",
    "\u202e{}", "\ud800{}",    "a" * 5000 + "{}", "evil.py", "pytorch_model.bin",
)  # fmt: skip


@pytest.mark.parametrize("pattern", OUTSIDE, ids=lambda pattern: ascii(pattern[:20]))
def test_an_index_cannot_name_a_file_elsewhere(pattern: str, tmp_path: Path) -> None:
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    save_file(PAIR[A], tmp_path / A)
    folder_of(inside, {}, {"a": pattern.format(A)})
    with audited() as events, pytest.raises(RefusedError, match="weight_map names the file") as caught:
        Checkpoint(inside)
    assert caught.value.message.isprintable()
    assert opened(events) == {inside / "config.json", inside / INDEX}


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "model.pt"]
)
def test_a_folder_of_pickles_is_refused_unopened(name: str, tmp_path: Path) -> None:
    os.mkfifo(folder_of(tmp_path, {}) / name)  # to open it would be to wait for ever
    with audited() as events, pytest.raises(RefusedError, match="pickled") as caught:
        Checkpoint(tmp_path)
    assert caught.value.exit_code == 4
    assert opened(events) == {tmp_path / "config.json"}


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_renamed_safetensors_is_refused_and_not_unpickled(how: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path, {}) / "model.safetensors"
    path.write_bytes(pickle.dumps(_Bomb())) if how == "pickle" else torch.save(_Bomb(), path)
    with audited() as events, pytest.raises((CorruptError, RefusedError), match="not a safetensors file"):
        Checkpoint(tmp_path)
    assert not {event for event, _ in events} & {"pickle.find_class", "os.system", "subprocess.Popen", "exec"}
    assert not Path("exploded").exists()


def _no_folder(folder: Path) -> Path:
    return folder / "absent"


def _no_config(folder: Path) -> Path:
    return folder


def _no_weights(folder: Path) -> Path:
    return folder_of(folder, {})


def _weights_that_are_a_folder(folder: Path) -> Path:
    (folder_of(folder, {}) / "model.safetensors").mkdir()
    return folder


def _weights_that_are_a_pipe(folder: Path) -> Path:
    os.mkfifo(folder_of(folder, {}) / "part.safetensors")
    return folder


def _name_too_long(folder: Path) -> Path:
    return folder / ("x" * 5000)


def _name_with_nul(folder: Path) -> Path:
    return folder / "x\0"


@pytest.mark.parametrize(
    "make",
    [
        _no_folder,
        _no_config,
        _no_weights,
        _weights_that_are_a_folder,
        _weights_that_are_a_pipe,
        _name_too_long,
        _name_with_nul,
    ],
    ids=lambda make: make.__name__.strip("_"),
)
def test_what_is_no_checkpoint_is_not_found(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        Checkpoint(make(tmp_path))


def test_we_and_safetensors_read_the_same_file_alike(tmp_path: Path) -> None:
    folder_of(tmp_path, {"model.safetensors": WEIGHTS})
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(checkpoint.read(checkpoint.tensors[name]), tensor)
