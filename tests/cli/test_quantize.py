"""mixlocal quantize: what decides about bits, and what every other command makes of a store of several formats"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from stores import quantized

from mixlocal.app import rehearsal
from mixlocal.app.calibration import OWN_TEXT
from mixlocal.app.footprint import stored_bytes
from mixlocal.app.model_run import store_config
from mixlocal.experts.plan import BASE_BYTES
from mixlocal.store import disk_speed
from mixlocal.store.manifest import Recipe, read_manifest
from mixlocal.store.model_store import ModelStore

CONTEXT = 64
FIT = 270_000  # of 225 to 290 kB
PLAIN = Recipe("nf4", 16, "bf16", search=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_checkpoint(tmp_path_factory.mktemp("quantize") / "tiny", max_position_embeddings=CONTEXT)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "log.txt"
    path.write_text("The third boat came in with the tide, and nobody had lit the lamp.\n" * 2)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "variant", "changes"),
    [
        ((), "q4", {}),
        (("--plain",), "q4", {"search": False}),
        (("--method", "int4"), "int4", {"experts": "int4"}),
        (("--experts", "int4-32", "--scales", "32"), "int4-32", {"experts": "int4-32", "scale_bits": 32}),
        (("--method", "fp4"), "q4", {"experts": "fp4"}),
        (("--bits", "8"), "q8", {"experts": "int8", "search": False}),
        (("--bits", "16"), "bf16", {"experts": "bf16", "search": False}),
        (("--calibrate",), "q4", {"calibrated_on": digest(OWN_TEXT)}),
        (("--calibrate", str(OWN_TEXT)), "q4", {"calibrated_on": digest(OWN_TEXT)}),
        (("--fit", "270kB"), "mix", {"calibrated_on": digest(OWN_TEXT), "fit": FIT}),
        (
            ("--fit", "0.27M", "--plain", "--method", "int4"), "mix",
            {"calibrated_on": digest(OWN_TEXT), "fit": FIT, "search": False, "experts": "int4"},
        ),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_written_down(
    arguments: tuple[str, ...], variant: str, changes: dict[str, object], run, checkpoint: Path, tmp_path: Path
) -> None:
    result = run("--home", str(tmp_path), "--json", "quantize", str(checkpoint), *arguments)
    assert result.code == 0, result.err
    folder = tmp_path / "models" / "tiny" / variant
    manifest = read_manifest(folder)
    recipe = {name: getattr(manifest.recipe, name) for name in Recipe.__struct_fields__ if name != "wide"}
    assert recipe == {name: getattr(PLAIN, name) for name in recipe} | changes
    assert bool(manifest.recipe.wide) == ("fit" in changes)
    answer = json.loads(result.out)
    assert answer["folder"] == str(folder)
    assert answer["bytes"] == manifest.nbytes <= changes.get("fit", 10**9)


def test_a_text_may_come_through_a_pipe(run, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """It can be read only once."""
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=lambda: pipe.write_bytes(text.read_bytes()))
    writer.start()
    result = run("--home", str(tmp_path), "quantize", str(checkpoint), "--calibrate", str(pipe))
    writer.join()
    assert result.code == 0, result.err
    assert "calibrating" in result.err
    assert read_manifest(tmp_path / "models" / "tiny" / "q4").recipe.calibrated_on == digest(text)


def test_the_same_again_does_nothing_and_other_options_are_refused(
    run, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    asked = ("--home", str(tmp_path), "quantize", str(checkpoint))
    how = ("--fit", str(FIT), "--calibrate", str(text))
    assert run(*asked, *how).code == 0
    path = tmp_path / "models" / "tiny" / "mix" / "manifest.json"
    before = path.stat().st_mtime_ns
    again = run(*asked, *how)
    assert again.code == 0
    assert "calibrating" not in again.err
    others = (("--fit", str(FIT)), (*how, "--plain"), ("--fit", "1G", *how[2:]), (*how, "--method", "int4"))
    for other in others:
        refused = run(*asked, *other)
        assert (refused.code, refused.out) == (4, "")
        assert "quantized otherwise" in refused.err
    assert path.stat().st_mtime_ns == before
    assert run(*asked, "--fit", str(FIT), "--fresh").code == 0
    assert path.stat().st_mtime_ns > before


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--bits", "8", "--calibrate"), 2, "int8 has no scales of blocks to choose"),
        (("--method", "bf16", "--calibrate"), 2, "bf16 has no scales of blocks to choose"),
        (("--bits", "8", "--plain"), 2, "int8 has no scales of blocks to choose"),
        (("--method", "int8", "--fit", "1G"), 2, "int8 has no scales of blocks to choose"),
        (("--bits", "16", "--fit", "1G"), 2, "bf16 has no scales of blocks to choose"),
        (("--plain", "--calibrate"), 2, "--plain leaves --calibrate nothing to do"),
        (("--fit", "lots"), 2, "--fit 'lots' is no size"),
        (("--fit", ""), 2, "--fit '' is no size"),
        (("--fit", "-1"), 2, "--fit '-1' is no size"),
        (("--fit", "80%"), 2, "--fit '80%' is no size"),
        (("--fit",), 2, "'--fit' requires an argument"),
        (("--fit", "0"), 4, "--fit 0.0M: at 4 bits everything takes 0.3M"),
        (("--fit", "200K"), 4, "--fit 0.2M: at 4 bits everything takes 0.3M"),
        (("--calibrate", "HERE/absent.txt"), 3, "absent.txt: no such file"),
        (("--calibrate", "HERE"), 2, "is a folder"),
        (("--calibrate", "HERE/short.txt"), 2, "short.txt is too short to calibrate on"),
        (("--calibrate", "HERE/empty.txt"), 2, "empty.txt is too short to calibrate on"),
        (("--fit", "1G", "--calibrate", "HERE/short.txt"), 2, "short.txt is too short to calibrate on"),
        (("--calibrate", "HERE/bytes.txt"), 4, "bytes.txt: no UTF-8 text: byte 0xff at 2"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], code: int, says: str, run, checkpoint: Path, tmp_path: Path
) -> None:
    for name, data in (("short.txt", b"Nobody was there."), ("empty.txt", b""), ("bytes.txt", b"ab\xff" * 99)):
        (tmp_path / name).write_bytes(data)
    arguments = tuple(argument.replace("HERE", str(tmp_path)) for argument in arguments)
    result = run("-q", "--home", str(tmp_path / "home"), "quantize", str(checkpoint), *arguments)
    assert (result.code, result.out) == (code, ""), result.err
    assert says in result.err
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) <= 2
    assert not (tmp_path / "home" / "models" / "tiny").exists() or not list((tmp_path / "home").rglob("*.bin"))


def test_what_is_in_4_bits_cannot_be_the_source(run, home: Path, tmp_path: Path) -> None:
    for options in (("--calibrate",), ("--fit", "1G"), ("--method", "int4")):
        result = run("-q", "quantize", "tiny:q4", "--out", str(tmp_path / "out"), *options)
        assert (result.code, result.out) == (4, "")
        assert "quantized already" in result.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def place(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the unquantized model in it."""
    root = tmp_path_factory.mktemp("place")
    quantized(checkpoint, root / "models" / "tiny" / "bf16", "bf16")
    return root


