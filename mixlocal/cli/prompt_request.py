"""What the command line of `prompt` asked for; all that needs no model is checked here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mixlocal.cli.options import Globals, sampling_params
from mixlocal.cli.prompt_input import (
    Source,
    join,
    read_file,
    read_file_bytes,
    read_piped,
    read_system,
    render_all,
    total,
)
from mixlocal.errors import ContextOverflowError, UsageError

if TYPE_CHECKING:
    from mixlocal.app.json_form import JsonForm
    from mixlocal.app.session import Session
    from mixlocal.app.structured import JsonConstraint
    from mixlocal.app.template import Message
    from mixlocal.engine.params import SamplingParams

Encode = Callable[..., list[int]]
ROOM_SHARE = 8  # of the context at least 1/8, or max-tokens, is left to the answer where text is dropped


@dataclass(frozen=True, slots=True)
class Request:
    """sources: what stands before `text`. drops: leave out their beginning if the context is too short."""

    sources: tuple[Source, ...]
    text: str
    system: str
    raw: bool
    prefill: str
    form: JsonForm | None
    drops: bool
    sampling: dict[str, Any]

    def params(self, defaults: SamplingParams) -> SamplingParams:
        """What the user gave over `defaults`, with a seed. Raises `UsageError` naming a value out of range."""
        from mixlocal.app.session import with_seed

        return with_seed(sampling_params(defaults, self.sampling))

    def constraint(self, session: Session) -> JsonConstraint | None:
        if self.form is None:
            return None
        from mixlocal.app.structured import JsonConstraint, TokenTable

        return JsonConstraint(self.form, TokenTable(session.tokenizer, session.config.vocab_size), self.prefill)

    def encode(self, encode: Encode, context: int, max_tokens: int) -> tuple[list[int], list[str]]:
        """The prompt's tokens, and what to tell the user. encode: of a `Session`.

        Raises `ContextOverflowError` if text may be dropped and what must stay is too long; else `generate` does.
        """

        def prompt(dropped: int) -> list[int]:
            return encode(self.messages(dropped), raw=self.raw, prefill=self.prefill)

        if not self.drops:
            return prompt(0), []
        room = context - min(max_tokens, context // ROOM_SHARE)
        length = total(self._droppable)
        kept = self._most_kept(lambda count: len(prompt(length - count)) <= room)
        if kept < 0:
            raise ContextOverflowError(
                f"without what may be dropped the prompt has {len(prompt(length))} tokens; the context of {context} "
                f"has room for {room}",
                "shorten it, or raise --ctx",
            )
        note = f"the first {length - kept} of {length} characters are dropped: the context is {context} tokens"
        return prompt(length - kept), [note] if kept < length else []

    @property
    def _droppable(self) -> tuple[Source, ...]:
        """What was piped in and files; the text itself where it is all there is."""
        return self.sources or (Source(self.text),)

    def _most_kept(self, fits: Callable[[int], bool]) -> int:
        """Characters of the droppable's end; from the beginning of a line if one is near."""
        from mixlocal.app.shorten import most_kept

        whole = "".join(source.text for source in self._droppable)
        kept = most_kept(len(whole), fits)
        if not 0 < kept < len(whole):
            return kept
        line = whole.find("\n", len(whole) - kept - 1, len(whole) - kept * 3 // 4)
        from_line = len(whole) - line - 1
        return from_line if line >= 0 and fits(from_line) else kept

    def messages(self, dropped: int = 0) -> list[Message]:
        from mixlocal.app.template import Message

        before = render_all(self._droppable, dropped)
        question = join(before, self.text) if self.sources else before
        system = [Message("system", self.system)] if self.system else []
        return [*system, Message("user", question)]


def read_request(options: Globals, words: tuple[str, ...], given: dict[str, Any]) -> Request:
    """Raises `UsageError` for what makes no sense or is no text, and what reading files may raise."""
    _check(options, given)
    form = read_answer_form(given)
    system = read_system(given)
    sources = [Source(read_file(name), "" if given["raw"] else name) for name in given["files"]]
    piped = read_piped(options)
    text = " ".join(words)
    if piped:
        sources.insert(0, Source(piped))
    if not text and not sources:
        raise UsageError("no prompt", 'for example: mixlocal prompt "Why is the sky blue?"')
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "stop", "logprobs")
    request = Request(
        tuple(sources), text, system, given["raw"], given["prefill"], form, given["on_overflow"] == "drop-oldest",
        {name: given[name] for name in names},
    )  # fmt: skip
    _check_range(request)
    return request


def _check(options: Globals, given: dict[str, Any]) -> None:
    as_json = options.as_json or given["stream_json"]
    constrained = given["schema"] is not None or given["json_object"]
    clashes = [
        (given["logprobs"] and not as_json, "--logprobs needs --json or --stream-json"),
        (given["raw"] and (given["system"] or given["system_file"]), "--raw has no place for a system prompt"),
        (given["schema"] is not None and given["json_object"], "--schema and --json-object: give one of them"),
        (given["extract"] and as_json, "--extract prints code: leave out --json and --stream-json"),
        (given["extract"] and constrained, "--extract looks for code, and the answer will be JSON: leave one out"),
        (given["no_stream"] and given["stream_json"], "--no-stream and --stream-json: give one of them"),
    ]
    for clash, message in clashes:
        if clash:
            raise UsageError(message)


def _check_range(request: Request) -> None:
    """A value out of range is not worth waiting for a model."""
    from mixlocal.engine.params import SamplingParams

    request.params(SamplingParams())


def read_answer_form(given: dict[str, Any]) -> JsonForm | None:
    if given["schema"] is None and not given["json_object"]:
        return None
    from mixlocal.app.json_form import ANY_OBJECT, read_form

    schema = ANY_OBJECT if given["json_object"] else given["schema"]
    if schema.lstrip().startswith("{"):
        return read_form(schema.encode(errors="surrogateescape"), "--schema")
    return read_form(read_file_bytes(schema), schema)
