"""The GGUF reader on a small file: what it reads, and what it says of a damaged one."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from mixlocal.errors import CorruptError, MixlocalError, NotFoundError, RefusedError
from mixlocal.store.gguf import GgufFile, read_gguf

F32, F16, Q8_0, Q4_1 = (GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_1"))
WORDS = ["a", "Ġthe", "日本"]


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)


TENSORS = {  # the last one ends on an alignment of 32, so the file ends with it
    "norm": (values(64), F32),
    "plain": (values(5, 32), F32),
    "half": (values(2, 32), F16),
    "bytes": (values(6, 64), Q8_0),
    "nibbles": (values(8, 128), Q4_1),
}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]]) -> Path:
    writer = gguf.GGUFWriter(path, "small")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.switch", True)
    writer.add_array("some.words", WORDS)
    writer.add_array("some.numbers", [1, 2, 3])
    for name, (value, kind) in tensors.items():
        writer.add_tensor(name, quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(path: Path) -> GgufFile:
    """Open a file and read every tensor of it that can be read."""
    file = read_gguf(path)
    for name, tensor in file.tensors.items():
        if tensor.kind != F16:
            file.floats(name)
    return file


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "small.gguf", TENSORS)


def test_metadata_has_the_types_of_the_file(path: Path) -> None:
    file = read_gguf(path)
    assert file.field("general.architecture", str) == "small"
    assert file.field("a.number", int) == 7
    assert file.field("a.float", float) == 0.5
    assert file.field("a.switch", bool) is True
    assert file.field("some.words", list) == WORDS
    assert file.field("some.numbers", list) == [1, 2, 3]


@pytest.mark.parametrize("name", ["norm", "plain", "bytes", "nibbles"])
def test_tensors_are_those_of_the_library(path: Path, name: str) -> None:
    value, kind = TENSORS[name]
    expected = quants.dequantize(quants.quantize(value, kind), kind)
    file = read_gguf(path)
    assert file.tensors[name].shape == value.shape
    assert np.array_equal(file.floats(name), expected)
    assert np.array_equal(file.floats(name, slice(1, 3)), expected[1:3])


def test_steps_span_each_block(path: Path) -> None:
    blocks = TENSORS["nibbles"][0].reshape(8, 4, 32)
    expected = (blocks.max(-1) - blocks.min(-1)) / 15
    assert read_gguf(path).steps("nibbles") == pytest.approx(expected, rel=1e-3)


def test_what_is_not_there_or_not_readable_is_named(path: Path, tmp_path: Path) -> None:
    file = read_gguf(path)
    with pytest.raises(CorruptError, match=r"small\.gguf: a\.word is missing"):
        file.field("a.word", str)
    with pytest.raises(CorruptError, match=r"small\.gguf: a\.number is a int, not a str"):
        file.field("a.number", str)
    with pytest.raises(RefusedError, match=r"small\.gguf: general\.architecture is 'small', not 'large'"):
        file.require("general.architecture", "large")
    with pytest.raises(RefusedError, match=r"small\.gguf: half is F16"):
        file.floats("half")
    with pytest.raises(RefusedError, match=r"small\.gguf: bytes is Q8_0; only Q4_1"):
        file.steps("bytes")
    with pytest.raises(NotFoundError, match=r"absent\.gguf is not there"):
        read_gguf(tmp_path / "absent.gguf")


def test_only_versions_2_and_3_are_read(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    for version in (1, 4):
        other.write_bytes(b"GGUF" + struct.pack("<I", version) + path.read_bytes()[8:])
        with pytest.raises(RefusedError, match=rf"other\.gguf: GGUF version {version} is not supported"):
            read_gguf(other)


def test_numbers_that_are_none_are_corrupt(tmp_path: Path) -> None:
    for bad in (np.nan, np.inf):
        path = write(tmp_path / "bad.gguf", {"norm": (np.full(32, bad, np.float32), F32)})
        with pytest.raises(CorruptError, match=r"bad\.gguf: norm holds NaN or infinity"):
            read_gguf(path).floats("norm")


def test_a_file_cut_anywhere_is_corrupt(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CorruptError, match=r"cut\.gguf: "):
            read_gguf(cut)


def test_a_cut_names_the_field(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for field, bytes_left in (("some.words", 20), ("a.number", 6)):
        cut.write_bytes(whole[: whole.index(field.encode()) + len(field) + bytes_left])
        with pytest.raises(CorruptError, match=rf"cut\.gguf: the file ends inside {field}"):
            read_gguf(cut)


def test_a_file_that_shrinks_while_open_is_corrupt(tmp_path: Path) -> None:
    path = write(tmp_path / "small.gguf", TENSORS)
    file = read_gguf(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptError, match=r"small\.gguf: the file ends inside nibbles"):
        file.floats("nibbles")


def test_damaged_bytes_never_raise_anything_else(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    generator = random.Random(0)
    for _ in range(500):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (tmp_path / "bad.gguf").write_bytes(damaged)
        with suppress(MixlocalError):
            read_all(tmp_path / "bad.gguf")
