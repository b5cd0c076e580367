"""mixlocal prompt"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mixlocal.cli.options import (
    Globals,
    json_option,
    pass_globals,
    run_options,
    runtime_options,
    sampling_options,
    sampling_params,
    settle,
)
from mixlocal.cli.render import print_json, safe_text, say, show_progress, size, warn
from mixlocal.errors import MixlocalError, NotFoundError, UsageError

if TYPE_CHECKING:
    from mixlocal.app.session import Chunk, RunStats, Session
    from mixlocal.engine.sampling import Choice, SamplingParams
    from mixlocal.store.paths import Home


@click.command()
@click.argument("text", nargs=-1)
@click.option("-m", "--model", default="smolmix", show_default=True, help="Name, name:variant or folder.")
@click.option("-s", "--system", metavar="TEXT", help="System prompt.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat format.")
@click.option("--prefill", default="", metavar="TEXT", help="Begin the answer with this.")
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@click.option(
    "--logprobs", type=int, default=0, metavar="K", help="With --json: the K likeliest tokens at each position."
)
@runtime_options
@click.option("--stats/--no-stats", default=True, help="Speed and seed on stderr after the answer.")
@sampling_options
@json_option
@pass_globals
def prompt(options: Globals, /, text: tuple[str, ...], **given: Any) -> None:
    """Answer TEXT. What is piped in goes before it."""
    request = _Request(options, given)
    question = _question(text)
    session = request.open()
    answer = _Answer(session, request.params(session.defaults))
    messages = request.messages(question)
    try:
        chunks = session.stream(messages, answer.params, raw=given["raw"], prefill=given["prefill"])
        request.print(given["prefill"])
        for piece in answer.pieces(chunks):
            request.print(piece)
    except KeyboardInterrupt:
        answer.finish = "interrupted"
    request.end(answer)
    _close(options, session)
    if answer.finish == "interrupted":
        raise KeyboardInterrupt


class _Request:
    """What the command line asked for, and where the answer goes."""

    def __init__(self, options: Globals, given: dict[str, Any]) -> None:
        if given["logprobs"] and not options.as_json:
            raise UsageError("--logprobs needs --json")
        self.options, self.given = options, given
        from mixlocal.engine.sampling import SamplingParams

        self.params(SamplingParams())  # a value out of range is not worth waiting for a model
        self.streams = not options.as_json and not given["no_stream"]

    def open(self) -> Session:
        """Load the model; smolmix is fetched and built at its first use."""
        from mixlocal.app.session import Session

        folders = self.options.folders()
        _install_default(self.options, self.given["model"], folders)
        session = Session.load(self.given["model"], run_options(self.given), folders)
        settle()
        for warning in session.warnings:
            warn(self.options, warning)
        return session

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """What the user gave over `defaults`, with a seed. Raises `UsageError` naming a value out of range."""
        from mixlocal.app.session import with_seed

        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "stop", "logprobs")
        return with_seed(sampling_params(defaults, {name: self.given[name] for name in names}))

    def messages(self, question: str) -> list[Any]:
        from mixlocal.app.template import Message

        system = [Message("system", self.given["system"])] if self.given["system"] else []
        return [*system, Message("user", question)]

    def print(self, piece: str) -> None:
        if self.streams:
            sys.stdout.write(safe_text(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()

    def end(self, answer: _Answer) -> None:
        if self.options.as_json:
            print_json(answer.envelope(self.given["prefill"]))
        elif not self.streams:
            self.streams = True
            self.print(self.given["prefill"] + answer.text)
        if not self.options.as_json and not answer.text.endswith("\n"):
            self.print("\n")
        say(self.options, answer.summary() if self.given["stats"] else f"seed {answer.params.seed}")


class _Answer:
    """Collects what was generated."""

    def __init__(self, session: Session, params: SamplingParams) -> None:
        self.session, self.params = session, params
        self.text = ""
        self.choices: list[Choice] = []
        self.finish = "length"
        self.stats: RunStats | None = None

    def pieces(self, chunks: Iterator[Chunk]) -> Iterator[str]:
        for chunk in chunks:
            if chunk.choice is not None and chunk.choice.id not in self.session.tokenizer.eos_ids:
                self.choices.append(chunk.choice)
            self.text += chunk.text
            self.finish, self.stats = chunk.finish or self.finish, chunk.stats
            if chunk.text:
                yield chunk.text

    def summary(self) -> str:
        stats = self.stats
        if stats is None:
            return f"interrupted after {len(self.choices)} tokens · seed {self.params.seed}"
        return (
            f"prompt {stats.prompt_tokens} tok {stats.prompt_tps:.0f} t/s · gen {stats.completion_tokens} tok "
            f"{stats.gen_tps:.1f} t/s · first {stats.ttft_s:.1f} s · load {stats.load_s:.1f} s · "
            f"{_tiers(stats)}RAM {stats.ram_peak / 1e9:.2f} GB · seed {self.params.seed}"
        )

    def envelope(self, prefill: str) -> dict[str, Any]:
        """The JSON of CLI `prompt --json`."""
        stats = self.stats
        body: dict[str, Any] = {
            "id": f"prompt-{secrets.token_hex(8)}", "model": self.session.name, "variant": self.session.variant,
            "prompt_tokens": stats.prompt_tokens if stats else None, "completion_tokens": len(self.choices),
            "finish_reason": self.finish, "text": prefill + self.text,
            "token_ids": [choice.id for choice in self.choices],
            "seed": self.params.seed, "params": asdict(self.params),
        }  # fmt: skip
        if self.params.logprobs:
            body["logprobs"] = [self._logprob(choice) for choice in self.choices]
        if stats is not None:
            body["timings"] = {
                "load_s": stats.load_s, "ttft_s": stats.ttft_s,
                "prompt_tps": stats.prompt_tps, "gen_tps": stats.gen_tps,
            }  # fmt: skip
            experts = stats.experts
            body["offload"] = {
                "gpu_hits": experts.gpu_hits, "ram_hits": experts.ram_hits, "disk_hits": experts.disk_hits,
                "bytes_read": experts.bytes_read, "stall_s": experts.stall_s, "copies": experts.copies,
                "prefetch_recall": experts.prefetch_recall, "prefetches": experts.prefetches,
                "prefetches_used": experts.prefetches_used, "ram_peak": stats.ram_peak, "vram_peak": stats.vram_peak,
            }  # fmt: skip
        return body | {"warnings": list(self.session.warnings)}

    def _logprob(self, choice: Choice) -> dict[str, Any]:
        def token(token_id: int, logprob: float) -> dict[str, Any]:
            text = self.session.token_bytes(token_id)
            return {"id": token_id, "token": text.decode(errors="replace"), "bytes": list(text), "logprob": logprob}

        return token(choice.id, choice.logprob) | {"top": [token(*pair) for pair in choice.top]}


def _close(options: Globals, session: Session) -> None:
    """What cannot be kept for the next start costs it some speed and this answer nothing."""
    try:
        session.close()
    except MixlocalError as error:
        warn(options, f"what was learnt of the routing is not kept: {error.message}")


def _tiers(stats: RunStats) -> str:
    """Where experts were found, if not all in memory; how much was read, how long it was waited for, how many of the
    experts that were chosen had been guessed."""
    counts = stats.experts
    if counts.ram_hits == counts.looked_up:
        return ""
    found = (("GPU", counts.gpu_hits), ("RAM", counts.ram_hits), ("disk", counts.disk_hits))
    shares = " ".join(f"{tier} {100 * hits / counts.looked_up:.0f}%" for tier, hits in found if hits)
    guessed = f", guessed {100 * counts.prefetch_recall:.0f}%" if counts.prefetch_recall is not None else ""
    return f"experts {shares}, read {size(counts.bytes_read)}, waited {counts.stall_s:.1f} s{guessed} · "


def _install_default(options: Globals, model: str, folders: Home) -> None:
    """Fetch and build the default model if it is the one asked for and not there; others are pulled on purpose."""
    from mixlocal.app.catalog import DEFAULT_MODEL, split_variant
    from mixlocal.app.installed import find_store

    name, variant = split_variant(model)
    try:
        find_store(model, folders)
    except NotFoundError:
        if name != DEFAULT_MODEL:
            raise
        from mixlocal.app.install import pull

        show_progress(options, pull(name, variant, folders))


def _question(text: tuple[str, ...]) -> str:
    """Piped text, then the arguments. Raises `UsageError` if there is neither, or the pipe is not UTF-8 text."""
    piped = "" if sys.stdin is None or sys.stdin.isatty() else _decode(sys.stdin.buffer.read())
    question = "\n\n".join(part for part in (piped.rstrip("\n"), " ".join(text)) if part)
    if not question:
        raise UsageError("no prompt", 'for example: mixlocal prompt "Why is the sky blue?"')
    return question


def _decode(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error
    if "\0" in text:
        raise UsageError(f"standard input has a NUL byte at {data.index(0)}: that is no text")
    return text
