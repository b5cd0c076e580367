"""A damaged model store is never used: every flipped bit, cut, swap and lie is an error before the first token."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stores
import tiny
import torch

from mixlocal.app.session import Session
from mixlocal.errors import CorruptError, NotFoundError, PermissionDeniedError, RefusedError
from mixlocal.quant.format import ExpertLayout, QuantSpec
from mixlocal.store import model_store
from mixlocal.store.checkpoint import data_start
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.manifest import FORMAT_VERSION, MANIFEST, Recipe, read_manifest
from mixlocal.store.model_store import TRUNK_FILE, ModelStore, find_stores

FILES = (EXPERTS_FILE, TRUNK_FILE, "config.json", "tokenizer.json")
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_local_experts": 2, "vocab_size": 258}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model_store")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", **SMALL)
    return stores.quantized(checkpoint, root / "pristine" / "q4").folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pristine, tmp_path / "models" / "tiny" / "q4")


def opens(folder: Path) -> None:
    """All that happens before a first token."""
    with Session.open(str(folder)):
        pass


def verified(folder: Path) -> None:
    for _ in ModelStore.open(folder).verify():
        pass


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the manifest with a change and with a checksum that is right."""
    body = json.loads((folder / MANIFEST).read_bytes())["manifest"]
    changed = change(body)
    seal(folder, json.dumps(body if changed is None else changed, separators=(",", ":")).encode())


def seal(folder: Path, body: bytes) -> None:
    digest = hashlib.sha256(body).hexdigest().encode()
    (folder / MANIFEST).write_bytes(b'{"manifest":' + body + b',"sha256":"' + digest + b'"}\n')


def test_the_undamaged_store_opens_and_verifies(folder: Path) -> None:
    opens(folder)
    progress = list(ModelStore.open(folder).verify())
    assert progress[-1] == (ModelStore.open(folder).manifest.nbytes,) * 2
    reseal(folder, lambda body: None)
    opens(folder)


def test_every_flipped_bit_of_the_manifest_is_found(folder: Path) -> None:
    path = folder / MANIFEST
    good = path.read_bytes()
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises((CorruptError, RefusedError)):
            read_manifest(folder)


def test_every_prefix_of_the_manifest_is_found(folder: Path) -> None:
    path = folder / MANIFEST
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(CorruptError):
            read_manifest(folder)
    path.write_bytes(good + b"\n")
    with pytest.raises(CorruptError):
        read_manifest(folder)


@pytest.mark.parametrize("name", FILES)
def test_500_flipped_bits_of_a_file_are_found_before_a_token(name: str, folder: Path) -> None:
    rng = random.Random(name)
    path = folder / name
    size = path.stat().st_size
    with path.open("r+b", buffering=0) as file:
        for _ in range(500):
            at, bit = rng.randrange(size), 1 << rng.randrange(8)
            (byte,) = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte ^ bit]), at)
            with pytest.raises(CorruptError, match=name):
                opens(folder)
            os.pwrite(file.fileno(), bytes([byte]), at)
    opens(folder)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def removed(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("use", [opens, verified], ids=["open", "verify"])
@pytest.mark.parametrize("damage", [flipped, cut, grown, emptied, removed, a_folder, a_pipe])
@pytest.mark.parametrize("name", [*FILES, "tokenizer_config.json"])
def test_damage_is_found_and_names_the_file(
    name: str, damage: Callable[[Path], None], use: Callable[[Path], None], folder: Path
) -> None:
    damage(folder / name)
    with pytest.raises(CorruptError, match=name) as caught:
        use(folder)
    assert caught.value.hint


@pytest.mark.parametrize("damage", [removed, a_folder, a_pipe])
def test_without_a_manifest_nothing_is_a_model(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder / MANIFEST)
    with pytest.raises(NotFoundError):
        ModelStore.open(folder)


@pytest.mark.parametrize("use", [opens, verified], ids=["open", "verify"])
def test_two_swapped_records_are_found(use: Callable[[Path], None], folder: Path) -> None:
    path, stride = folder / EXPERTS_FILE, read_manifest(folder).stride
    data = path.read_bytes()
    path.write_bytes(data[stride : 2 * stride] + data[:stride] + data[2 * stride :])
    with pytest.raises(CorruptError, match=r"layer 0 expert [01] is damaged"):
        use(folder)


def test_the_record_of_another_model_is_found(folder: Path) -> None:
    reseal(folder, lambda body: body.update(name="other"))
    with pytest.raises(CorruptError, match="is damaged"):
        opens(folder)


def test_a_symbolic_link_for_the_records_is_refused(folder: Path, pristine: Path) -> None:
    (folder / EXPERTS_FILE).unlink()
    (folder / EXPERTS_FILE).symlink_to(pristine / EXPERTS_FILE)
    with pytest.raises(PermissionDeniedError, match=EXPERTS_FILE):
        opens(folder)


def test_the_config_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = stores.quantized(tiny.write_checkpoint(tmp_path / "c", **SMALL | {"num_local_experts": 4}), tmp_path / "o")
    shutil.copy(other.folder / "config.json", folder)
    with pytest.raises(CorruptError, match=r"config\.json"):
        opens(folder)
    reseal(folder, lambda body: body["files"].update({"config.json": _entry(other, "config.json")}))
    with pytest.raises(RefusedError, match="of different models"):
        opens(folder)


def _entry(store: ModelStore, name: str) -> dict[str, Any]:
    stored = store.manifest.files[name]
    return {"nbytes": stored.nbytes, "xxh3": stored.xxh3}


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, -1, 10**18])
def test_another_format_version_is_refused_by_number(version: int, folder: Path) -> None:
    reseal(folder, lambda body: body.update(format_version=version, a_new_field={"of": "that version"}))
    with pytest.raises(RefusedError, match=f"format version {version}"):
        read_manifest(folder)


