"""mixlocal quantize, ls, show, verify, rm, pull, doctor"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

from mixlocal.cli import COMMANDS
from mixlocal.kernels.isa import native_isas

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip


def test_show_explains_mixtral_from_its_config_alone(run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    body = json.loads(run("show", "--json", str(tmp_path)).out)
    assert body["total"] == 46_702_792_704
    assert body["active"] == 12_879_925_248
    assert sum(part["total"] for part in body["parts"].values()) == body["total"]
    assert body["parts"]["experts"] == {"total": 45_097_156_608, "active": 11_274_289_152}
    text = run("show", str(tmp_path)).out
    for words in ("46.7 B", "12.9 B", "8 x 7.2 B is 57.9 B", "exist 8 times"):
        assert words in text


def test_the_catalogue_agrees_with_the_arithmetic(run, tmp_path: Path) -> None:
    assert "46.7 B parameters, 12.9 B active" in run("show", "mixtral-8x7b").out
    larger = MIXTRAL_8X7B | {
        "hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48, "num_hidden_layers": 56,
        "vocab_size": 32768, "max_position_embeddings": 65536,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(larger))
    ours = json.loads(run("show", "--json", str(tmp_path)).out)
    listed = json.loads(run("show", "--json", "mixtral-8x22b-instruct").out)
    assert (ours["total"], ours["active"]) == (listed["total"], listed["active"])


def test_smolmix_is_as_large_as_the_catalogue_says(run, tmp_path: Path) -> None:
    dims = {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B | dims))
    ours = json.loads(run("show", "--json", str(tmp_path)).out)
    listed = json.loads(run("show", "--json", "smolmix").out)
    assert (ours["total"], ours["active"]) == (listed["total"], listed["active"])


def test_show_an_installed_model(run) -> None:
    text = run("show", "tiny", "--layout").out
    for words in ("tiny:q4", "experts nf4", "w1.codes", "w2.scales", "router"):
        assert words in text
    assert "none" in run("show", "tiny", "--template").out


def test_ls_lists_what_is_here_and_what_could_be(run) -> None:
    rows = json.loads(run("ls", "--json").out)
    assert {(row["model"], row["variant"]) for row in rows} == {("tiny", "q4"), ("tiny", "bf16")}
    everything = run("ls", "--all").out
    for name in ("tiny", "smolmix", "mixtral-8x7b", "mixtral-8x7b-instruct", "mixtral-8x22b-instruct"):
        assert name in everything


def test_quantize_verify_rm(run, tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "my model")
    report = tmp_path / "report.json"
    home = ("--home", str(tmp_path / "home"))
    made = run(*home, "quantize", str(checkpoint), "--bits", "8", "--report", str(report))
    assert made.code == 0, made.err
    assert "relative error" in made.err
    assert len(json.loads(report.read_text())) == 24
    assert (tmp_path / "home/models/my-model/q8/manifest.json").is_file()
    assert "is whole" in run(*home, "verify", "my-model").err
    asked = run(*home, "rm", "my-model")
    assert (asked.code, "--yes" in asked.err) == (2, True)
    assert run(*home, "rm", "my-model", "--yes").code == 0
    assert run(*home, "verify", "my-model").code == 3
    assert run(*home, "ls").out == ""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("quantize", "NOWHERE/x"), 3, "no such folder"),
        (("quantize", "EMPTY"), 3, "no config.json"),
        (("quantize", "nobody"), 3, "no model is called nobody"),
        (("quantize", "CHECKPOINT", "--bits", "8", "--method", "nf4"), 2, "contradict"),
        (("quantize", "CHECKPOINT", "--bits", "5"), 2, "5"),
        (("quantize", "mixtral-8x7b"), 3, "nothing of it is here to be quantized"),
        (("pull", "nobody"), 3, "known: smolmix"),
        (("pull", "../../nowhere/etc"), 3, "no such folder"),
        (("show", "nobody"), 3, "nobody"),
        (("verify", "nobody"), 3, "nobody"),
        (("rm", "nobody", "--yes"), 3, "nobody"),
        (("frobnicate",), 2, "frobnicate"),
    ],
)
def test_bad_input(run, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    (tmp_path / "empty").mkdir()
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    places = {"NOWHERE/x": f"{tmp_path}/nowhere", "EMPTY": str(tmp_path / "empty"), "CHECKPOINT": str(checkpoint)}
    result = run("--home", str(tmp_path / "home"), *(places.get(word, word) for word in arguments))
    assert result.code == code, result.err
    assert says in result.err
    assert "Traceback" not in result.err
    assert not list(tmp_path.rglob("*.bin"))


def test_a_damaged_store_never_answers(run, home: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(home / "models" / "tiny" / "q4", broken)
    data = bytearray((broken / "experts.bin").read_bytes())
    data[5000] ^= 1
    (broken / "experts.bin").write_bytes(data)
    for command in (("prompt", "-m", str(broken), "--raw", "x"), ("verify", str(broken))):
        result = run(*command)
        assert result.code == 8
        assert result.out == ""
        assert "layer 0 expert 0 is damaged" in result.err


def test_names_from_outside_reach_the_terminal_visibly(run, tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint", **{"\x1b]0;owned\x07": 1})
    result = run("quantize", str(checkpoint))
    assert result.code == 4
    assert "\x1b" not in result.err
    assert "]0;owned" in result.err


def test_doctor_names_what_is_here(run) -> None:
    rows = {row["what"]: row for row in json.loads(run("doctor", "--json").out)}
    assert rows["memory"]["verdict"] == "good"
    assert "torch" in rows["libraries"]["found"]
    assert run("doctor").code == 0


def test_doctor_measures_the_memory_and_reports_a_wrong_instruction_set(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> dict[str, dict[str, str]]:
        return {row["what"]: row for row in json.loads(run("doctor", "--json").out)}

    if native_isas():
        assert "GB/s" in rows()["bandwidth"]["found"]
    monkeypatch.setenv("MIXLOCAL_ISA", "reference")
    assert rows()["kernels"]["verdict"] == "lack"
    assert "slower" in rows()["kernels"]["cost"]
    monkeypatch.setenv("MIXLOCAL_ISA", "sse9")
    assert rows()["kernels"]["verdict"] == "bad"
    assert "reference" in rows()["kernels"]["cost"]


def test_version_and_help(run) -> None:
    assert run("--version").out.startswith("mixlocal, version")
    for command in COMMANDS:
        assert run(command, "--help").code == 0
