"""Answers for programs: JSON lines, code alone, JSON by a schema, what would be sent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixlocal.app.session import Session
from mixlocal.cli.answer import Answer
from mixlocal.cli.options import Globals
from mixlocal.cli.prompt_output import ExtractedCode
from mixlocal.engine.params import SamplingParams

GREEDY = ("-m", "tiny", "--raw", "-T", "0", "-n", "12")
SHORT = '{"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false}'


def test_stream_json(run) -> None:
    result = run("prompt", *GREEDY, "--stream-json", "--logprobs", "2", "--prefill", "Well, ", "Hello")
    *events, last = [json.loads(line) for line in result.out.splitlines()]
    assert [event["event"] for event in events[:3]] == ["prefill", "prefill", "text"]
    assert events[1] == {"event": "prefill", "done": 11, "total": 11, "kept": 0}
    texts = [event for event in events if event["event"] == "text"]
    assert texts[0] == {"event": "text", "text": "Well, "}
    assert "".join(event["text"] for event in texts) == last["text"]
    tokens = [event for event in texts if "token_id" in event]
    assert [event["token_id"] for event in tokens] == last["token_ids"]
    assert [event["top"] for event in tokens] == [entry["top"] for entry in last["logprobs"]]
    envelope = json.loads(run("prompt", *GREEDY, "--json", "--logprobs", "2", "--prefill", "Well, ", "Hello").out)
    assert last.pop("event") == "done"
    assert last.keys() == envelope.keys()
    assert last["text"] == envelope["text"]
    assert "logprobs" not in json.loads(run("prompt", *GREEDY, "--stream-json", "Hello").out.splitlines()[-1])


def test_json_is_ascii(run) -> None:
    result = run("prompt", "-m", "tiny", "--raw", "-T", "2", "--seed", "1", "-n", "60", "--stream-json", "Hello")
    assert result.out.isascii()
    assert "\x1b" not in result.out


def extracted(tmp_path: Path, text: str, finish: str) -> str:
    class NoSession:
        warnings = ()

    options = Globals(home=str(tmp_path), quiet=False, color="never", as_json=False, debug=False)
    answer = Answer(NoSession(), SamplingParams())  # type: ignore[arg-type]
    answer.text, answer.finish = text, finish
    return ExtractedCode(options, answer).text()


@pytest.mark.parametrize(
    ("text", "finish", "code", "says"),
    [
        ("So:\n```sh\nls\n```\n```sh\nrm\n```\n", "stop", "ls\n", ""),
        ("no code", "stop", "no code", "no code block"),
        ("ls -l\n```\nThat lists files.", "stop", "ls -l\n```\nThat lists files.", "no code block"),
        ("```sh\nls -l", "stop", "ls -l", "ended inside"),
        ("```\nls -l", "length", "ls -l", "ended inside"),
        ("```\nls -l", "interrupted", "ls -l", "ended inside"),
    ],
)
def test_extract(tmp_path: Path, capsys: pytest.CaptureFixture[str], text, finish, code, says) -> None:
    assert extracted(tmp_path, text, finish) == code
    assert (says in capsys.readouterr().err) if says else capsys.readouterr().err == ""


def test_extract_prints_the_code_alone(run) -> None:
    result = run("prompt", *GREEDY, "-x", "--prefill", "So:\n```sh\nls\n```\n", "Hello")
    assert (result.code, result.out) == (0, "ls\n")
    whole = run("prompt", *GREEDY, "-x", "Hello")
    assert (whole.code, whole.out) == (0, run("prompt", *GREEDY, "--no-stream", "Hello").out)
    assert "warning: the answer has no code block" in whole.err


@pytest.mark.parametrize("raw", [(), ("--raw",)])
@pytest.mark.parametrize("mode", [(), ("--no-stream",), ("--json",), ("--stream-json",)])
def test_schema(run, tmp_path: Path, mode: tuple[str, ...], raw: tuple[str, ...]) -> None:
    file = tmp_path / "schema.json"
    file.write_text(SHORT)
    given = ("-m", "tiny", *raw, "-T", "1", "--seed", "5")
    for schema in (SHORT, str(file)):
        result = run("prompt", *given, *mode, "--schema", schema, "Hello")
        assert result.code == 0, result.err
        last = result.out.splitlines()[-1] if mode == ("--stream-json",) else result.out
        body = json.loads(last)
        assert body.get("finish_reason", "stop") == "stop"
        assert json.loads(body.get("text", last))["a"] in (True, False)


def test_schema_goes_on_from_a_prefill(run) -> None:
    begun = '{ "a": t'
    result = run("prompt", *GREEDY, "--schema", SHORT, "--prefill", begun, "Hello")
    assert (result.code, json.loads(result.out)) == (0, {"a": True})
    assert result.out.startswith(begun)
    wrong = run("prompt", *GREEDY, "--schema", SHORT, "--prefill", "Here is", "Hello")
    assert (wrong.code, wrong.out) == (2, "")
    assert "no answer that begins with 'Here is'" in wrong.err


@pytest.mark.parametrize("how", [("-n", "5"), ("--stop", '"a"'), ("-n", "0")])
def test_json_that_is_cut_off(run, how: tuple[str, ...]) -> None:
    """The text so far is on stdout, and the exit code tells."""
    result = run("prompt", "-m", "tiny", "--raw", "-T", "0", *how, "--schema", SHORT, "Hello")
    assert result.code == 12
    assert "before its JSON was complete" in result.err
    assert "Traceback" not in result.err
    assert result.out.strip()[:1] in ("", "{")
    as_json = run("prompt", "-m", "tiny", "--raw", "-T", "0", *how, "--json", "--schema", SHORT, "Hello")
    assert json.loads(as_json.out)["text"].removesuffix("\n") == result.out.removesuffix("\n")
    assert json.loads(as_json.err.splitlines()[-1])["error"]["code"] == "schema_not_satisfied"


def test_json_object(run) -> None:
    result = run("prompt", "-m", "tiny", "-T", "1", "--seed", "1", "-n", "100", "--json-object", "x")
    assert result.out.startswith("{")
    assert result.code == (0 if result.out.strip().endswith("}") else 12)


@pytest.mark.parametrize(
    ("schema", "code", "says"),
    [
        ('{"type": "strin"}', 2, "--schema: cannot be followed at its top: Invalid type: strin"),
        ('{"type": ', 2, "--schema: not valid JSON"),
        ("none.json", 3, "none.json: no such file"),
        ("[]", 3, "[]: no such file"),
        ("/", 2, "is a folder"),
    ],
)
def test_bad_schema_is_told_before_the_model_is_loaded(run, schema, code, says, monkeypatch) -> None:
    monkeypatch.setattr(Session, "load", lambda *_: pytest.fail("loaded"))
    result = run("prompt", "-m", "tiny", "--schema", schema, "x")
    assert (result.code, result.out) == (code, "")
    assert says in result.err


def test_dry_run_shows_what_is_sent_and_loads_nothing(run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--prefill", "Well, ", "--seed", "9", "Hello</s>")
    session = Session.open(str(home / "models" / "tiny" / "q4"))
    with monkeypatch.context() as patched:
        patched.setattr("mixlocal.app.model_run.load_trunk", lambda *_: pytest.fail("loaded"))
        result = run("prompt", "-m", "tiny", "--dry-run", "--json", *arguments)
        text = run("prompt", "-m", "tiny", "--dry-run", *arguments).out
    body = json.loads(result.out)
    assert body["token_ids"] == session.encode("Hello</s>", prefill="Well, ")
    assert (body["prompt_tokens"], body["context"]) == (len(body["token_ids"]), session.context)
    assert body["prompt"].endswith("Hello</s>Well, ")
    assert body["seed"] == body["params"]["seed"] == 9
    assert (body["model"], body["variant"]) == ("tiny", "q4")
    assert text.splitlines()[0] == "model   tiny:q4"
    assert f"prompt  {len(body['token_ids'])} of {session.context} tokens" in text
    assert "temperature 0.7" in text
    assert text.endswith(f"\n\n{body['prompt']}\n")
    raw = json.loads(run("prompt", "-m", "tiny", "--raw", "--dry-run", "--json", *arguments).out)
    assert raw["token_ids"] == session.encode("Hello</s>", raw=True, prefill="Well, ")


def test_dry_run_of_what_does_not_fit(run) -> None:
    result = run("prompt", "-m", "tiny", "--raw", "--ctx", "8", "--dry-run", "123456789")
    assert result.code == 9
    assert "9 of 8 tokens" in result.out
    assert "the prompt has 9 tokens and the context holds 8" in result.err


def test_dry_run_fetches_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlocal.app.install.pull", lambda *_: pytest.fail("fetched"))
    result = run("--home", str(tmp_path), "prompt", "--dry-run", "x")
    assert (result.code, result.out) == (3, "")
    assert "mixlocal pull smolmix" in result.err