def test_a_store_of_format_version_1_is_read(folder: Path) -> None:
    """As it was written before a recipe had more than three fields."""

    def as_version_1(body: dict[str, Any]) -> None:
        body["format_version"] = 1
        body["recipe"] = {name: body["recipe"][name] for name in ("experts", "scale_bits", "attention")}

    before = read_manifest(folder)
    reseal(folder, as_version_1)
    manifest = read_manifest(folder)
    assert manifest.format_version == 1
    assert manifest.recipe == Recipe("nf4", 16, "bf16") == before.recipe
    assert (manifest.records, manifest.experts_bytes) == (before.records, before.experts_bytes)
    verified(folder)
    opens(folder)


def test_masks_that_say_nothing_are_no_contradiction(folder: Path) -> None:
    reseal(folder, lambda body: body["recipe"].update(wide=[0] * len(body["records"])))
    verified(folder)
    opens(folder)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "..", ".", "", "sub/x", "./x", "a\\..\\b", "x\0", "x\n", "\x1b[2J", "\u202ex", "x" * 300],
)
def test_a_manifest_cannot_name_a_file_outside_its_folder(name: str, folder: Path) -> None:
    (folder.parent / "x").write_bytes(b"secret")
    reseal(folder, lambda body: body["files"].update({name: {"nbytes": 6, "xxh3": "0" * 32}}))
    with pytest.raises(RefusedError, match="outside its folder") as caught:
        read_manifest(folder)
    assert caught.value.message.isprintable()


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda body: [body],
    "null": lambda body: json.loads("[null]"),
    "no version": lambda body: body.pop("format_version") and None,
    "version as text": lambda body: body.update(format_version="1"),
    "version true": lambda body: body.update(format_version=True),
    "a field less": lambda body: body.pop("recipe") and None,
    "a field more": lambda body: body.update(extra=1),
    "another stride": lambda body: body.update(stride=body["stride"] + 4096),
    "stride zero": lambda body: body.update(stride=0),
    "width zero": lambda body: body.update(dim=0, hidden=0, stride=0),
    "no layers": lambda body: body.update(n_layers=0, n_experts=0, records=[]),
    "negative counts": lambda body: body.update(n_layers=-body["n_layers"], n_experts=-body["n_experts"]),
    "a layer more": lambda body: body.update(n_layers=body["n_layers"] + 1),
    "a record less": lambda body: body["records"].pop() and None,
    "a huge width": lambda body: body.update(dim=1 << 62),
    "a width of a thousand digits": lambda body: body.update(dim=10**1000),
    "unknown quantization": lambda body: body["recipe"].update(experts="nf3"),
    "no trunk": lambda body: body["files"].pop(TRUNK_FILE) and None,
    "negative size": lambda body: body["files"][TRUNK_FILE].update(nbytes=-1),
    "a huge trunk": lambda body: body["files"][TRUNK_FILE].update(nbytes=1 << 60),
    "a checksum that is a number": lambda body: body["records"][0].update(xxh3=7),
    "two errors for three tensors": lambda body: body["records"][0].update(errors=[0.1, 0.2]),
    "records that are an object": lambda body: body.update(records={}),
    "a mask that is none": lambda body: _widen(body, lambda count: [8] * count),
    "a negative mask": lambda body: _widen(body, lambda count: [-1] * count),
    "a mask that is no number": lambda body: _widen(body, lambda count: [True] * count),
    "a mask less": lambda body: _widen(body, lambda count: [0] * (count - 1)),
    "a mask more": lambda body: _widen(body, lambda count: [0] * (count + 1)),
    "8 bits instead of 16": lambda body: _otherwise(body, "bf16"),
    "8 bits instead of 8": lambda body: _otherwise(body, "int8"),
}


