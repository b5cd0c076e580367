"""mixlocal chat in a real terminal, on smolmix: what the screen shows is what a chat in this process says."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from terminal import Terminal

from mixlocal.app.chat import Chat
from mixlocal.app.session import Session
from mixlocal.cli.markdown import render_markdown
from mixlocal.engine.params import SamplingParams
from mixlocal.store.model_store import ModelStore

GREEDY = ("-T", "0", "--top-p", "1", "--repeat-penalty", "1", "-n", "24", "--ctx", "1024")
SIGINTS = 100


@pytest.fixture(scope="module")
def twin(smolmix: ModelStore) -> Iterator[Chat]:
    """The same model here, to know what it says."""
    with Session.open(str(smolmix.folder), context=1024) as session:
        params = SamplingParams(temperature=0, top_p=1, repeat_penalty=1, max_tokens=24, seed=1)
        yield Chat(session, params=params)


def answer(twin: Chat, text: str) -> str:
    with twin.send(text) as answer:
        for _ in answer:
            pass
    return twin.turns[-1].content


def rendered(markdown: str, width: int = 80) -> str:
    """As it stands on a screen without colours, but for the spaces at the ends of lines."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False, highlight=False)
    render_markdown(console, markdown)
    return trimmed(console.file.getvalue())


def trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")


