"""argv in, terminal out: the only code that prints, prompts or exits."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import signal
import sys
from types import FrameType, TracebackType
from typing import NoReturn

import click

from mixlocal import __version__
from mixlocal.cli.options import Globals
from mixlocal.cli.render import print_error
from mixlocal.errors import MemoryBudgetError, MixlocalError, UsageError

LEAST_ADDRESSES = 1_200_000_000  # seen: 0.9 GB for a tiny model, most of it reserved and never touched
# command -> (module below mixlocal.cli, one line of help): `--help` imports none of them.
COMMANDS = {
    "pull": ("pull", "Get a model: fetch, quantize, verify."),
    "quantize": ("quantize", "Quantize a checkpoint folder into a model store."),
    "prompt": ("prompt", "Answer one prompt."),
    "plan": ("plan", "Tell what of a model would lie where, and how fast it would be."),
    "ls": ("models", "List the models on this machine."),
    "show": ("models", "Explain a model: parameters, where they sit, bytes."),
    "verify": ("models", "Read every byte of a model and check it."),
    "rm": ("models", "Remove a model."),
    "prune": ("models", "Free the disk of what no model needs."),
    "bench": ("bench", "Measure speed: of a model, or of the kernels alone."),
    "doctor": ("doctor", "Check this machine and say what each lack costs."),
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mixlocal.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MIXLOCAL"})
@click.option("--home", metavar="DIR", help="Keep everything below DIR instead of the XDG folders.")
@click.option("-q", "--quiet", is_flag=True, help="Only the answer: no progress, no statistics.")
@click.option("--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="mixlocal")
@click.pass_context
def cli(ctx: click.Context, home: str | None, quiet: bool, color: str, as_json: bool, debug: bool) -> None:
    """Run Mixtral 8x7B and other mixture-of-experts models on this computer."""
    _check_address_space()
    ctx.obj = Globals(home=home, quiet=quiet, color=color, as_json=as_json, debug=debug)


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
    debug, as_json = "--debug" in arguments, "--json" in arguments
    if not debug:
        sys.excepthook = _unexpected
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with cli.make_context("mixlocal", list(arguments)) as context:  # cli.main() makes a closed pipe exit 1
            cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:  # --help, --version
        return end.exit_code
    except click.ClickException as error:
        return _fail(UsageError(error.format_message(), _usage_hint(error)), debug, as_json)
    except MixlocalError as error:
        return _fail(error, debug, as_json)
    except MemoryError:
        shortage = MemoryBudgetError("memory ran out", "close other programs, or use a smaller model")
        return _fail(shortage, debug, as_json)
    except (KeyboardInterrupt, click.Abort):
        print_error("interrupted", "", as_json=False)
        return 130
    except BrokenPipeError:
        _drop_stdout()
        return 141
    except _TerminatedError:
        return 128 + signal.SIGTERM
    return 0


class _TerminatedError(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing on the way takes it for a failure of its own."""


def _fail(error: MixlocalError, debug: bool, as_json: bool) -> int:
    if debug:
        raise error
    with contextlib.suppress(BrokenPipeError):
        print_error(error.message, error.hint, as_json=as_json, code=error.code, exit_code=error.exit_code)
    return error.exit_code


def _usage_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"see: {context.command_path} --help" if context is not None else ""


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
