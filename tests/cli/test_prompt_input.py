"""What goes into a prompt: pipes, files, texts that are none, texts that are too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from mixlocal.cli import prompt_input
from mixlocal.cli.prompt_input import decode_text, named

RAW = ("-m", "tiny", "--raw", "-T", "0", "-n", "4")


def sent(run, *arguments: str, stdin: bytes = b"") -> str:
    """The text that the model would see, without its BOS."""
    result = run("prompt", "-m", "tiny", "--dry-run", "--json", *arguments, stdin=stdin)
    assert result.code == 0, result.err
    return str(json.loads(result.out)["prompt"])


def test_pipe_then_files_then_text(run, tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.md"
    first.write_text("one\n")
    second.write_text("```sh\nls\n```\n")
    text = sent(run, "-f", str(first), "-f", str(second), "And", "now?", stdin=b"piped\n\n")
    assert text == (f"piped\n\n{first}:\n```\none\n```\n\n{second}:\n````\n```sh\nls\n```\n````\n\nAnd now?")
    assert sent(run, "-f", str(first)) == f"{first}:\n```\none\n```"
    assert sent(run, "--raw", "-f", str(first), "on") == "one\n\n\non"


def test_a_file_name_steers_nothing() -> None:
    assert named("a\x1b]0;x\x07.txt", "x") == "a^[]0;x^G.txt:\n```\nx\n```"


def test_system_file(run, tmp_path: Path) -> None:
    """The tiny model has no system role: the refusal shows that the text came through."""
    file = tmp_path / "system.txt"
    file.write_text("Be brief.")
    assert "no chat format" in run("prompt", *RAW[:2], "--system-file", str(file), "x").err
    both = run("prompt", *RAW[:2], "--system-file", str(file), "-s", "x", "x")
    assert (both.code, both.out) == (2, "")
    assert "give one of them" in both.err


def test_files_that_cannot_be_read(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"abc\xffd")
    monkeypatch.setattr(prompt_input, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "large.txt").write_bytes(b"x" * 1001)
    cases = [
        (bad, 2, "bad.txt is not UTF-8: byte 3 is 0xff"),
        (tmp_path / "large.txt", 2, "large.txt is larger than"),
        (tmp_path / "none.txt", 3, "none.txt: no such file"),
        (bad / "below", 3, "no such file"),
        (tmp_path, 2, "is a folder"),
        ("-", 2, "standard input is read without being named"),
        ("x" * 300, 2, "file name too long"),
    ]
    for path, code, says in cases:
        for option in ("-f", "--system-file", "--schema"):
            if option == "--schema" and path in (bad, tmp_path / "large.txt"):
                continue
            result = run("prompt", *RAW[:2], option, str(path), "x")
            assert (result.code, result.out) == (code, ""), result.err
            assert says in result.err


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b"\xef\xbb\xbfcaf\xc3\xa9", "café"),
        (b"a\r\nb\r\n\r\nc", "a\nb\n\nc"),
        (b"a\rb\n\r", "a\rb\n\r"),
        ("x\ufeffy".encode(), "x\ufeffy"),
        (b"\x1b[31m\x7f", "\x1b[31m\x7f"),
    ],
)
def test_text(data: bytes, text: str) -> None:
    assert decode_text(data, "it") == text


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("hi".encode("utf-16"), "it is UTF-16, not UTF-8: bytes 0 and 1 are 0xff 0xfe"),
        (b"\xfe\xff\0h", "it is UTF-16, not UTF-8: bytes 0 and 1 are 0xfe 0xff"),
        (b"h\0i\0", "it has a NUL byte at 1"),
        (b"a\0\xff", "it has a NUL byte at 1"),
        (b"a\xff\0", "it is not UTF-8: byte 1 is 0xff"),
        (b"\xef\xbb\xbfab\xe2\x82", "it is not UTF-8: byte 5 is 0xe2"),
        (b"\xed\xa0\x80", "it is not UTF-8: byte 0 is 0xed"),
        (b"\xc0\xaf", "it is not UTF-8: byte 0 is 0xc0"),
    ],
)
def test_no_text(data: bytes, says: str) -> None:
    with pytest.raises(prompt_input.UsageError, match=says):
        decode_text(data, "it")


def test_a_pipe_without_end_is_refused_at_the_limit(run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(BytesIO):
        given = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert size > 0
            Endless.given += size
            return b"y" * size

    monkeypatch.setattr(prompt_input, "MAX_TEXT_BYTES", 100_000)
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(Endless()))
    with pytest.raises(prompt_input.UsageError, match="standard input is larger than"):
        prompt_input.read_piped(None)  # type: ignore[arg-type]
    assert Endless.given < 1_000_000


def started(home: Path, redirection: str = "") -> subprocess.Popen[bytes]:
    """The real program, its standard input redirected by a shell."""
    command = [sys.executable, "-m", "mixlocal", "prompt", *RAW, "Hello"]
    environment = os.environ | {"MIXLOCAL_HOME": str(home)}
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen(shell, env=environment, stdin=pipe, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [("< /dev/null", 0, b"gen 4 tok"), ("<&-", 0, b"gen 4 tok"), ("0> /dev/null", 2, b"standard input cannot be read")],
)
def test_no_pipe_and_no_terminal(home: Path, redirection: str, code: int, says: bytes) -> None:
    """As cron starts it, with standard input closed, and with one that is for writing."""
    with started(home, redirection) as process:
        _, errors = process.communicate()
    assert process.returncode == code
    assert says in errors
    assert b"Traceback" not in errors


def test_a_silent_pipe_is_waited_for_aloud(home: Path) -> None:
    with started(home) as process:
        assert process.stderr is not None
        assert b"waiting for standard input" in process.stderr.readline()
        out, _ = process.communicate(b"late")
        assert process.returncode == 0
        assert out


CONTEXT = 64


@pytest.mark.parametrize(("length", "code"), [(0, 2), (1, 0), (63, 0), (64, 0), (65, 9), (100_000, 9)])
def test_a_prompt_around_the_context(run, length: int, code: int) -> None:
    result = run("prompt", *RAW, "--ctx", str(CONTEXT), stdin=b"x" * length)
    assert result.code == code, result.err
    if code == 9:
        assert f"the prompt has {length} tokens and the context holds 64" in result.err
        assert len(result.err.splitlines()) == 2


def test_drop_oldest(run) -> None:
    """The text stays, what was piped in loses its beginning; 8 of 64 tokens are kept for the answer."""
    piped = "".join(f"line {n}\n" for n in range(1000))
    drop = ("--raw", "--ctx", str(CONTEXT), "--on-overflow", "drop-oldest", "-n", "100")
    text = sent(run, *drop, "What?", stdin=piped.encode())
    assert text == "line 995\nline 996\nline 997\nline 998\nline 999\n\nWhat?"
    assert sent(run, *drop, "What?", stdin=b"y" * 5000) == "y" * (CONTEXT - 8 - 7) + "\n\nWhat?"
    assert sent(run, *drop, "z" * 5000 + "end") == "z" * (CONTEXT - 8 - 3) + "end"
    assert sent(run, *drop, "short", stdin=b"piped") == "piped\n\nshort"
    assert sent(run, *drop, "x" * 56, stdin=b"piped") == "x" * 56
    result = run("prompt", "-m", "tiny", "--json", *drop, "What?", stdin=piped.encode())
    body = json.loads(result.out)
    assert body["prompt_tokens"] == len(text)
    assert body["warnings"] == [
        f"the first {len(piped) - 45} of {len(piped) - 1} characters are dropped: the context is 64 tokens"
    ]
    assert body["warnings"][0] in result.err


def test_what_may_not_be_dropped_is_too_long(run) -> None:
    arguments = ("--raw", "--ctx", str(CONTEXT), "--on-overflow", "drop-oldest", "x" * 70)
    result = run("prompt", "-m", "tiny", *arguments, stdin=b"piped")
    assert (result.code, result.out) == (9, "")
    assert "the prompt has 70 tokens; the context of 64 has room for 56" in result.err


def test_drop_oldest_takes_whole_files_first(run, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a" * 500)
    (tmp_path / "b").write_text("b" * 500)
    os.chdir(tmp_path)
    files = ("-f", "a", "-f", "b")
    text = sent(run, "--ctx", str(CONTEXT), "--on-overflow", "drop-oldest", "-n", "8", *files, "What?", stdin=b"c" * 99)
    assert text == f"b:\n```\n{'b' * (56 - 18)}\n```\n\nWhat?"
