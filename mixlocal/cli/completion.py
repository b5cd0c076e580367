"""mixlocal completion: commands, flags, models and saved chats, completed by the shell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ZshComplete,
    add_completion_class,
    shell_complete,
    split_arg_string,
)

from mixlocal.errors import MixlocalError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mixlocal.store.paths import Home

PROGRAM, VARIABLE = "mixlocal", "_MIXLOCAL_COMPLETE"
# bash parts words at ":" and "=" and replaces only what is behind them, so it tells what it takes for the last word.
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' line type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) printf -v value %%q "$value"; COMPREPLY+=("$value") ;;
        esac
    done < <(COMP_WORDS="${COMP_LINE:0:COMP_POINT}" COMP_CWORD="$2" %(complete_var)s=bash_complete "$1" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s 2>/dev/null || complete -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    """Completes the whole word, and gives back the part of it that bash will replace."""

    source_template = _BASH
    _before = ""

    @staticmethod
    def _check_version() -> None:
        """The script copes with an old one, and no other bash need be asked."""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        word = "" if not words or line[-1:].isspace() else words.pop()
        typed = word.partition("=")[2] if word.startswith("-") and "=" in word else word
        self._before = typed.removesuffix(os.environ["COMP_CWORD"])
        return words[1:], word

    def format_completion(self, item: CompletionItem[Any]) -> str:
        return f"{item.type},{str(item.value).removeprefix(self._before)}"


# As click's, but for a description with a comma in it.
_FISH = """\
function %(complete_func)s
    for line in (COMP_WORDS=(commandline -cp) COMP_CWORD=(commandline -t) %(complete_var)s=fish_complete \
            %(prog_name)s 2>/dev/null)
        set -l parts (string split -m 1 , -- $line)
        switch $parts[1]
            case dir
                __fish_complete_directories $parts[2]
            case file
                __fish_complete_path $parts[2]
            case plain
                echo -- $parts[2]
        end
    end
end
complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


def _whole(items: list[CompletionItem[str]], incomplete: str) -> list[CompletionItem[str]]:
    """With the "--model=" before it: these two shells replace a word as a whole."""
    option, equals, _ = incomplete.partition("=")
    if not equals or not option.startswith("-"):
        return items
    return [CompletionItem(f"{option}={item.value}", item.type, item.help) for item in items if item.type == "plain"]


class _Zsh(ZshComplete):
    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        return _whole(super().get_completions(args, incomplete), incomplete)


class _Fish(FishComplete):
    source_template = _FISH

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        return _whole(super().get_completions(args, incomplete), incomplete)


class ModelName(click.types.StringParamType):
    """A text that completes to models: installed ones, then those of the catalogue; behind a colon, variants."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        from mixlocal.app.names import VARIANTS, catalogue_models, installed_models

        if incomplete.startswith((".", "/", "~")):
            return [CompletionItem(incomplete, type="dir")]
        installed = dict.fromkeys(installed_models(_folders(ctx)), "on this machine")
        known = installed | {name: text for name, text in catalogue_models().items() if name not in installed}
        name, colon, _ = incomplete.partition(":")
        if colon:
            return _matching({f"{name}:{variant}": "" for variant in VARIANTS if name in known}, incomplete)
        return _matching(known, incomplete) or [CompletionItem(incomplete, type="dir")]


class SessionName(click.types.StringParamType):
    """A text that completes to names of saved chats."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        from mixlocal.app.names import session_names

        return _matching(dict.fromkeys(session_names(_folders(ctx)), ""), incomplete)


def complete_group(
    group: click.Group, ctx: click.Context, incomplete: str, commands: Mapping[str, tuple[str, str]]
) -> list[CompletionItem[str]]:
    """Commands without importing them, and the options before them."""
    found = _matching({name: text for name, (_, text) in commands.items()}, incomplete)
    return [*found, *click.Command.shell_complete(group, ctx, incomplete)]


def answer_shell(cli: click.Group, instruction: str) -> int:
    """What a shell's script asked for; with nothing to say of an error, for it would stand in the user's line."""
    try:
        return _talk(cli, instruction)
    except (MixlocalError, click.ClickException, OSError, KeyError, ValueError):
        return 1


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete commands, flags, models and saved chats.

    \b
    bash: echo 'eval "$(mixlocal completion bash)"' >> ~/.bashrc
    zsh:  echo 'eval "$(mixlocal completion zsh)"' >> ~/.zshrc
    fish: mixlocal completion fish > ~/.config/fish/completions/mixlocal.fish
    """
    _talk(click.get_current_context().find_root().command, f"{shell}_source")


def _talk(root: click.Command, instruction: str) -> int:
    for dialect in (_Bash, _Zsh, _Fish):
        add_completion_class(dialect)
    return shell_complete(root, {}, PROGRAM, VARIABLE, instruction)


def _matching(names: Mapping[str, str], incomplete: str) -> list[CompletionItem[str]]:
    return [CompletionItem(name, help=text or None) for name, text in names.items() if name.startswith(incomplete)]


def _folders(ctx: click.Context) -> Home:
    from mixlocal.store.paths import home

    given = ctx.find_root().params.get("home")
    return home(Path(given) if given else None)