def _widen(body: dict[str, Any], masks: Callable[[int], list[Any]]) -> None:
    body["recipe"]["wide"] = masks(len(body["records"]))


def _otherwise(body: dict[str, Any], kind: Any) -> None:
    """Masks are for the 4-bit formats; all else is consistent."""
    body["recipe"].update(experts=kind, wide=[1] * len(body["records"]))
    body["stride"] = ExpertLayout(body["dim"], body["hidden"], QuantSpec(kind), 1).stride


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_sealed_manifest_that_lies_is_still_corrupt(lie: Callable[[dict[str, Any]], Any], folder: Path) -> None:
    reseal(folder, lie)
    with pytest.raises(CorruptError):
        ModelStore.open(folder).read_trunk()


@pytest.mark.parametrize(
    "body", [b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b'{"format_version":"\xff"}']
)
def test_a_sealed_bomb_is_corrupt(body: bytes, folder: Path) -> None:
    seal(folder, body)
    with pytest.raises(CorruptError):
        read_manifest(folder)


def test_a_trunk_replaced_after_its_check_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header comes from the bytes that were checked, not from a second look at the file."""
    store = ModelStore.open(folder)
    expected = store.read_trunk()

    def replace_first(*args: Any) -> int:
        (folder / TRUNK_FILE).write_bytes(b"\0" * 100)
        return data_start(*args)

    monkeypatch.setattr(model_store, "data_start", replace_first)
    actual = store.read_trunk()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_odd_sizes_are_read_though_their_tensors_lie_unaligned(tmp_path: Path) -> None:
    """An int8 matrix of an odd number of bytes before a float32 norm: safetensors allows no padding between them."""
    changes = SMALL | {"hidden_size": 18, "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 261}
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", **changes)
    store = stores.quantized(checkpoint, tmp_path / "q8", "q8", attention="int8")
    trunk = store.read_trunk()
    assert trunk["layers.0.attention_norm"].shape == (18,)
    opens(store.folder)


def test_a_read_only_store_opens_and_verifies(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        path.chmod(0o444 if path.is_file() else 0o555)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    verified(folder)
    opens(folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    folder.chmod(0o755)


def test_reading_a_store_opens_nothing_for_writing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes do not stop root, so we look at the flags of every open as well."""
    monkeypatch.setattr(os, "open", _only_reading(os.open))
    verified(folder)
    opens(folder)


def _only_reading(real: Callable[..., int]) -> Callable[..., int]:
    def checked(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        assert flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) == 0, path
        return real(path, flags, *rest, **more)

    return checked


def test_only_finished_stores_are_listed(folder: Path) -> None:
    """A building folder has a manifest for a moment before it is published, and a removed one for a moment after."""
    for name in ("q8.building", f".bf16.{os.getpid()}.removed"):
        shutil.copytree(folder, folder.with_name(name))
    shutil.copytree(folder, damaged := folder.with_name("q8"))
    emptied(damaged / MANIFEST)
    good, bad = find_stores(folder.parent.parent)
    assert isinstance(good, ModelStore)
    assert good.folder == folder
    assert isinstance(bad, CorruptError)
    assert "q8" in bad.message
