"""What each slash command does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mixlocal.cli.chat.clipboard import copy
from mixlocal.cli.chat.commands_saved import SAVED
from mixlocal.cli.chat.slash import Leave, Slash, find, matching
from mixlocal.errors import UsageError

if TYPE_CHECKING:
    from mixlocal.app.conversation import Overflow
    from mixlocal.cli.chat.repl import Repl


def _help(repl: Repl, argument: str) -> None:
    shown = [find(COMMANDS, argument.lstrip("/"))] if argument else list(COMMANDS.values())
    names = [f"/{command.name} {command.arguments}".rstrip() for command in shown]
    width = max(map(len, names))
    repl.tell("\n".join(f"{name:{width}}  {command.help}" for name, command in zip(names, shown, strict=True)))
    if not argument:
        repl.tell(
            "Enter sends · Alt-Enter or Ctrl-J: new line · Tab: complete · Ctrl-R: search what was typed · "
            "Ctrl-G: editor · Ctrl-C: stop the answer · Ctrl-D: end · //text sends a slash"
        )


def _set(repl: Repl, argument: str) -> None:
    from mixlocal.app.settings import change, show

    name, _, value = argument.partition(" ")
    value = value.strip()
    if not value:
        repl.tell(_columns([row for row in show(repl.chat.params) if name in ("", row[0])] or show(repl.chat.params)))
        return
    if name in ("markdown", "stats"):
        setattr(repl.screen, name, _switch(value))
    elif name.replace("_", "-") == "on-overflow":
        repl.chat.overflow = _overflow(value)
    else:
        repl.chat.params = change(repl.chat.params, name, value)
        repl.remember()
    repl.tell(_columns([(name, value)]))


def _show(repl: Repl, argument: str) -> None:
    from mixlocal.app.settings import show

    session, chat = repl.chat.session, repl.chat
    rows = [
        ("model", f"{session.name}:{session.variant}"), ("context", f"{session.context:,} tokens"),
        ("session", repl.saved.name or "not saved yet: its first message does that"),
        ("system", chat.conversation.system or "none"), ("turns", str(len(chat.turns))),
        ("on_overflow", chat.overflow), *show(chat.params),
        ("markdown", "on" if repl.screen.markdown else "off"), ("stats", "on" if repl.screen.stats else "off"),
    ]  # fmt: skip
    repl.tell(_columns(rows))


def _system(repl: Repl, argument: str) -> None:
    conversation = repl.chat.conversation
    if not argument:
        repl.tell(conversation.system or "no system text; /system TEXT sets one")
        return
    conversation.system = "" if argument in ("none", "off") else argument
    repl.remember()
    repl.tell("system text set" if conversation.system else "no system text any more")


def _regen(repl: Repl, argument: str) -> None:
    repl.answer(repl.chat.regenerate())


def _undo(repl: Repl, argument: str) -> None:
    question = repl.chat.undo()
    repl.draft = question.content
    repl.tell(f"taken back; {len(repl.chat.turns)} turns are left")


def _edit(repl: Repl, argument: str) -> None:
    questions = repl.chat.conversation.questions()
    if not questions:
        raise UsageError("nothing has been said yet", "type a message first")
    if argument:
        repl.answer(repl.chat.edit(argument))
        return
    repl.draft, repl.replaces = repl.chat.turns[questions[-1]].content, True


def _continue(repl: Repl, argument: str) -> None:
    repl.answer(repl.chat.proceed())


def _file(repl: Repl, argument: str) -> None:
    from mixlocal.cli.prompt_input import attach

    if not argument:
        raise UsageError("which file?", "/file PATH")
    text = attach(argument)
    repl.files.append(text)
    repl.tell(f"{argument}: {len(text):,} characters go with the next message")


def _copy(repl: Repl, argument: str) -> None:
    answers = [turn.content for turn in repl.chat.turns if turn.role == "assistant"]
    if not answers:
        raise UsageError("there is no answer to copy")
    repl.tell(copy(answers[-1]))


def _stats(repl: Repl, argument: str) -> None:
    from mixlocal.cli.answer import details

    if repl.chat.stats is None:
        raise UsageError("no answer has been finished yet")
    repl.tell(details(repl.chat.stats))


def _experts(repl: Repl, argument: str) -> None:
    """As `mixlocal experts`, of the tokens that were computed lately."""
    from mixlocal.cli.experts_table import bars, highest_load

    usage = repl.chat.session.expert_usage()
    if usage is None:
        raise UsageError("nothing has been computed yet")
    repl.tell(
        f"the last {usage.tokens} tokens, by layer: share of the choices of each expert, 0 to {usage.n_experts - 1};\n"
        f"of consecutive tokens, those with the same first choice (random: {100 * usage.random_first_same:.0f} %) "
        f"and with a first or second in common (random: {100 * usage.random_shared:.0f} %)"
    )
    highest = highest_load(usage)
    for layer, load in enumerate(usage.load):
        most = usage.most(layer)
        repl.tell(
            f"layer {layer:2}  {bars(load, highest)}   most: {most} ({100 * load[most]:.0f} %)   "
            f"same {100 * usage.first_same[layer]:2.0f} %   shared {100 * usage.shared[layer]:2.0f} %"
        )


def _ctx(repl: Repl, argument: str) -> None:
    chat = repl.chat
    used, context = chat.count_tokens(), chat.session.context
    sent = len(chat.turns) - chat.conversation.first
    rows = [
        ("used", f"{used:,} of {context:,} tokens ({100 * used / context:.0f} %)"), ("free", f"{context - used:,}"),
        ("turns sent", f"{sent} of {len(chat.turns)}"), ("in the KV cache", f"{chat.cache.length:,}"),
    ]  # fmt: skip
    repl.tell(_columns(rows))


def _model(repl: Repl, argument: str) -> None:
    if argument:
        repl.switch(argument)
    session = repl.chat.session
    repl.tell(f"{session.name}:{session.variant}, context {session.context:,} tokens")


def _quit(repl: Repl, argument: str) -> None:
    raise Leave


def _settings(repl: Repl, typed: str) -> Iterable[str]:
    from mixlocal.app.settings import NAMES

    return matching([*NAMES, "on-overflow", "markdown", "stats"], typed)


def _models(repl: Repl, typed: str) -> Iterable[str]:
    from mixlocal.errors import MixlocalError
    from mixlocal.store.model_store import find_stores

    stores = find_stores(repl.start.folders.models)
    names = [f"{s.manifest.name}:{s.manifest.variant}" for s in stores if not isinstance(s, MixlocalError)]
    return matching(names, typed)


def _paths(repl: Repl, typed: str) -> Iterable[str]:
    from mixlocal.cli.chat.paths import complete_path

    return complete_path(typed)


def _columns(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{name:16}{value}" for name, value in rows)


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise UsageError(f"on or off, not {value!r}")
    return value == "on"


def _overflow(value: str) -> Overflow:
    if value == "error":
        return "error"
    if value == "drop-oldest":
        return "drop-oldest"
    raise UsageError(f"on-overflow is error or drop-oldest, not {value!r}")


_ALL = (
    Slash("help", "[COMMAND]", "this list", _help),
    Slash("set", "[K V]", "a setting of the answers: temperature 0.2, seed 7, max-tokens 900", _set, _settings),
    Slash("show", "", "model, session, system text and settings", _show),
    Slash("system", "[TEXT]", "show or set the system text; none removes it", _system),
    Slash("regen", "", "answer the last message once more", _regen),
    Slash("undo", "", "take the last message and its answer back", _undo),
    Slash("edit", "[TEXT]", "change the last message and answer it", _edit),
    Slash("continue", "", "go on with the last answer", _continue),
    Slash("file", "PATH", "send a file's text with the next message", _file, _paths, waits=True),
    *SAVED,
    Slash("copy", "", "the last answer to the clipboard", _copy, waits=True),
    Slash("stats", "", "what the last answer took", _stats),
    Slash("experts", "", "which experts were chosen lately", _experts),
    Slash("ctx", "", "how full the context is", _ctx),
    Slash("model", "[MODEL]", "go on with another model", _model, _models, waits=True),
    Slash("quit", "", "end the chat", _quit),
)
COMMANDS = {command.name: command for command in _ALL}
