"""A config.json that lies is refused before anything is built on it, in one line that names file and field."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from mixlocal.errors import RefusedError
from mixlocal.model.arch import read_config
from mixlocal.model.config import ModelConfig
from mixlocal.store.strict_json import MAX_BYTES, read_json_object

COUNTS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "num_local_experts", "num_experts_per_tok", "max_position_embeddings", "vocab_size",
)  # fmt: skip
WRONG = {
    "zero": "0", "minus one": "-1", "a billion": "1000000000", "infinity": "1e400", "minus infinity": "-1e400",
    "a fraction": "2.5", "a whole float": "64.0", "a string": '"64"', "true": "true", "a list": "[64]",
    "an object": '{"a": 64}', "4000 digits": "9" * 4000, "lines": r'"6\n4\u001b[2J"',
}  # fmt: skip
NOT_FOR_NUMBERS = {"a fraction", "a whole float"}  # theta and epsilon are real numbers
OPTIONAL = {"num_key_value_heads", "rope_theta", "sliding_window", "head_dim", "tie_word_embeddings", "rope_parameters"}


def written(folder: Path, changes: dict[str, str], drop: str = "") -> Path:
    """A config.json; `changes` are JSON texts, so that they can hold what `json.dumps` would not write."""
    fields = {key: json.dumps(value) for key, value in tiny.CONFIG.items() if key != drop} | changes
    path = folder / "config.json"
    path.write_text("{" + ", ".join(f"{json.dumps(key)}: {text}" for key, text in fields.items()) + "}")
    return path


def read(path: Path) -> ModelConfig:
    return read_config(read_json_object(path), str(path))


def refusal(path: Path) -> str:
    """The message of the refusal of a config.json: one printable line of bearable length that names the file."""
    with pytest.raises(RefusedError) as caught:
        read(path)
    message = caught.value.message
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) - len(str(path)) < 200
    return message


COUNT_LIES = [(field, {field: text}, f"{field}, {what}") for field in COUNTS for what, text in WRONG.items()]
NUMBER_LIES = [
    (field, {field: text}, f"{field}, {what}")
    for field in ("rms_norm_eps", "rope_theta")
    for what, text in WRONG.items()
    if what not in NOT_FOR_NUMBERS and (field, what) != ("rope_theta", "a billion")
]
OPTIONAL_LIES = [
    (field, {field: text}, f"{field}, {what}")
    for field in ("sliding_window", "head_dim")
    for what, text in WRONG.items()
]
SWITCH_LIES = [
    (field, {field: text}, f"{field} = {text}")
    for field, text in itertools.product(("tie_word_embeddings", "attention_bias"), ("0", "1", '"false"', "[]", "{}"))
]
MISSING = [(field, {field: "null"}, f"{field}, null") for field in (*COUNTS, "rms_norm_eps") if field not in OPTIONAL]
CONTRADICTIONS: list[tuple[str, dict[str, str], str]] = [
    ("num_attention_heads", {"num_attention_heads": "3"}, "heads do not divide the width"),
    ("head_dim", {"hidden_size": "60"}, "head_dim comes out odd"),
    ("head_dim", {"head_dim": "15"}, "head_dim is odd"),
    ("num_key_value_heads", {"num_key_value_heads": "3"}, "kv heads do not divide the heads"),
    ("num_key_value_heads", {"num_key_value_heads": "8"}, "more kv heads than heads"),
    ("num_experts_per_tok", {"num_experts_per_tok": "5"}, "more experts a token than experts"),
    ("num_experts_per_tok", {"num_local_experts": "1"}, "fewer experts than a token needs"),
    ("hidden_act", {"hidden_act": '"gelu"'}, "another activation"),
    ("hidden_act", {"hidden_act": "7"}, "an activation that is a number"),
    ("attention_bias", {"attention_bias": "true"}, "attention with a bias"),
    ("rope_scaling", {"rope_scaling": '{"type": "yarn", "factor": 4.0}'}, "scaled rotary embeddings"),
    ("rope_scaling", {"rope_scaling": "{}"}, "empty rope_scaling"),
    ("rope_scaling", {"rope_scaling": '"none"'}, "rope_scaling that is a string"),
    ("rope_parameters", {"rope_parameters": "[]"}, "rope_parameters that are a list"),
    ("rope_parameters: rope_theta", {"rope_parameters": "{}"}, "rope_parameters without theta"),
    ("rope_parameters: rope_theta", {"rope_parameters": '{"rope_theta": true}'}, "theta that is true"),
    ("rope_parameters: rope_type", {"rope_parameters": '{"rope_theta": 1e4, "rope_type": "yarn"}'}, "yarn"),
    ("factor", {"rope_parameters": '{"rope_theta": 1e4, "factor": 2}'}, "a factor in rope_parameters"),
    ("rope_theta", {"rope_parameters": '{"rope_theta": 20000.0}'}, "two thetas"),
    ("qk_norm", {"qk_norm": "true"}, "an unknown setting"),
    ("n_shared", {"n_shared": "0"}, "an unknown setting that is zero"),
    (r"\n", {"a\nb": "1"}, "an unknown setting of two lines"),
    ("model_type", {"model_type": '"llama"'}, "llama"),
    ("model_type", {"model_type": '"qwen3_moe"'}, "qwen3_moe"),
    ("model_type", {"model_type": '"Mixtral"'}, "a capital letter"),
    ("model_type", {"model_type": '["mixtral"]'}, "a list of types"),
    ("model_type", {"model_type": "null"}, "null for a type"),
    ("model_type", {"model_type": '{"mixtral": 1}'}, "an object for a type"),
]
LIES = COUNT_LIES + NUMBER_LIES + OPTIONAL_LIES + SWITCH_LIES + MISSING + CONTRADICTIONS


def test_the_table_is_long() -> None:
    assert len({name for _, _, name in LIES}) == len(LIES) >= 150


@pytest.mark.parametrize(("field", "changes"), [lie[:2] for lie in LIES], ids=[lie[2] for lie in LIES])
def test_a_lie_is_refused_by_the_name_of_its_field(field: str, changes: dict[str, str], tmp_path: Path) -> None:
    assert field in refusal(written(tmp_path, changes)).removeprefix(str(tmp_path))


@pytest.mark.parametrize("field", [f for f in (*COUNTS, "rms_norm_eps", "model_type") if f not in OPTIONAL])
def test_a_missing_field_is_refused_by_name(field: str, tmp_path: Path) -> None:
    assert field in refusal(written(tmp_path, {}, drop=field))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not valid JSON"),
        (b"null", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b'"mixtral"', "not a JSON object"),
        (b"{", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"rms_norm_eps": NaN}', "NaN"),
        (b'{"rms_norm_eps": -Infinity}', "-Infinity"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"hidden_size": 64, "hidden_size": 128}', "'hidden_size' stands twice"),
        (b'{"a": {"x\\n\\u001b": 1, "x\\n\\u001b": 1}}', "stands twice"),
        (b'{"model_type": "mixtral\xff"}', "not valid JSON"),
        (b'{"model_type": "\xed\xa0\x80"}', "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        ("{}".encode("utf-16"), "not valid JSON"),
        ("{}".encode("utf-32-le"), "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": "' + b"x" * 2_000_000 + b'"}', f"larger than {MAX_BYTES} bytes"),
        (b" " * 2_000_000, f"larger than {MAX_BYTES} bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[:12]),
)
def test_what_is_not_a_json_object_is_refused_with_the_reason(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    assert reason in refusal(path)


def test_a_value_nested_to_any_depth_is_refused(tmp_path: Path) -> None:
    """Some depths are within the parser's reach and beyond that of a message that shows the value."""
    for depth in range(1, 1100, 3):
        refusal(written(tmp_path, {"hidden_size": "[" * depth + "]" * depth}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": None}, {"sliding_window": None}),
        ({"sliding_window": 128}, {"sliding_window": 128}),
        ({"num_key_value_heads": None}, {"n_kv_heads": 4}),
        ({"head_dim": None}, {"head_dim": 16}),
        ({"head_dim": 32}, {"head_dim": 32}),
        ({"rope_theta": None}, {"rope_theta": 1e6}),
        ({"rope_theta": 10_000}, {"rope_theta": 1e4}),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 10_000}}, {"rope_theta": 1e4}),
        ({"rope_parameters": None, "rope_scaling": None}, {"rope_theta": 1e4}),
        ({"tie_word_embeddings": True}, {"tied_embeddings": True}),
        ({"tie_word_embeddings": None}, {"tied_embeddings": False}),
        ({"hidden_act": None, "attention_bias": None}, {"dim": 64}),
        ({"attention_bias": False}, {"dim": 64}),
        ({"attention_dropout": 0.0, "router_jitter_noise": 0.0, "use_cache": True}, {"dim": 64}),
        ({"auto_map": {"AutoModel": "evil.Model"}, "transformers_version": "5.0.0"}, {"dim": 64}),
        ({"qk_norm": None}, {"dim": 64}),
    ],
    ids=str,
)
def test_a_good_variant_is_accepted(changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    config = read(written(tmp_path, {key: json.dumps(value) for key, value in changes.items()}))
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("field", ["num_key_value_heads", "rope_theta", "sliding_window", "tie_word_embeddings"])
def test_an_optional_field_may_be_absent(field: str, tmp_path: Path) -> None:
    assert read(written(tmp_path, {}, drop=field)).dim == 64
