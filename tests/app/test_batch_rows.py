"""Lines of a batch's input: what each asks, or what is said of one that cannot be asked."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixlocal.app.batch import lines as lines_module
from mixlocal.app.batch.lines import Line, guess_format, read_lines
from mixlocal.app.batch.read_row import read_row
from mixlocal.app.batch.row import Row, request, row_seed
from mixlocal.app.batch.row_template import RowTemplate
from mixlocal.app.batch.setup import Setup
from mixlocal.app.batch.source import Source, detect_format
from mixlocal.app.template import Message
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import RefusedError, UsageError

OPENAI, JSONL, TXT = Setup("openai"), Setup("jsonl"), Setup("txt")
HELLO = [{"role": "user", "content": "Hello"}]


def row(value: Any, setup: Setup = JSONL, number: int = 7) -> Row:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return read_row(Line(number, data), setup)


def asked(value: Any, setup: Setup = JSONL) -> Any:
    found = row(value, setup)
    assert found.error is None, found.error
    return found.asked


def openai(body: dict[str, Any], url: str = "/v1/chat/completions", **more: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | more


def test_openai_chat() -> None:
    body = {
        "model": "gpt-x", "messages": [{"role": "developer", "content": "Be brief."}, *HELLO], "temperature": 0,
        "top_p": 0.5, "max_completion_tokens": 9, "seed": 3, "stop": "END", "n": 1, "logprobs": True, "top_logprobs": 2,
        "top_k": 4, "min_p": 0.1, "repeat_penalty": 1.2, "stream": False, "user": "me", "presence_penalty": 0,
    }  # fmt: skip
    found = asked(openai(body), OPENAI)
    assert found.prompt == (Message("system", "Be brief."), Message("user", "Hello"))
    assert found.model == "gpt-x"
    assert not found.raw
    assert SamplingParams(**found.sampling) == SamplingParams(0.0, 0.5, 4, 0.1, 1.2, 9, 3, ("END",), 2)


def test_openai_completion_goes_on_with_its_text() -> None:
    found = asked(openai({"prompt": "Once", "max_tokens": 5, "logprobs": 3}, "/v1/completions"), OPENAI)
    assert (found.prompt, found.raw) == ("Once", True)
    assert found.sampling == {"max_tokens": 5, "logprobs": 3}


def test_openai_text_in_parts_and_json() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    body = {"messages": [{"role": "user", "content": parts}], "response_format": named}
    found = asked(openai(body), OPENAI)
    assert found.prompt == (Message("user", "Hello"),)
    assert found.form.accepts('{"x": 1}')
    assert not found.form.accepts('{"x": "1"}')
    free = asked(openai({"messages": HELLO, "response_format": {"type": "json_object"}}), OPENAI)
    assert free.form.accepts('{"anything": null}')
    plain = openai({"messages": HELLO, "response_format": {"type": "text"}})
    assert asked(plain, replace(OPENAI, form=free.form)).form is None


def test_our_own_lines() -> None:
    assert asked({"prompt": "Hi"}).prompt == "Hi"
    assert asked({"prompt": "Hi", "system": "S"}).prompt == (Message("system", "S"), Message("user", "Hi"))
    assert asked({"messages": HELLO}).prompt == (Message("user", "Hello"),)
    assert asked({"prompt": "Hi", "raw": True}, replace(JSONL, system="S")).prompt == "Hi"
    found = asked({"prompt": "Hi", "temperature": 1, "stop": ["a", "b"], "logprobs": 2, "schema": {"type": "object"}})
    assert found.sampling == {"temperature": 1.0, "stop": ("a", "b"), "logprobs": 2}
    assert found.form.accepts("{}")
    assert asked({"prompt": "Hi", "json_object": True}).form.accepts('{"a": 1}')
    assert asked({"prompt": "Hi", "temperature": None}).sampling == {}


def test_a_text_line() -> None:
    assert asked(b" Hi there\t", TXT).prompt == " Hi there\t"
    assert row(b"Hi", TXT, 12).id == "12"
    assert asked("\u2028\x00".encode(), TXT).prompt == "\u2028\x00"


def test_rows_win_over_the_command_line() -> None:
    setup = replace(JSONL, system="Ours", sampling={"temperature": 0.1, "top_k": 3})
    assert asked({"prompt": "Hi", "temperature": 0.9}, setup).sampling == {"temperature": 0.9, "top_k": 3}
    assert asked({"prompt": "Hi"}, setup).prompt[0] == Message("system", "Ours")
    assert asked({"prompt": "Hi", "system": "Mine"}, setup).prompt[0] == Message("system", "Mine")
    assert asked({"prompt": "Hi", "system": ""}, setup).prompt == "Hi"
    own = [{"role": "system", "content": "Mine"}, *HELLO]
    assert len(asked(openai({"messages": own}), replace(OPENAI, system="Ours")).prompt) == 2
    assert len(asked(openai({"messages": HELLO}), replace(OPENAI, system="Ours")).prompt) == 2


def test_ids() -> None:
    assert row({"id": "x", "prompt": ""}).id == "x"
    assert row({"id": 5, "prompt": ""}).id == "5"
    assert row({"prompt": ""}, number=31).id == "31"
    assert row({"id": None, "prompt": ""}, number=31).id == "31"


BAD = [
    (JSONL, b"{nonsense", None, "not valid JSON"),
    (JSONL, b'"text"', None, "not a JSON object"),
    (JSONL, b"[1]", None, "not a JSON object"),
    (JSONL, b'{"id": "x", "prompt": "\xff"}', None, "utf-8"),
    (JSONL, b'{"id": "x", "id": "y", "prompt": ""}', None, "'id' stands twice"),
    (JSONL, b'{"id": "x", "prompt": NaN}', None, "NaN is not a number"),
    (JSONL, b'{"id": "x", "prompt": ' + b"[" * 100_000, None, "nested too deeply"),
    (JSONL, b'{"id": "x", "seed": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
    (JSONL, b'{"id": "x", "prompt": "\\ud800"}', "x", "\\ud800 without its other half"),
    (JSONL, b'{"id": "\\ud800", "prompt": ""}', None, "its id is no text"),
    (JSONL, {"id": "", "prompt": ""}, None, "its id has 0 characters"),
    (JSONL, {"id": "x" * 513, "prompt": ""}, None, "513 characters"),
    (JSONL, {"id": True, "prompt": ""}, None, "its id must be a text"),
    (JSONL, {"id": "x", "promt": ""}, "x", "unknown field `promt`"),
    (JSONL, {"id": "x"}, "x", "needs a prompt or messages"),
    (JSONL, {"id": "x", "prompt": "", "messages": HELLO}, "x", "both a prompt and messages"),
    (JSONL, {"id": "x", "messages": []}, "x", "messages is empty"),
    (JSONL, {"id": "x", "messages": HELLO, "raw": True}, "x", "raw goes with a prompt"),
    (JSONL, {"id": "x", "prompt": "", "raw": True, "system": "s"}, "x", "no place for a system text"),
    (JSONL, {"id": "x", "prompt": 5}, "x", "expected `str | null`, got `int` - at `prompt`"),
    (JSONL, {"id": "x", "prompt": "", "temperature": -1}, "x", "temperature = -1.0 is outside 0 to 100"),
    (JSONL, b'{"id": "x", "prompt": "", "temperature": 1e400}', "x", "temperature = inf"),
    (JSONL, {"id": "x", "prompt": "", "temperature": True}, "x", "got `bool` - at `temperature`"),
    (JSONL, {"id": "x", "prompt": "", "max_tokens": 10**30}, "x", "max-tokens"),
    (JSONL, {"id": "x", "prompt": "", "stop": ""}, "x", "empty string"),
    (JSONL, {"id": "x", "prompt": "", "schema": {"type": "nonsense"}}, "x", "cannot be followed"),
    (JSONL, {"id": "x", "prompt": "", "schema": {}, "json_object": True}, "x", "only one of them"),
    (TXT, b"caf\xe9", "7", "not UTF-8: byte 3 is 0xe9"),
    (OPENAI, {"url": "/v1/completions", "body": {}}, None, "has no custom_id"),
    (OPENAI, {"custom_id": 5, "url": "/v1/completions", "body": {}}, None, "its id must be a text"),
    (OPENAI, {"custom_id": "a", "body": {"messages": HELLO}}, "a", "missing required field `url`"),
    (OPENAI, openai({"messages": HELLO}, method="GET"), "a", "invalid enum value 'GET' - at `method`"),
    (OPENAI, openai({"input": "x"}, "/v1/embeddings"), "a", "invalid enum value '/v1/embeddings'"),
    (OPENAI, openai({"prompt": "x"}), "a", "unknown field `prompt` - at `body`"),
    (OPENAI, openai({"messages": HELLO, "tools": []}), "a", "unknown field `tools` - at `body`"),
    (OPENAI, openai({"messages": [{"role": "tool", "content": ""}]}), "a", "at `body.messages[0].role`"),
    (OPENAI, openai({"messages": HELLO, "n": 2}), "a", "n = 2: only 1 is possible"),
    (OPENAI, openai({"messages": HELLO, "stream": True}), "a", "stream = True"),
    (OPENAI, openai({"messages": HELLO, "frequency_penalty": 0.5}), "a", "frequency_penalty = 0.5"),
    (OPENAI, openai({"messages": HELLO, "top_logprobs": 2}), "a", "top_logprobs needs logprobs"),
    (OPENAI, openai({"messages": HELLO, "response_format": {"type": "json_schema"}}), "a", "response_format"),
]  # fmt: skip


@pytest.mark.parametrize(("setup", "value", "name", "says"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_asked(setup: Setup, value: Any, name: str | None, says: str) -> None:
    found = row(value, setup)
    assert found.asked is None
    assert found.id == name
    assert found.error is not None
    assert found.error.message.startswith("line 7: ")
    assert says in found.error.message
    assert len(found.error.message) < 500


def test_the_key_changes_with_whatever_the_answer_depends_on() -> None:
    base = {"id": "x", "prompt": "Hi", "temperature": 0.5}
    others = [
        {"id": "y"}, {"prompt": "Ho"}, {"temperature": 0.6}, {"seed": 1}, {"raw": True}, {"system": "S"},
        {"stop": ["a"]}, {"json_object": True}, {"prompt": None, "messages": HELLO},
    ]  # fmt: skip
    keys = {row(base | other).key for other in [{}, *others]}
    assert len(keys) == 1 + len(others)
    same = {"temperature": 0.5, "prompt": "Hi", "id": "x", "raw": False}
    assert row(same, number=99).key == row(base).key


def test_a_row_without_a_seed_has_one_of_its_own_that_stays() -> None:
    defaults = SamplingParams(top_k=5)
    first, second = (request(row({"id": name, "prompt": "Hi"}), defaults, 1) for name in "ab")
    assert first.params.seed == row_seed(1, "a") != second.params.seed
    assert first.params.top_k == 5
    assert row_seed(1, "a") != row_seed(2, "a")
    assert 0 <= row_seed(1, "a") < 1 << 53
    assert request(row({"prompt": "", "seed": 0}), defaults, 1).params.seed == 0


@pytest.mark.parametrize(
    ("source", "fields", "text"),
    [
        ("Tell: {a}", {"a": "x"}, "Tell: x"),
        ("{{{a}}} { b }", {"a": 1, "b": None}, "{1} null"),
        ("{a}", {"a": {"x": ["é"]}}, '{"x": ["é"]}'),
        ("{a}{a}", {"a": "{b}"}, "{b}{b}"),
        ("{a.b}", {"a.b": "dots are part of a name"}, "dots are part of a name"),
    ],
)
def test_a_template(source: str, fields: dict[str, Any], text: str) -> None:
    assert RowTemplate(source).fill(fields) == text


@pytest.mark.parametrize(
    ("source", "says"), [("{a", "without its other half at character 1"), ("a}", "character 2"), ("{}", "no field"),
                         ("{{a}}", "names no field"), ("", "names no field")],
)  # fmt: skip
def test_no_template(source: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        RowTemplate(source)


def test_a_template_makes_rows_of_any_fields() -> None:
    setup = replace(JSONL, template=RowTemplate("Say {word} {times} times: {prompt}"))
    found = asked({"id": "x", "word": "hi", "times": 2, "prompt": "now", "top_k": 3}, setup)
    assert found.prompt == "Say hi 2 times: now"
    assert found.sampling == {"top_k": 3}
    assert "has no field 'times'" in row({"id": "x", "word": "hi", "prompt": ""}, setup).error.message
    bad = b'{"word": "a", "times": 1e400, "prompt": ""}'
    assert row(bad, setup).error is None  # a text may say Infinity
    lone = b'{"word": "\\ud800", "times": 1, "prompt": ""}'
    assert "without its other half" in row(lone, setup).error.message
    assert asked(b"Hi", replace(TXT, template=RowTemplate("<{line}>"))).prompt == "<Hi>"


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 10)
    monkeypatch.setattr(lines_module, "_SKIP", 4)
    data = b"\xef\xbb\xbfone\r\n\n  \t\n" + b"x" * 10 + b"\n" + b"y" * 11 + b"\n" + b"z" * 100 + b"\nlast"
    found = list(read_lines(io.BytesIO(data), "f"))
    assert found == [Line(1, b"one"), Line(4, b"x" * 10), Line(5, None), Line(6, None), Line(7, b"last")]
    assert "longer than" in read_row(found[2], JSONL).error.message
    assert list(read_lines(io.BytesIO(b"x" * 10 + b"\r\n"), "f")) == [Line(1, b"x" * 10)]


def test_utf_16_is_said_at_once() -> None:
    with pytest.raises(UsageError, match="f is UTF-16"):
        list(read_lines(io.BytesIO("x\n".encode("utf-16")), "f"))


@pytest.mark.parametrize(
    ("suffix", "first", "kind"),
    [
        (".txt", b'{"custom_id": 1}', "txt"), (".jsonl", b'{"custom_id": "a"}', "openai"),
        (".jsonl", b'{"prompt": "a \\"custom_id\\" in it"}', "jsonl"), (".jsonl", b"{broken", "jsonl"),
        ("", b'{"prompt": ""}', "jsonl"), ("", b"Why?", "txt"), (".md", b"Why?", "txt"), (".JSONL", None, "jsonl"),
        ("", None, "txt"),
    ],
)  # fmt: skip
def test_the_format_is_guessed(suffix: str, first: bytes | None, kind: str, tmp_path: Path) -> None:
    assert guess_format(suffix, Line(1, first) if first else None) == kind
    path = tmp_path / "x"
    path.write_bytes(b"\n" + (first or b""))
    assert detect_format(path, f"x{suffix}") == kind


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_text('{"id": "a", "prompt": "1"}\n\n{"prompt": "2"}\n{"id": 3, "prompt": "3"}\n')
    with pytest.raises(RefusedError, match="lines 3 and 4 have the same id, '3'"):
        Source(path, "in", JSONL).survey()
    path.write_text('{"id": "a", "prompt": "1"}\n{"id": "a", "prompt": "1"}\n')
    with pytest.raises(RefusedError, match="lines 1 and 2"):
        Source(path, "in", JSONL).survey()
    assert len(Source(path, "in", JSONL, limit=1).survey().keys) == 1


SEEDS = [
    (OPENAI, openai({"model": "m", "messages": HELLO, "temperature": 0.5, "stop": ["a"], "seed": 4, "logprobs": True,
                     "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}})),
    (OPENAI, openai({"prompt": "Once", "max_tokens": 5, "top_p": 1e-3}, "/v1/completions")),
    (JSONL, {"id": "x", "prompt": "Grüße \u2028 \\ud83d", "raw": False, "min_p": 0.5, "schema": {"type": "string"}}),
    (replace(JSONL, template=RowTemplate("{a} of {b}")), {"a": [1, 2.5e3, None], "b": {"c": "d"}, "seed": 1}),
    (TXT, "plain text with ünïcode"),
]  # fmt: skip
TOKENS = [
    b"{", b"}", b"[", b"]", b'"', b"\\", b":", b",", b"null", b"NaN", b"1e999", b"-0", b"\x00", b"\xff", b"\r", b" ",
    b"\xed\xa0\x80", b"\\ud800", b'"id"', b'"schema":{"$ref":"#"}', b"9" * 400, b"[" * 1200, b'{"a":' * 300,
]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 3)):
        at, end = sorted(rng.randint(0, len(data)) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 2:
            data = data[:at] + data[end:]
        elif kind == 3:
            data = data[:at] + data[at:end] * 2 + data[end:]
        else:
            data = data[:at] + rng.choice(TOKENS) + data[min(len(data), at + rng.randint(0, 8)) :]
    return data.replace(b"\n", b" ")


def test_ten_thousand_mutated_lines() -> None:
    """Each is a row with a request that can be written down, or one with an error of one line."""
    rng = random.Random(11)
    good = 0
    for n in range(10_000):
        setup, value = SEEDS[n % len(SEEDS)]
        data = mutated(value.encode() if isinstance(value, str) else json.dumps(value).encode(), rng)
        found = read_row(Line(n, data), setup)
        assert (found.asked is None) is (found.error is not None)
        if found.asked is None:
            assert isinstance(found.error, UsageError)
            assert len(found.error.message) < 500
            continue
        good += 1
        asked = request(found, SamplingParams(), 1)
        json.dumps([asked.id, str(asked.prompt)], ensure_ascii=False).encode()
    assert 1000 < good < 8000
