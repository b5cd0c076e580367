"""The process that compiles and runs a repository's chat template; `template_sandbox` starts it.

    python -I -S template_child.py CPU_SECONDS MEMORY_BYTES FOLDER...     (folders where jinja2 and markupsafe are)

It imports the standard library and jinja2 only. A frame is a length of four bytes and that much JSON. After an empty
one that says it is ready, it answers each frame of standard input on standard output: first the source, then
conversations to render. The template is taken for hostile: jinja2's sandbox is the first wall, an audit hook that
refuses whatever a template has no use for the second, the limits of the kernel the third.
"""

from __future__ import annotations

import codecs
import contextlib
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path += sys.argv[3:]

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_OWN_FILE = "<template>"  # what jinja2 calls the code of a template that came as a string


class _SaysNoError(TemplateError):
    """`raise_exception` was called: the template does not take this conversation."""


class _TooLongError(TemplateError):
    """The template writes more than it may."""


class _LockedError(RuntimeError):
    """The template got hold of something that reaches out of it."""


# What compiling and running a template can raise besides TemplateError; SyntaxError and MemoryError come from Python's
# compiler when blocks are nested too deeply.
FAULTS = (
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class Environment(ImmutableSandboxedEnvironment):
    """What transformers offers to templates (`utils/chat_template_utils.py`), and its restrictions."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _Generation])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """Raise an error as it is: jinja2 would compile and run code to make its traceback look like the template."""
        raise


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; to render, it is nothing."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    """`dict`, without the class itself, whose methods would change a dict that the sandbox keeps from changing."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`, whose attributes cannot pass for Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that a template may call an attribute "self"
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no attribute called {name[:80]!r}")


def _raise_exception(message: object) -> NoReturn:
    raise _SaysNoError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: Template, request: Mapping[str, Any]) -> list[str]:
    """The text of each conversation of a request; `now` is the same for all, so that their clocks agree."""
    values = {**request["values"], "strftime_now": datetime.fromisoformat(request["now"]).strftime}
    return [_render_one(template, messages, values, request["limit"]) for messages in request["conversations"]]


def _render_one(template: Template, messages: Sequence[Any], values: Mapping[str, Any], limit: int) -> str:
    pieces: list[str] = []
    length = 0
    for piece in template.generate(messages=messages, **values):
        pieces.append(piece)
        length += len(piece)
        if length > limit:
            raise _TooLongError(f"writes more than {limit} characters")
    return "".join(pieces)


class Server:
    """Answers frames: the first holds the template."""

    def __init__(self) -> None:
        self._template: Template | None = None

    def answer(self, frame: bytes) -> bytes:
        """{"texts": [...]}, or which `error` it is and a line of `text` on it."""
        try:
            return json.dumps({"texts": self._texts(json.loads(frame))}, ensure_ascii=False).encode()
        except FAULTS as error:
            kind, text = _describe(error)
        return json.dumps({"error": kind, "text": text}).encode()

    def _texts(self, request: Mapping[str, Any]) -> list[str]:
        if self._template is not None:
            return render(self._template, request)
        self._template = Environment().from_string(request["source"])
        return []


def _describe(error: BaseException) -> tuple[str, str]:
    if isinstance(error, MemoryError):
        return "limit", "needs too much memory"
    line = " ".join(str(error)[:2000].split())[:200]
    if isinstance(error, _TooLongError):
        return "limit", line
    return ("no", line) if isinstance(error, _SaysNoError) else ("fault", f"{type(error).__name__}: {line}")


def refuse(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: what Python announces is forbidden, but for compiling, running the template's code, and `id`."""
    runs_template = event == "exec" and getattr(args[0], "co_filename", None) == _OWN_FILE
    if not runs_template and event not in ("compile", "builtins.id"):  # json and pprint use id
        raise _LockedError(f"{event} is not for templates")


def _preload() -> None:
    """What jinja2 would import once a template needs it: for escapes in its strings, and for three of its filters."""
    codecs.lookup("unicode-escape")
    for name in ("unicodedata", "textwrap", "pprint", "jinja2.constants"):
        importlib.import_module(name)


def _limit_resources(memory: int) -> None:
    """No new file descriptor, process, byte in a file or core dump, and so much memory, where the system can do it."""
    for name, value in (("AS", memory), ("NOFILE", 0), ("NPROC", 0), ("FSIZE", 0), ("CORE", 0)):
        # Unknown here, refused here (macOS has no RLIMIT_AS), or a lower limit is in force already.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _read_frame() -> bytes | None:
    """None when the parent has gone, or is done with us."""
    read = sys.stdin.buffer.read
    head = read(4)
    size = int.from_bytes(head, "big")
    body = read(size)
    return body if len(head) == 4 and len(body) == size else None


def _write_frame(body: bytes) -> None:
    sys.stdout.buffer.write(len(body).to_bytes(4, "big") + body)
    sys.stdout.buffer.flush()


def main() -> None:
    """Serve until standard input ends. The kernel kills us when one answer takes more processor time than it may."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _preload()
    _limit_resources(memory)
    sys.addaudithook(refuse)
    server = Server()
    _write_frame(b"{}")
    while (frame := _read_frame()) is not None:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        _write_frame(server.answer(frame))
        signal.setitimer(signal.ITIMER_PROF, 0)
    os._exit(0)


if __name__ == "__main__":
    main()
