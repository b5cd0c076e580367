"""`--template`: a text with {field} where a row's own value goes; {{ and }} are braces."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixlocal.errors import UsageError

LINE = "line"  # the field that a line of text has
_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class RowTemplate:
    """source: as it was written. Raises `UsageError` for a brace without its other half and for a place without name.

    No attribute, index or format of a field can be named: rows come from anywhere.
    """

    source: str

    def __post_init__(self) -> None:
        for match in _PLACE.finditer(self.source):
            if match[0] in ("{", "}"):
                raise UsageError(
                    f"--template: a {match[0]} without its other half at character {match.start() + 1}",
                    "write {{ or }} for a brace",
                )
            if match[1] is not None and not match[1].strip():
                raise UsageError(f"--template: {match[0]} at character {match.start() + 1} names no field")
        if not self.names:
            raise UsageError("--template names no field: every row would ask the same", "for example {prompt}")

    @property
    def names(self) -> frozenset[str]:
        return frozenset(match[1].strip() for match in _PLACE.finditer(self.source) if match[1] is not None)

    def fill(self, fields: Mapping[str, Any]) -> str:
        """Texts as they are, anything else as JSON. Raises `UsageError` naming a field that is not there."""

        def value(match: re.Match[str]) -> str:
            if match[1] is None:
                return match[0][0]
            name = match[1].strip()
            if name not in fields:
                raise UsageError(f"has no field {name!r}, which the template names")
            found = fields[name]
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)

        return _PLACE.sub(value, self.source)