@pytest.fixture
def mix(run, place: Path, text: Path) -> ModelStore:
    """Made when it is first asked for."""
    made = run("--home", str(place), "quantize", "tiny", "--fit", str(FIT), "--calibrate", str(text))
    assert made.code == 0, made.err
    return ModelStore.open(place / "models" / "tiny" / "mix")


def test_a_mix_is_told_as_what_it_is(run, place: Path, mix: ModelStore) -> None:
    home, manifest = ("--home", str(place)), mix.manifest
    wide = sum(mask.bit_count() for mask in manifest.recipe.wide)
    assert 0 < wide < 24
    rows = json.loads(run(*home, "ls", "--json").out)
    assert [row["bytes"] for row in rows if row["variant"] == "mix"] == [manifest.nbytes]
    shown = run(*home, "show", "tiny:mix", "--layout").out
    assert f"experts nf4 ({wide} of 24 matrices int8), attention bf16" in shown
    assert f"the largest expert: {manifest.layouts.largest.nbytes} bytes in a record of {manifest.stride}" in shown
    assert "one expert: " in run(*home, "show", "tiny:bf16", "--layout").out
    assert "is whole" in run(*home, "verify", "tiny:mix").err
    bench = json.loads(run(*home, "bench", "-m", "tiny:mix", "-p", "4", "-n", "2", "-r", "1", "-o", "json").out)
    assert {(row["variant"], row["model_size"], row["n_records"]) for row in bench} == {("mix", manifest.nbytes, 8)}


def test_a_plan_counts_what_a_mix_takes_to_the_byte(
    run, place: Path, mix: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it lies side by side; of a part, every slot takes the largest record."""
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)
    monkeypatch.setattr(disk_speed, "SECONDS", 0.0)
    layouts = mix.manifest.layouts
    assert layouts.nbytes < 8 * layouts.largest.stride
    needs = stored_bytes(mix.manifest, store_config(mix), torch.float16)
    rest = BASE_BYTES + needs.trunk + CONTEXT * needs.kv_token + needs.scratch

    def plan(experts: int) -> dict[str, Any]:
        asked = ("plan", "tiny:mix", "--json", "--ctx", str(CONTEXT), "--ram", str(rest + experts))
        return dict(json.loads(run("--home", str(place), *asked).out)["plan"])

    whole = plan(layouts.nbytes)
    assert (whole["ram_slots"], whole["disk_records"], whole["ram_bytes"]) == (8, 0, rest + layouts.nbytes)
    part = plan(layouts.nbytes - 1)
    slots = (layouts.nbytes - 1) // layouts.largest.stride
    assert (part["ram_slots"], part["disk_records"]) == (slots, 8 - slots)
    assert part["ram_bytes"] == rest + slots * layouts.largest.stride

    def answer(experts: int) -> str:
        asked = ("prompt", "-m", "tiny:mix", "--raw", "-T", "0", "-n", "12", "--ctx", str(CONTEXT), "--json", "boat")
        done = run("--home", str(place), *asked, "--ram", str(rest + experts))
        assert done.code == 0, done.err
        body = json.loads(done.out)
        assert (body["offload"]["disk_hits"] > 0) == (experts < layouts.nbytes)
        return str(body["token_ids"])

    assert answer(layouts.nbytes) == answer(4 * layouts.largest.stride)


def test_a_mix_lies_between_its_ends(run, place: Path, mix: ModelStore, text: Path) -> None:
    home, variants = ("--home", str(place)), ("q4", "mix", "q8")
    assert run(*home, "quantize", "tiny", "--calibrate", str(text)).code == 0
    assert run(*home, "quantize", "tiny", "--bits", "8").code == 0
    asked = ("quality", *(f"tiny:{v}" for v in variants), "--against", "tiny:bf16", "--ctx", "32", "--text", str(text))
    rows = json.loads(run(*home, *asked, "-o", "json").out)
    found = {row["variant"]: row["mean_kl"] for row in rows}
    assert found["q4"] > found["mix"] > found["q8"] > 0
