"""The loop of a chat: read a line, do what it says, show the answer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from mixlocal.cli.chat.commands import COMMANDS
from mixlocal.cli.chat.editor import Editor, Lines, Reader
from mixlocal.cli.chat.interrupts import Interrupts
from mixlocal.cli.chat.screen import Screen
from mixlocal.cli.chat.slash import Leave, Slash, find, message, parse
from mixlocal.cli.chat.start import Start
from mixlocal.cli.loading import close_session, open_session
from mixlocal.cli.options import Globals
from mixlocal.cli.render import print_error, safe_text, say, warn
from mixlocal.errors import MixlocalError, UsageError

if TYPE_CHECKING:
    from mixlocal.app.chat import Answer
    from mixlocal.app.saved_chat import About
    from mixlocal.app.session import Session
    from mixlocal.store.session_db import SavedSession, SessionDb, Turn


class Repl:
    """chat, saved: the conversation and its place on disk. draft: what the next line begins with. replaces: the next
    message takes the place of the last. files: texts to be sent with the next message."""

    def __init__(self, options: Globals, start: Start, session: Session, db: SessionDb) -> None:
        from mixlocal.app.chat import Chat
        from mixlocal.app.saved_chat import About, SavedChat

        self.options, self.start = options, start
        params = start.params(session.defaults)
        self.saved = SavedChat(db, start.folders, About(session.name, session.variant, start.system, params))
        self.chat = Chat(session, system=start.system, params=params, overflow=start.overflow, record=self.saved)
        self._interrupts = Interrupts()
        self.screen = Screen(options, self._interrupts, stats=start.stats, markdown=start.markdown)
        self.draft, self.replaces = "", False
        self.files: list[str] = list(start.files)
        self._reader: Reader = self._editor() if sys.stdin.isatty() and sys.stdout.isatty() else Lines(self._interrupts)
        self._warned = False

    def run(self) -> None:
        """Until /quit, Ctrl-D or the second Ctrl-C on an empty line. Raises KeyboardInterrupt for that."""
        with self._interrupts:
            while self._turn():
                pass

    def _turn(self) -> bool:
        """One line and what it asks for; False at the end."""
        try:
            self._interrupts.forget()
            line = self._read()
            self._warned = False
            self._do(line)
        except (EOFError, Leave):
            return False
        except MixlocalError as error:
            print_error(error.message, error.hint, as_json=False)
        except KeyboardInterrupt:
            self._hint()
        return True

    def greet(self) -> None:
        session = self.chat.session
        say(
            self.options,
            f"{session.name}:{session.variant}, context {session.context:,} tokens; /help lists commands, Ctrl-D ends",
        )

    def _read(self) -> str:
        draft, self.draft = self.draft, ""
        return self._reader.read(draft)

    def _do(self, line: str) -> None:
        command = parse(line)
        if command is not None:
            self._run(find(COMMANDS, command[0]), command[1])
        elif line.strip() or self.files:
            self._say(message(line))

    def _run(self, command: Slash, argument: str) -> None:
        with self._interrupts.raising() if command.waits else nullcontext():
            command.run(self, argument)

    def _say(self, text: str) -> None:
        """What is typed goes to the model, behind the files it is about."""
        whole = "\n\n".join([*self.files, text]) if text.strip() else "\n\n".join(self.files)
        replaces, self.replaces = self.replaces, False
        try:
            answer = self.chat.edit(whole) if replaces else self.chat.send(whole)
        except MixlocalError:
            self.draft, self.replaces = text, replaces  # nothing typed is lost
            raise
        self.files.clear()
        self.answer(answer)

    def answer(self, answer: Answer) -> None:
        for notice in answer.notices:
            say(self.options, notice)
        self.screen.show(self.chat, answer)

    def _hint(self) -> None:
        """Ctrl-C on an empty line."""
        if self._warned:
            raise KeyboardInterrupt
        self._warned = True
        self.draft, self.replaces = "", False
        say(self.options, "Ctrl-C again, Ctrl-D or /quit ends the chat")

    # ---- what commands do to the whole

    def tell(self, text: str) -> None:
        """What a command was asked to show; unlike talk, --quiet does not silence it."""
        print(safe_text(text), file=sys.stderr, flush=True)

    def remember(self) -> None:
        """Model, system text or settings have changed."""
        self.saved.describe(self.about())

    def about(self) -> About:
        from mixlocal.app.saved_chat import About

        session = self.chat.session
        return About(session.name, session.variant, self.chat.conversation.system, self.chat.params)

    def leave_session(self) -> None:
        """Keep the KV cache of the present chat, if it can be kept."""
        try:
            self.saved.save_cache(self.chat)
        except MixlocalError as error:
            warn(self.options, f"the KV cache is not kept, so this chat will be read anew: {error.message}")

    def begin(self, name: str | None, system: str) -> None:
        """Another chat with the same model; the former stays as it was left."""
        self.saved.begin(name)
        self.chat.clear(system)
        self.remember()

    def resume(self, head: SavedSession) -> None:
        """Go on with a saved chat: its turns, system text and settings, with the model that is loaded."""
        from mixlocal.app.saved_chat import saved_params, turns_for

        session = self.chat.session
        turns = turns_for(self.saved.load(head), head, session.name, session.variant)
        self.chat.clear(head.system, turns)
        self.chat.params = saved_params(head, self.chat.params)
        why = self.saved.restore_cache(self.chat) if turns else ""
        self._tell_resumed(turns, why)

    def _tell_resumed(self, turns: list[Turn], why: str) -> None:
        from mixlocal.app.saved_chat import LEAST_TOKENS

        tokens = self.chat.count_tokens()
        how = f", to be read again with your next message: {why}" if why else ", its KV cache is back"
        say(self.options, f"{self.saved.name}: {len(turns)} turns, {tokens} tokens{how * (tokens > LEAST_TOKENS)}")
        for turn in turns[-2:]:
            if turn.role == "user":
                self.tell("> " + turn.content.replace("\n", "\n  "))
            else:
                self.screen.page(turn.content)

    def switch(self, model: str) -> None:
        """Another model for the same chat. The former is let go first, as both need not fit, and is loaded again if
        that fails."""
        self.start.check(model)
        former = f"{self.chat.session.name}:{self.chat.session.variant}"
        self.leave_session()
        close_session(self.options, self.chat.session)
        try:
            self.chat.use(self._open(model))
        except (MixlocalError, KeyboardInterrupt):
            say(self.options, f"loading {former} again")
            self.chat.use(self._open(former))
            raise
        self.remember()

    def _open(self, model: str) -> Session:
        return open_session(self.options, model, self.start.run, self.start.folders)

    def status(self) -> str:
        """The bottom line."""
        session, context = self.chat.session, self.chat.session.context
        used = self.chat.cache.length if self.chat.turns else 0
        parts = [f"{session.name}:{session.variant}", f"{used:,}/{context:,} tok ({100 * used // context}%)"]
        parts += [f"{len(self.files)} file{'s' * (len(self.files) > 1)} attached"] if self.files else []
        parts += ["editing the last message"] if self.replaces else []
        parts += [self.saved.name or "not saved yet"]
        return f" {' · '.join(parts)} "

    def completions(self, before: str) -> Iterable[str]:
        """What may stand instead of the last word before the cursor."""
        name, space, argument = before[1:].partition(" ")
        if not before.startswith("/") or before.startswith("//"):
            return []
        if not space:
            return [f"/{command} " for command in COMMANDS if command.startswith(name)]
        try:
            command = find(COMMANDS, name)
        except UsageError:
            return []
        return command.complete(self, argument) if command.complete else []

    def _editor(self) -> Editor:
        return Editor(self._interrupts, self.start.history_file(), self.completions, self.status)
