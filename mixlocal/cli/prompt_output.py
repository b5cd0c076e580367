"""Where the answer of `prompt` goes: as it comes or whole, as text or as JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Protocol

from mixlocal.cli.answer import Answer
from mixlocal.cli.options import Globals
from mixlocal.cli.render import warn
from mixlocal.cli.safe_text import SafeStream

if TYPE_CHECKING:
    from mixlocal.app.code_blocks import CodeBlock
    from mixlocal.app.session import Chunk


class Output(Protocol):
    """`show` what was added to the answer, `end` it: after an interrupt too."""

    def show(self, chunk: Chunk) -> None: ...
    def end(self) -> None: ...


def open_output(options: Globals, answer: Answer, given: dict[str, Any]) -> Output:
    if given["stream_json"]:
        return JsonLines(answer)
    if options.as_json:
        return JsonObject(answer)
    if given["extract"]:
        return ExtractedCode(options, answer)
    return WholeText(answer) if given["no_stream"] else StreamedText(answer)


class StreamedText:
    """Each piece as soon as it is there; a newline ends the last line."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._safe = SafeStream()
        self._shown = 0  # characters

    def show(self, chunk: Chunk) -> None:
        if chunk.prefilled is None:
            self._catch_up()

    def end(self) -> None:
        self._catch_up()
        if not self._answer.text.endswith("\n"):
            write("\n")

    def _catch_up(self) -> None:
        piece = self._answer.text[self._shown :]
        self._shown += len(piece)
        if piece:
            write(piece, self._safe)


class WholeText:
    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def show(self, chunk: Chunk) -> None:
        """Not before it is whole."""

    def end(self) -> None:
        write(self.text().removesuffix("\n") + "\n")

    def text(self) -> str:
        return self._answer.text


class ExtractedCode(WholeText):
    """The first fenced code block; the whole answer, aloud, if it has none: it may well be nothing but the code."""

    def __init__(self, options: Globals, answer: Answer) -> None:
        super().__init__(answer)
        self._options = options

    def text(self) -> str:
        block = self._block()
        if block is None:
            warn(self._options, "the answer has no code block: here is all of it")
            return self._answer.text
        if not block.closed:
            warn(self._options, "the answer ended inside its code block")
        return block.text

    def _block(self) -> CodeBlock | None:
        """In an answer that is whole, a lone bare fence rather ends a block that was not opened."""
        from mixlocal.app.code_blocks import code_blocks

        block = next(iter(code_blocks(self._answer.text)), None)
        cut_off = self._answer.finish != "stop"
        return block if block is None or block.closed or block.language or cut_off else None


class JsonObject(WholeText):
    def end(self) -> None:
        write_line(self._answer.envelope())


class JsonLines:
    """An object a line: how far the prompt is read, each piece of text with its token, and last the envelope.

    Joined, the texts are the envelope's. A piece without a token was held back until then; a token without text is
    held back, or half a character.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._begun = not answer.prefill

    def show(self, chunk: Chunk) -> None:
        if chunk.prefilled is not None:
            done = chunk.prefilled
            write_line({"event": "prefill", "done": done.done, "total": done.total, "kept": done.kept})
            return
        self._begin()
        token = self._token(chunk)
        if token or chunk.text:
            write_line({"event": "text", "text": chunk.text} | token)

    def end(self) -> None:
        self._begin()
        write_line({"event": "done"} | self._answer.envelope())

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            write_line({"event": "text", "text": self._answer.prefill})

    def _token(self, chunk: Chunk) -> dict[str, Any]:
        choice = self._answer.text_choice(chunk)
        if choice is None:
            return {}
        top = {"top": self._answer.logprob(choice)["top"]} if self._answer.params.logprobs else {}
        return {"token_id": choice.id, "logprob": choice.logprob} | top


def write(text: str, safe: SafeStream | None = None) -> None:
    """Made safe on a terminal; safe: for a text of several pieces. Raises BrokenPipeError at once if nobody reads."""
    sys.stdout.write((safe or SafeStream()).push(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def write_line(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