class Talk:
    """A chat on a screen, one step after another."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.terminal.ready()
        self.steps = 0

    def step(self, keys: str) -> str:
        """Type, and Enter; returns what the program wrote below the line until it was ready for more."""
        above, prompts = len(self.lines()), self.terminal.prompts()
        self.terminal.say(keys)
        self.terminal.ready(prompts + 1)
        self.steps += 1
        return trimmed("\n".join(self.lines()[above:-1]))

    def lines(self) -> list[str]:
        """All that was ever shown, without what is empty and the status line below."""
        lines = self.terminal.text().split("\n")[:-1]
        while lines and not lines[-1].strip():
            lines.pop()
        return lines


FOOTER = re.compile(r"prompt \d+ tok (\(\+(\d+) kept\) )?\d+ t/s · gen (\d+) tok")
END = re.compile(r"^(max-tokens \(\d+\) reached|prompt \d+ tok )", re.MULTILINE)


def shows_answer(shown: str, text: str) -> None:
    """An answer and its figures."""
    assert trimmed(END.split(shown)[0]) == rendered(text)
    assert kept(shown) >= 0


def kept(shown: str) -> int:
    """How many tokens the figures say were not read again."""
    figures = FOOTER.search(shown.replace("\n", ""))
    assert figures, shown
    return int(figures[2] or 0)


def test_a_session_over_all_commands_and_keys(place: Path, twin: Chat, tmp_path: Path) -> None:
    """What each step leaves on the screen."""
    (tmp_path / "facts.txt").write_text("The harbour of Veyra freezes in March.\n")
    twin.clear("")
    with Terminal("chat", *GREEDY, home=place, EDITOR=str(editor(tmp_path)), VISUAL="") as terminal:
        talk = Talk(terminal)
        assert "smolmix:q8, context 1,024 tokens; /help lists commands" in terminal.text()
        conversation(talk, twin)
        settings(talk, twin)
        keys(talk, twin, tmp_path)
        saved(talk, twin, tmp_path)
        assert talk.steps >= 30
        terminal.say("/quit")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.text()


def conversation(talk: Talk, twin: Chat) -> None:
    """Messages, and going back and on."""
    shows_answer(talk.step("Why is the sky blue?"), answer(twin, "Why is the sky blue?"))
    second = talk.step("And at night?")
    shows_answer(second, answer(twin, "And at night?"))
    assert kept(second) > 50  # the first turn is not read again
    assert "4 of 4" in talk.step("/ctx")
    shows_answer(talk.step("/regen"), twin.turns[-1].content)
    assert talk.step("/undo") == "taken back; 2 turns are left"
    assert talk.terminal.display()[talk.terminal.screen.cursor.y] == "> And at night?"  # to be sent again or changed
    twin.undo()
    shows_answer(talk.step(" Or at dawn?"), answer(twin, "And at night? Or at dawn?"))
    before = twin.turns[-1].content
    with twin.proceed() as more:
        for _ in more:
            pass
    shows_answer(talk.step("/continue"), twin.turns[-1].content.removeprefix(before))
    twin.undo()
    shows_answer(talk.step("/edit Why is grass green?"), answer(twin, "Why is grass green?"))
    talk.step("/edit")
    assert talk.terminal.display()[talk.terminal.screen.cursor.y] == "> Why is grass green?"
    assert "editing the last message" in talk.terminal.display()[-1]
    twin.undo()
    shows_answer(talk.step(" Say why."), answer(twin, "Why is grass green? Say why."))
    shows_answer(talk.step("//help is what I type"), answer(twin, "/help is what I type"))
    assert "gen" not in talk.step("/nosuch")
    assert "no command /nosuch" in talk.terminal.text()
    assert "did you mean /regen" in talk.step("/rgen").replace("\n", " ")
    assert "/set [K V]" in talk.step("/help")
    assert "Enter sends" not in talk.step("/help set")


def settings(talk: Talk, twin: Chat) -> None:
    assert talk.step("/system Answer in capitals.") == "system text set"
    assert talk.step("/system") == "Answer in capitals."
    twin.conversation.system = "Answer in capitals."
    shows_answer(talk.step("Hello!"), answer(twin, "Hello!"))
    assert talk.step("/system none") == "no system text any more"
    twin.conversation.system = ""
    assert talk.step("/set max-tokens 8") == "max-tokens      8"
    twin.params = SamplingParams(temperature=0, top_p=1, repeat_penalty=1, max_tokens=8, seed=1)
    shows_answer(talk.step("Count to ten."), answer(twin, "Count to ten."))
    assert talk.step("/set max_tokens 24").endswith("24")
    twin.params = SamplingParams(temperature=0, top_p=1, repeat_penalty=1, max_tokens=24, seed=1)
    assert "takes a number, not 'warm'" in talk.step("/set temperature warm")
    assert "temperature     0.0" in talk.step("/set")
    assert "smolmix:q8" in talk.step("/show")
    assert talk.step("/set markdown off") == "markdown        off"
    shows_plain(talk.step("Write **bold** words."), answer(twin, "Write **bold** words."))
    assert talk.step("/set markdown on") == "markdown        on"
    assert re.search(r"answer +24 tokens", talk.step("/stats"))
    assert "layer 29" in talk.step("/experts")
    assert "handed to the terminal's clipboard" in talk.step("/copy")
    assert b"\x1b]52;c;" in talk.terminal.raw
    assert talk.step("/model") == "smolmix:q8, context 1,024 tokens"
    assert "not installed" in talk.step("/model mixtral-8x7b")


def shows_plain(shown: str, text: str) -> None:
    """Markdown as it was written, wrapped by the terminal."""
    assert END.split(shown)[0].replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")


def keys(talk: Talk, twin: Chat, tmp_path: Path) -> None:
    """What the line editor does."""
    terminal = talk.terminal
    shows = talk.step("One line\nand another\x1b\rand a third")  # Ctrl-J, Alt-Enter
    said = "One line\nand another\nand a third"
    shows_answer("\n".join(shows.split("\n")[2:]), answer(twin, said))
    pasted = talk.step("\x1b[200~First\nSecond /quit\x1b[201~")
    shows_answer("\n".join(pasted.split("\n")[1:]), answer(twin, "First\nSecond /quit"))
    terminal.type("/sho\t")
    terminal.until(lambda: "> /show" in terminal.display()[terminal.screen.cursor.y])
    assert "on_overflow" in talk.step("")
    terminal.type(f"/file {tmp_path}/fac\t")
    terminal.until(r"facts\.txt")
    assert "41 characters" not in terminal.text()
    assert "characters go with the next message" in talk.step("").replace("\n", "")
    assert "1 file attached" in terminal.display()[-1]
    whole = f"{tmp_path}/facts.txt:\n```\nThe harbour of Veyra freezes in March.\n```\n\nWhen does it freeze?"
    shows_answer(talk.step("When does it freeze?"), answer(twin, whole))
    terminal.type("\x12")  # Ctrl-R
    terminal.until("I-search backward:")
    terminal.type("capit")
    terminal.until("> /system Answer in capitals")
    terminal.type("\r")  # takes what was found
    terminal.until(lambda: "I-search" not in terminal.text())
    terminal.type("\x03")
    terminal.until(lambda: terminal.display()[terminal.screen.cursor.y] == ">")
    shows_answer(talk.step("nothing"), answer(twin, "nothing"))
    terminal.type("draft\x07")  # Ctrl-G: the editor writes another text
    terminal.until(lambda: "> from the editor" in terminal.display()[terminal.screen.cursor.y])
    shows_answer(talk.step(""), answer(twin, "from the editor"))
    shows_answer(talk.step("\x1b[A"), answer(twin, "from the editor"))  # Up
    prompts = terminal.prompts()
    terminal.type("half a line\x03")
    terminal.until(lambda: terminal.display()[terminal.screen.cursor.y] == ">")
    assert terminal.prompts() == prompts  # the first Ctrl-C clears the line
    terminal.type("\x03")
    terminal.ready(prompts + 1)
    assert "Ctrl-C again, Ctrl-D or /quit ends the chat" in terminal.text()


def saved(talk: Talk, twin: Chat, tmp_path: Path) -> None:
    """Sessions, and the files that are written."""
    assert talk.step("/save harbour talk") == "this chat is called harbour talk now"
    assert "harbour talk" in talk.step("/sessions")
    assert "harbour talk" in talk.step("/sessions VEYRA")
    assert "harbour" not in talk.step("/sessions volcano")
    assert "written to" in talk.step(f"/export {tmp_path}/talk.md").replace("\n", "")
    assert "Why is the sky blue?" in (tmp_path / "talk.md").read_text()
    assert "is there already" in talk.step(f"/export {tmp_path}/talk.md").replace("\n", "")
    assert "/load harbour talk" in talk.step("/clear").replace("\n", " ")
    other = talk.step("What is two and two?")
    assert kept(other) < 30
    assert talk.step("/new sums").endswith("called sums")
    assert "no chat is called 'harbor talk'" in talk.step("/load harbor talk").replace("\n", " ")
    resumed = talk.step("/load harbour")
    assert re.search(rf"harbour talk: {len(twin.turns)} turns, \d+ tokens, its KV cache is back", resumed)
    assert rendered(twin.turns[-1].content) in resumed
    answered = talk.step("Thank you.")
    shows_answer(answered, answer(twin, "Thank you."))
    assert kept(answered) > 300  # nothing was read again


def editor(folder: Path) -> Path:
    """A program that replaces the file it is given."""
    path = folder / "editor"
    path.write_text("#!/bin/sh\nprintf 'from the editor' > \"$1\"\n")
    path.chmod(0o755)
    return path
