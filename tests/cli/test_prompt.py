"""mixlocal prompt"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from mixlocal.store import durable

GREEDY = ("-m", "tiny", "--raw", "-T", "0", "-n", "12")


def test_answer_on_stdout_talk_on_stderr(run) -> None:
    plain = run("prompt", *GREEDY, "Hello")
    assert plain.code == 0
    assert plain.out.endswith("\n")
    assert "tok" in plain.err
    assert "seed" in plain.err
    assert "\x1b" not in plain.out + plain.err
    assert run("-q", "prompt", *GREEDY, "Hello").err == ""
    assert run("prompt", "--no-stream", *GREEDY, "Hello").out == plain.out


def test_seed_printed_replays_the_run(run) -> None:
    arguments = ("prompt", "-m", "tiny", "--raw", "-T", "1.2", "-n", "20", "Hello")
    first = run(*arguments)
    seed = first.err.split("seed ")[1].strip()
    assert run(*arguments, "--seed", seed).out == first.out
    assert run(*arguments, "--seed", str(int(seed) + 1)).out != first.out


def test_json_envelope(run) -> None:
    result = run("prompt", *GREEDY, "--json", "--logprobs", "3", "Hello")
    body = json.loads(result.out)
    assert body["model"] == "tiny"
    assert body["variant"] == "q4"
    assert body["finish_reason"] in ("stop", "length")
    assert body["prompt_tokens"] == 5
    assert body["completion_tokens"] == len(body["token_ids"]) == len(body["logprobs"])
    assert all(len(entry["top"]) == 3 and entry["logprob"] <= 0 for entry in body["logprobs"])
    assert all(entry["id"] == entry["top"][0]["id"] for entry in body["logprobs"])
    assert set(body["timings"]) == {"load_s", "ttft_s", "prompt_tps", "gen_tps"}
    assert body["params"]["temperature"] == 0
    assert body["text"] == run("prompt", *GREEDY, "Hello").out.removesuffix("\n")
    assert run("--json", "prompt", *GREEDY, "Hello").out.startswith("{")


def test_stdin_goes_before_the_text(run) -> None:
    both = run("prompt", *GREEDY, "--json", "there", stdin=b"Hello\n")
    assert json.loads(both.out)["prompt_tokens"] == len("Hello\n\nthere")
    assert json.loads(run("prompt", *GREEDY, "--json", stdin=b"Hello\n").out)["prompt_tokens"] == 5


def test_prefill_begins_the_answer(run) -> None:
    body = json.loads(run("prompt", *GREEDY, "--json", "--prefill", "Well, ", "Hello").out)
    assert body["text"].startswith("Well, ")
    assert body["prompt_tokens"] == len("HelloWell, ")
    for mode in ((), ("--no-stream",)):
        assert run("prompt", *GREEDY, *mode, "--prefill", "Well, ", "Hello").out == body["text"] + "\n"


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "says"),
    [
        (("-m", "tiny"), b"", 2, "no prompt"),
        (("-m", "tiny"), b"caf\xe9", 2, "byte 3 is 0xe9"),
        (("-m", "tiny"), b"a\0b", 2, "NUL byte at 1"),
        (("-m", "tiny", "-T", "-1", "x"), b"", 2, "temperature"),
        (("-m", "tiny", "--top-p", "2", "x"), b"", 2, "top-p"),
        (("-m", "tiny", "--threads", "0", "x"), b"", 2, "threads"),
        (("-m", "tiny", "--ctx", "100000", "x"), b"", 2, "--ctx"),
        (("-m", "tiny", "--experts-per-token", "9", "x"), b"", 2, "--experts-per-token"),
        (("-m", "tiny", "--logprobs", "3", "x"), b"", 2, "--logprobs needs --json or --stream-json"),
        (("-m", "tiny", "--raw", "-s", "Be brief.", "x"), b"", 2, "--raw has no place for a system prompt"),
        (("-m", "tiny", "-x", "--json", "x"), b"", 2, "leave out --json"),
        (("-m", "tiny", "-x", "--json-object", "x"), b"", 2, "the answer will be JSON"),
        (("-m", "tiny", "--no-stream", "--stream-json", "x"), b"", 2, "give one of them"),
        (("-m", "tiny", "--on-overflow", "drop", "x"), b"", 2, "drop-oldest"),
        (("-m", "tiny", "--no-such-flag", "x"), b"", 2, "--no-such-flag"),
        (("-m", "tiny", "-s", "Be brief.", "x"), b"", 2, "no chat format"),
        (("-m", "tiny:q5", "x"), b"", 2, "no variant 'q5'"),
        (("-m", "nobody", "x"), b"", 3, "nobody"),
        (("-m", "/nowhere/at/all", "x"), b"", 3, "no such folder"),
        (("-m", "mixtral-8x7b", "x"), b"", 3, "mixtral-8x7b is not installed"),
        (("-m", "tiny", "--raw", "--ctx", "8", "123456789"), b"", 9, "9 tokens and the context holds 8"),
    ],
)
def test_bad_input_is_one_line_and_the_right_code(run, arguments, stdin, code, says) -> None:
    result = run("prompt", *arguments, stdin=stdin)
    assert result.code == code
    assert result.out == ""
    assert says in result.err
    assert "Traceback" not in result.err
    assert result.err.count("\n") <= 2


@pytest.mark.parametrize("device", [("--device", "cuda"), ("--device", "cuda:7"), ("--vram", "4G")])
@pytest.mark.parametrize("command", [("prompt", "-m", "tiny", "x"), ("plan", "tiny"), ("bench", "-m", "tiny")])
def test_a_gpu_that_is_not_there_is_one_clear_line(run, command, device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(*command, *device)
    assert (result.code, result.out) == (2, "")
    assert ("PyTorch finds no GPU" if device[0] == "--device" else "--vram needs a GPU") in result.err
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) == 2


def test_neither_memory_nor_lookahead_changes_a_token(run, tiny_budget) -> None:
    """Sampled at a temperature, where the least difference would show."""
    given = ("-m", "tiny", "--raw", "-T", "1.5", "--seed", "3", "-n", "60", "--ctx", "128", "--device", "cpu", "--json")
    wanted = json.loads(run("prompt", *given, "Hello " * 8).out)
    assert wanted["offload"]["disk_hits"] == 0
    for experts in (4, 6):
        for lookahead in ("--lookahead", "--no-lookahead"):
            ram = ("--ram", str(tiny_budget(experts, context=128)), lookahead)
            body = json.loads(run("prompt", *given, *ram, "Hello " * 8).out)
            assert (body["token_ids"], body["text"]) == (wanted["token_ids"], wanted["text"])
            assert body["offload"]["disk_hits"] > 0
            looked_ahead = experts > 4 and lookahead == "--lookahead"
            assert (body["offload"]["prefetch_recall"] is not None) == looked_ahead


@pytest.mark.parametrize(
    ("call", "number", "says"),
    [("write", errno.ENOSPC, "no space left on device"), ("mkdir", errno.EROFS, "read-only file system")],
)
def test_what_cannot_be_kept_at_the_end_costs_a_warning_and_no_answer(
    call: str, number: int, says: str, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ("prompt", *GREEDY, "Hello there, this is long enough to learn from.")
    expected = run(*prompt)

    def failing(name: str, nbytes: int) -> int:
        if name == call:
            raise OSError(number, os.strerror(number))
        return nbytes

    monkeypatch.setattr(durable, "on_call", failing)
    result = run(*prompt)
    assert (result.code, result.out) == (0, expected.out)
    (warning,) = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert "what was learnt of the routing is not kept" in warning
    assert says in warning
    assert "Traceback" not in result.err
    assert run("-q", *prompt).err == ""


def test_errors_as_json(run) -> None:
    result = run("prompt", "--json", "-m", "nobody", "x")
    error = json.loads(result.err)["error"]
    assert (error["code"], error["exit"], result.code) == ("not_found", 3, 3)


def test_more_experts_than_trained_warns(run) -> None:
    result = run("prompt", *GREEDY, "--experts-per-token", "3", "x")
    assert "warning: 3 experts per token" in result.err


def test_help_is_fast_and_imports_no_torch() -> None:
    probe = "import sys, mixlocal.cli\ntry: mixlocal.cli.main(['--help'])\nfinally: print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert result.stdout.endswith("False\n")
    assert "prompt" in result.stdout
