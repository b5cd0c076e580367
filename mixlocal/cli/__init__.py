"""argv in, terminal out: the only code that prints, prompts or exits."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, NoReturn

import click

from mixlocal import __version__
from mixlocal.cli.explain import explain
from mixlocal.cli.options import Globals
from mixlocal.cli.origins import TrackedContext, add_defaults, attach, attach_completion, begin
from mixlocal.cli.render import print_error
from mixlocal.errors import MemoryBudgetError, MixlocalError

LEAST_ADDRESSES = 1_200_000_000  # seen: 0.9 GB for a tiny model, most of it reserved and never touched
# command -> (module below mixlocal.cli, one line of help): `--help` imports none of them.
COMMANDS = {
    "pull": ("pull", "Get a model: fetch, quantize, verify."),
    "quantize": ("quantize", "Quantize a checkpoint folder into a model store."),
    "prompt": ("prompt", "Answer one prompt."),
    "chat": ("chat", "Talk with a model."),
    "batch": ("batch", "Answer every row of a file; stopped or killed, it goes on where it was."),
    "run": ("run", "As `prompt` with a text, as `chat` without."),
    "sessions": ("sessions", "List, search, export or remove saved chats."),
    "plan": ("plan", "Tell what of a model would lie where, and how fast it would be."),
    "ls": ("models", "List the models on this machine."),
    "show": ("models", "Explain a model: parameters, where they sit, bytes."),
    "verify": ("models", "Read every byte of a model and check it."),
    "rm": ("models", "Remove a model."),
    "prune": ("models", "Free the disk of what no model needs."),
    "bench": ("bench", "Measure speed: of a model, or of the kernels alone."),
    "quality": ("quality", "Measure what bits cost: perplexity, and divergence from a reference."),
    "experts": ("experts", "Show which experts a text uses."),
    "doctor": ("doctor", "Check this machine and say what each lack costs."),
    "config": ("config", "Show and change what is set once for all runs."),
    "completion": ("completion", "Print what lets a shell complete commands and models."),
}
HANDS_OVER = {"run": ("prompt", "chat")}  # to commands that it takes the options of


class LazyGroup(click.Group):
    """Imports a command's module when the command is run, and tells click where its values come from."""

    context_class = TrackedContext

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        typed, rest, _ = self.make_parser(ctx).parse_args(list(args))
        if rest and not {"help", "version"} & set(typed):
            begin(ctx, typed, rest)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        for name in HANDS_OVER.get(cmd_name, ()):
            add_defaults(ctx, _load(name), name)
        command = _load(cmd_name)
        add_defaults(ctx, command, cmd_name)
        if ctx.resilient_parsing:
            attach_completion(command, (cmd_name,))
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from mixlocal.cli.completion import complete_group

        return complete_group(self, ctx, incomplete, COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


def _load(name: str) -> click.Command:
    command = getattr(importlib.import_module(f"mixlocal.cli.{COMMANDS[name][0]}"), name)
    assert isinstance(command, click.Command)
    attach(command, (name,))
    return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--home", metavar="DIR", help="Keep everything below DIR instead of the XDG folders.")
@click.option("--config", "config_file", metavar="FILE", help="Read FILE instead of config.toml in the config folder.")
@click.option("-q", "--quiet", is_flag=True, help="Only the answer: no progress, no statistics.")
@click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
              help="Colours in tables and bars.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="mixlocal")
@click.pass_context
def cli(
    ctx: click.Context, home: str | None, config_file: str | None, quiet: bool, color: str, as_json: bool, debug: bool
) -> None:
    """Run Mixtral 8x7B and other mixture-of-experts models on this computer."""
    _check_address_space()
    ctx.obj = Globals(home=home, quiet=quiet, color=color, as_json=as_json, debug=debug, config=config_file)
    if debug:
        sys.excepthook = sys.__excepthook__


def _check_address_space() -> None:
    """NumPy's OpenBLAS never returns from a shortage while it is imported: say it before that."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LEAST_ADDRESSES:
        raise MemoryBudgetError(
            f"this process may address {limit / 1e9:.1f} GB (ulimit -v), and its libraries alone take "
            f"{LEAST_ADDRESSES / 1e9:.1f}",
            "raise the limit; --ram bounds the memory that is really used",
        )


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit with the code of `mixlocal.errors`."""
    code = _run(sys.argv[1:] if argv is None else argv)
    if argv is not None:
        sys.exit(code)
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.flush()
    os._exit(code)  # taking torch apart would cost most of a second, and there is nothing left to save


def _run(arguments: list[str]) -> int:
    if "_MIXLOCAL_COMPLETE" in os.environ:
        from mixlocal.cli.completion import answer_shell

        return answer_shell(cli, os.environ["_MIXLOCAL_COMPLETE"])
    asked = _Asked(arguments)
    if not asked("debug"):
        sys.excepthook = _unexpected
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with cli.make_context("mixlocal", list(arguments)) as asked.context:  # cli.main() makes a closed pipe exit 1
            cli.invoke(asked.context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:  # --help, --version
        return end.exit_code
    except (click.ClickException, MixlocalError) as error:
        return _fail(explain(error, asked.context), asked)
    except MemoryError:
        return _fail(MemoryBudgetError("memory ran out", "close other programs, or use a smaller model"), asked)
    except (KeyboardInterrupt, click.Abort):
        print_error("interrupted", "", as_json=False)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except _TerminatedError:
        return 128 + signal.SIGTERM
    return 0


class _Asked:
    """Whether --debug or --json hold: known from their place in the arguments before anything has been understood."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self.context: click.Context | None = None

    def __call__(self, flag: str) -> bool:
        options = self.context.obj if self.context else None
        settled = isinstance(options, Globals) and {"debug": options.debug, "json": options.as_json}[flag]
        spellings = {"debug": {"--debug"}, "json": {"--json", "--stream-json"}}[flag]
        return not spellings.isdisjoint(self._arguments) or settled


class _TerminatedError(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing on the way takes it for a failure of its own."""


def _fail(error: MixlocalError, asked: _Asked) -> int:
    if asked("debug"):
        raise error
    with contextlib.suppress(BrokenPipeError):
        print_error(error.message, error.hint, as_json=asked("json"), code=error.code, exit_code=error.exit_code)
    return error.exit_code


def _unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print_error(
        f"unexpected {kind.__name__}: {error}", "run again with --debug and report what it prints", as_json=False
    )


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _TerminatedError


def _drop_stdout() -> None:
    """The reader is gone: let the interpreter's last flush go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
