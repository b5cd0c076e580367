"""What the command line says of all rows; a row's own keys win."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mixlocal.app.batch.lines import InputFormat
from mixlocal.app.batch.row_template import RowTemplate
from mixlocal.app.json_form import JsonForm
from mixlocal.app.template import Message


@dataclass(frozen=True, slots=True)
class Setup:
    """template: makes the prompts out of the rows. sampling: of the fields of `SamplingParams`, those that were
    given, without the seed."""

    format: InputFormat
    template: RowTemplate | None = None
    system: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    form: JsonForm | None = None

    def conversation(self, text: str, system: str | None = None) -> str | tuple[Message, ...]:
        """One message, behind a system text if there is one. system: the row's own."""
        said = self.system if system is None else system
        return (Message("system", said), Message("user", text)) if said else text

    def with_system(self, messages: tuple[Message, ...], system: str | None = None) -> tuple[Message, ...]:
        """Behind a system text, unless they bring their own."""
        said = self.system if system is None else system
        if not said or messages[0].role == "system":
            return messages
        return (Message("system", said), *messages)
