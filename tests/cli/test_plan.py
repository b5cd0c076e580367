"""mixlocal plan"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch

from mixlocal.app import budgets, model_run, planning, rehearsal
from mixlocal.app.hardware import Gpu, Hardware
from mixlocal.app.rehearsal import StepTime
from mixlocal.store import disk_speed
from mixlocal.store.expert_file import ExpertFile

GB = 10**9
MIXTRAL = "mixtral-8x7b-instruct"
PLAN_FIELDS = {
    "name", "on_gpu", "budget", "context", "sequences", "kv_tokens", "base_bytes", "trunk_bytes", "kv_bytes",
    "scratch_bytes", "chunk", "record_bytes", "records_bytes", "n_records", "gpu_slots", "ram_slots",
    "staging_slots", "direct_io", "disk_records",
    "ram_bytes", "vram_bytes",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)
    monkeypatch.setattr(disk_speed, "SECONDS", 0.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Hardware:
    """A large one, on which nothing is measured."""
    hardware = Hardware(cores=2, ram_total=64 * GB, ram_free=60 * GB, disk_free=10**12)
    monkeypatch.setattr(planning, "probe", lambda _: hardware)
    monkeypatch.setattr(planning, "rehearse", lambda *_: StepTime(0.010, 0.080))
    monkeypatch.setattr(planning, "record_seconds", lambda *_, **__: 0.020)
    return hardware


def config_only(folder: Path, **changes: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG | changes))
    return str(folder)


def test_an_installed_model(run) -> None:
    result = run("plan", "tiny")
    assert (result.code, result.err) == (0, "")
    for words in ("tiny:q4 on ", "KV cache, 512 tokens", "It fits: all 8 experts stay in memory.", "Expected: "):
        assert words in result.out
    assert "disk " not in result.out.split("Expected:")[1]


def test_a_folder_with_no_more_than_a_config(run, tmp_path: Path) -> None:
    result = run("plan", config_only(tmp_path / "my model"))
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("my model:q4 on ")
    assert "It fits: all 8 experts" in result.out


@pytest.mark.usefixtures("machine")
def test_a_model_that_was_never_fetched(run) -> None:
    result = run("plan", MIXTRAL, "--ram", "12G")
    assert (result.code, result.err) == (0, "")
    body = json.loads(run("plan", MIXTRAL, "--ram", "12G", "--json").out)
    here, left = body["plan"]["ram_slots"], body["plan"]["disk_records"]
    assert here + left == body["plan"]["n_records"] == 256
    assert f"It runs with {here} of 256 experts at hand" in result.out
    assert f"64 experts x {100 * left / 256:.0f} % not at hand (as if all were equally likely)" in result.out
    assert "arithmetic 400.0 ms: 32 layers x 10.00 ms + 80.00 ms" in result.out
    pace = body["forecast"]["tokens_per_s"]
    assert (f"a token every {1 / pace:.1f} s" if pace < 1 else f"{pace:.1f} tokens/s") in result.out


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("options", [(), ("--batch", "8"), ("--ctx", "32768")])
def test_the_advice_holds(run, options: tuple[str, ...]) -> None:
    """With the memory that it says would hold all experts, all are held."""
    little = run("plan", MIXTRAL, "--ram", "16G", *options).out
    advice = re.search(r"(--ram \d+M --ctx \d+) would hold them all", little)
    assert advice is not None
    assert "It fits: all 256 experts" in run("plan", MIXTRAL, *options, *advice[1].split()).out


@pytest.mark.usefixtures("machine")
def test_several_sequences_at_once(run) -> None:
    one, four = (json.loads(run("plan", MIXTRAL, "--ctx", "4096", "--batch", n, "--json").out) for n in ("1", "4"))
    assert four["plan"]["kv_bytes"] == 4 * one["plan"]["kv_bytes"]
    assert (four["plan"]["sequences"], four["forecast"]["speeds"]["sequences"]) == (4, 4)
    assert four["forecast"]["look"]["experts"] == pytest.approx(32 * 8 * (1 - 0.75**4))
    text = run("plan", MIXTRAL, "--ctx", "4096", "--batch", "4").out
    assert "KV cache, 16384 tokens that 4 sequences of at most 4096 share" in text
    assert "of 4 sequences together" in text


def test_json_holds_every_field(run) -> None:
    body = json.loads(run("plan", "tiny", "--json").out)
    assert set(body) == {"model", "variant", "installed", "hardware", "plan", "forecast", "unmeasured"}
    assert (body["model"], body["variant"], body["installed"], body["unmeasured"]) == ("tiny", "q4", True, None)
    assert set(body["plan"]) == PLAN_FIELDS
    assert {"cores", "ram_total", "ram_free", "disk_free", "gpus"} <= set(body["hardware"])
    assert set(body["forecast"]) == {"tokens_per_s", "compute_s", "disk_s", "look", "speeds"}
    assert set(body["forecast"]["look"]) == {"n_layers", "experts", "found", "learnt"}
    assert set(body["forecast"]["speeds"]) == {"sequences", "layer", "rest", "record"}
    assert run("--json", "plan", "tiny:bf16").out.startswith('{"model": "tiny", "variant": "bf16"')


@pytest.mark.usefixtures("machine")
def test_json_of_a_speed_that_is_not_known(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "rehearsal_bytes", lambda *_: 31 * GB)
    body = json.loads(run("plan", MIXTRAL, "--json").out)
    assert (body["installed"], body["forecast"]) == (False, None)
    assert body["unmeasured"] in run("plan", MIXTRAL).out
    assert "31.0 GB" in body["unmeasured"]


def test_a_gpu_is_a_place_too(run, machine: Hardware, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu("Radiant 9000", 24 * GB, 20 * GB)
    monkeypatch.setattr(budgets, "select", lambda name: None)
    monkeypatch.setattr(planning, "probe", lambda _: Hardware(2, 64 * GB, 60 * GB, 10**12, (gpu,)))
    text = run("plan", MIXTRAL).out
    for words in ("Radiant 9000 with 20.0 GB free", "GPU: experts", "GPU: KV cache", "memory: experts"):
        assert words in text
    body = json.loads(run("plan", MIXTRAL, "--vram", "8G", "--json").out)
    assert body["plan"]["on_gpu"]
    assert 7.9 * GB < body["plan"]["vram_bytes"] <= 8 * GB
    assert body["plan"]["gpu_slots"] + body["plan"]["ram_slots"] == 256


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("tiny", "--ram", "lots"), 2, "--ram 'lots' is no size"),
        (("tiny", "--ctx", "0"), 2, "--ctx 0 is outside 1 to 512"),
        (("tiny", "--experts-per-token", "9"), 2, "--experts-per-token 9 is outside 1 to 4"),
        (("tiny", "--threads", "0"), 2, "threads"),
        (("tiny", "--batch", "0"), 2, "--batch"),
        (("tiny", "--kv-dtype", "f17"), 2, "--kv-dtype"),
        (("tiny", "--vram", "4G"), 2, "--vram needs a GPU"),
        (("tiny:q5",), 2, "no variant 'q5'"),
        (("tiny", "other"), 2, "other"),
        (("nobody",), 3, "no model is called nobody"),
        (("smolmix",), 3, "mixlocal pull smolmix"),
        (("/nowhere/at/all",), 3, "no such folder"),
        (("EMPTY",), 3, "no config.json"),
        (("LLAMA",), 4, "model_type = 'llama' is not supported"),
        (("ODD",), 4, "97 columns cannot be packed"),
        (("NONSENSE",), 4, "not valid JSON"),
        ((MIXTRAL, "--ram", "4G"), 7, f"{MIXTRAL}:q4 needs at least --ram 4"),
        (("tiny", "--batch", "100000000"), 7, "tiny:q4 needs at least --ram"),
    ],
)
def test_bad_input(run, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    for name in ("empty", "nonsense"):
        (tmp_path / name).mkdir()
    (tmp_path / "nonsense" / "config.json").write_text("{")
    places = {
        "EMPTY": str(tmp_path / "empty"), "NONSENSE": str(tmp_path / "nonsense"),
        "LLAMA": config_only(tmp_path / "llama", model_type="llama"),
        "ODD": config_only(tmp_path / "odd", intermediate_size=97),
    }  # fmt: skip
    result = run("plan", *(places.get(word, word) for word in arguments))
    assert result.code == code, result.err
    assert says in result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) <= 2


def test_nothing_is_written_and_nothing_is_loaded(
    run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_run, "load_trunk", lambda *_: pytest.fail("loaded a trunk"))
    monkeypatch.setattr(ExpertFile, "read", lambda *_: pytest.fail("loaded an expert"))
    folder = config_only(tmp_path / "bare")

    def everything() -> dict[Path, tuple[int, int]]:
        paths = [*home.rglob("*"), *tmp_path.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}

    before = everything()
    for model in ("tiny", folder):
        assert run("plan", model).code == 0
    assert run("--home", str(tmp_path / "new home"), "plan", folder).code == 0
    assert everything() == before
