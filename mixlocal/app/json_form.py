"""JSON schemas that an answer can be held to: those that llguidance knows how to follow.

https://github.com/guidance-ai/llguidance, docs/json_schema.md: what of JSON Schema 2020-12 that is. Properties come in
the schema's order.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mixlocal.app.tokenizer_files import first_line
from mixlocal.errors import RefusedError, UsageError
from mixlocal.store.strict_json import parse_json_object

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

ANY_OBJECT = '{"type": "object"}'
# Between two marks of JSON: nothing, a space, or a new line and its indentation. Without bounds small models ramble.
WHITESPACE = r" |\n {0,16}"
_MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_ONES = ("items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else")


@dataclass(frozen=True, slots=True)
class JsonForm:
    """What JSON an answer may be; schema: a text that `read_form` has looked at."""

    schema: str

    def grammar(self, *, space: bool = False) -> str:
        """llguidance's form of it; space: one may stand in front."""
        matcher = library().LLMatcher
        lark = f'start: SPACE? json\nSPACE: " "\njson: %json {self.schema}'
        grammar: str = matcher.grammar_from_lark(lark) if space else matcher.grammar_from_json_schema(self.schema)
        return grammar

    def accepts(self, text: str) -> bool:
        """Whether `text` is whole and as the schema says: byte for byte, whatever tokens it was made of."""
        matcher: LLMatcher = library().LLMatcher(_byte_table(), self.grammar(), log_level=0)
        return matcher.consume_tokens(list(text.strip().encode())) and matcher.is_accepting()


def read_form(schema: bytes, where: str) -> JsonForm:
    """The form of a JSON schema; `where` names it in errors. Raises `UsageError` for what is no JSON object, no schema
    or more than llguidance can follow."""
    try:
        value = parse_json_object(schema, where)
    except RefusedError as error:
        raise UsageError(error.message) from error
    options = value.get("x-guidance", {})
    if not isinstance(options, dict):
        raise UsageError(f"{where}: x-guidance is not an object")
    form = JsonForm(json.dumps(value | {"x-guidance": {"whitespace_pattern": WHITESPACE} | options}))
    trouble = _trouble(form.schema)
    if trouble:
        raise UsageError(
            f"{where}: cannot be followed at {_place(value, trouble) or 'its top'}: {trouble}",
            "what can be: https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md",
        )
    return form


def library() -> ModuleType:
    """llguidance, which few runs need."""
    try:
        import llguidance
    except ImportError as error:
        raise RefusedError(
            "an answer in JSON needs the package llguidance, which is not installed", "pip install 'llguidance>=1.8'"
        ) from error
    return llguidance


def make_table(tokens: Sequence[bytes], end: int, encode: Callable[[str], list[int]]) -> LLTokenizer:
    """A vocabulary for llguidance. tokens: b"" is never allowed. end: the token that ends an answer."""
    module = library()
    table: LLTokenizer = module.LLTokenizer(module.TokenizerWrapper(_Vocabulary(tokens, end, encode)))
    return table


class _Vocabulary:
    """What `llguidance.TokenizerWrapper` asks for."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: Sequence[bytes], end: int, encode: Callable[[str], list[int]]) -> None:
        self.tokens, self.eos_token_id, self._encode = tokens, end, encode

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())


@functools.cache
def _byte_table() -> LLTokenizer:
    """A token for each byte; 0xFF is in no text."""
    return make_table([*(bytes([byte]) for byte in range(255)), b"", b""], 256, lambda text: list(text.encode()))


def _trouble(schema: str) -> str:
    """What llguidance has against a schema; empty if nothing."""
    matcher = library().LLMatcher
    try:
        return one_line(matcher.validate_grammar(matcher.grammar_from_json_schema(schema), _byte_table()))
    except ValueError as error:
        return first_line(error)


def one_line(message: str) -> str:
    """Of llguidance's; of a regular expression's error the last line, which says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return (lines[-1] if lines and lines[0].startswith("regex parse error") else " ".join(lines))[:300]


def _place(schema: dict[str, Any], trouble: str) -> str:
    """JSON pointer of the innermost part that has the same trouble by itself, which llguidance does not tell."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    place, part = "", schema
    while True:
        inner = ((name, sub) for name, sub in _parts(part) if _trouble(json.dumps(shared | sub)) == trouble)
        name, part = next(inner, ("", {}))
        if not name:
            return place if len(place) <= 200 else f"...{place[-200:]}"
        place += name


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas directly inside one, with their JSON pointers from it."""
    found: list[tuple[str, Any]] = [(f"/{key}", schema[key]) for key in _ONES if key in schema]
    for key in _MAPS:
        subs = schema.get(key)
        if isinstance(subs, dict):
            found += [(f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", sub) for name, sub in subs.items()]
    for key in _LISTS:
        subs = schema.get(key)
        if isinstance(subs, list):
            found += [(f"/{key}/{n}", sub) for n, sub in enumerate(subs)]
    return ((place, sub) for place, sub in found if isinstance(sub, dict))
