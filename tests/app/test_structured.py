"""Answers in JSON: every one that is finished is as its schema says, whatever the model would have liked to say."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import jsonschema
import pytest
import tiny
import torch
from stores import quantized

from mixlocal.app.json_form import ANY_OBJECT, JsonForm, read_form
from mixlocal.app.session import Session
from mixlocal.app.structured import JsonConstraint, TokenTable
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import RefusedError, UsageError

OBJECT = json.dumps({
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "n": {"type": "integer"}},
    "required": ["name", "n"], "additionalProperties": False,
})  # fmt: skip


def form(schema: object) -> JsonForm:
    return read_form((schema if isinstance(schema, str) else json.dumps(schema)).encode(), "--schema")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """Two more rows in the embedding than the tokenizer has tokens."""
    root = tmp_path_factory.mktemp("structured")
    checkpoint = tiny.write_checkpoint(root / "checkpoint", max_position_embeddings=1024)
    return Session.open(str(quantized(checkpoint, root / "store", "bf16").folder))


@pytest.fixture(scope="module")
def table(session: Session) -> TokenTable:
    return TokenTable(session.tokenizer, session.config.vocab_size)


def answer(session: Session, schema: JsonForm, table: TokenTable, n: int = 600, **params: Any) -> tuple[str, str]:
    """Text and finish."""
    sampling = SamplingParams(**{"max_tokens": n, "temperature": 1.0, "seed": 1} | params)
    chunks = list(session.stream("Go", sampling, constraint=JsonConstraint(schema, table)))
    return "".join(chunk.text for chunk in chunks), str(chunks[-1].finish)


class Schemas:
    """Random ones of moderate size, always with an answer; strings, arrays and numbers are bounded, for a model of
    random weights has no reason ever to end one."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def any(self, depth: int = 3) -> dict[str, Any]:
        leaves = [
            self.string,
            self.integer,
            self.number,
            self.enum,
            self.constant,
            self.simple,
            self.pattern,
            self.format,
        ]
        inner = [self.object, self.array, self.any_of, self.tuple] if depth else []
        kind = self._random.choice(leaves + inner * 2)
        return kind(depth - 1) if kind in inner else kind()  # type: ignore[call-arg]

    def string(self) -> dict[str, Any]:
        low = self._random.randint(0, 4)
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randint(0, 8)}

    def pattern(self) -> dict[str, Any]:
        return {"type": "string", "pattern": self._random.choice(["^[a-z]{1,5}$", "^(a|bc){2}-[0-9]{3}$", "^x?y*z$"])}

    def format(self) -> dict[str, Any]:
        return {"type": "string", "format": self._random.choice(["date", "ipv4", "uuid"])}

    def integer(self) -> dict[str, Any]:
        low = self._random.randint(-500, 500)
        step = {"multipleOf": self._random.choice([2, 5, 7])} if self._random.random() < 0.3 else {}
        return {"type": "integer", "minimum": low, "exclusiveMaximum": low + self._random.randint(20, 999)} | step

    def number(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self._random.randint(-9, 0), "maximum": self._random.randint(1, 99)}

    def enum(self) -> dict[str, Any]:
        return {"enum": self._random.sample(["red", "grün", 1, 2.5, None, True, ["a"], {"k": "v"}], 3)}

    def constant(self) -> dict[str, Any]:
        return {"const": self._random.choice(["v1", 0, False, None])}

    def simple(self) -> dict[str, Any]:
        return {"type": self._random.choice(["boolean", "null", ["boolean", "null"]])}

    def array(self, depth: int) -> dict[str, Any]:
        low = self._random.randint(0, 2)
        return {
            "type": "array",
            "items": self.any(depth),
            "minItems": low,
            "maxItems": low + self._random.randint(0, 2),
        }

    def tuple(self, depth: int) -> dict[str, Any]:
        return {"type": "array", "prefixItems": [self.any(depth), self.any(depth)], "items": False, "minItems": 1}

    def any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.any(depth), self.any(depth)]}

    def object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(["id", "name", "größe", "a b", 'q"uote', "tags", "x/y"], self._random.randint(1, 4))
        required = [name for name in names if self._random.random() < 0.6]
        properties = {name: self.any(depth) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def test_200_random_schemas(session: Session, table: TokenTable) -> None:
    schemas = Schemas(7)
    finished = 0
    for n in range(200):
        schema = schemas.object(3) if n % 2 else schemas.any()
        it = form(schema)
        text, finish = answer(session, it, table, seed=n)
        whole = it.accepts(text)
        assert whole or finish == "length"
        if whole:
            validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
            validator.validate(json.loads(text))
            finished += 1
    assert finished >= 150


def test_greedy_and_seeded_answers_repeat(session: Session, table: TokenTable) -> None:
    assert answer(session, form(OBJECT), table) == answer(session, form(OBJECT), table)
    assert answer(session, form(OBJECT), table, temperature=0.0)[0].startswith("{")


def test_whitespace_is_bounded(table: TokenTable) -> None:
    assert allowed(JsonConstraint(form(OBJECT), table, "{\n" + " " * 16), table) == {'"'}
    with pytest.raises(UsageError, match="allows no answer that begins with"):
        JsonConstraint(form(OBJECT), table, "{\n\n")


def allowed(constraint: JsonConstraint, table: TokenTable) -> set[str]:
    """What the tokens write; controls by their id."""
    mask = constraint.allowed()
    assert mask.dtype == torch.bool
    assert mask.shape == (table.size,)
    tokenizer = table.tokenizer
    ids = mask.nonzero().flatten().tolist()
    return {tokenizer.token_bytes(i).decode("latin-1") or f"<{i}>" for i in ids}


def test_only_text_is_allowed_and_the_end_only_at_the_end(session: Session, table: TokenTable) -> None:
    """Neither control tokens nor rows beyond the vocabulary, not even where any text is."""
    constraint = JsonConstraint(form(OBJECT), table, '{"name": "')
    mask = constraint.allowed()
    assert not mask[256:].any()
    assert int(mask.sum()) > 100
    ended = JsonConstraint(form(OBJECT), table, '{"name": "", "n": 5}')
    assert ended.allowed().nonzero().flatten().tolist() == list(session.tokenizer.eos_ids)
    number = JsonConstraint(form({"type": "integer"}), table, "12")
    assert allowed(number, table) == {*"0123456789", "<257>"}
    number.accept(257)


def test_every_end_of_the_model_ends(session: Session) -> None:
    class TwoEnds:
        eos_ids = (257, 256)

        def __getattr__(self, name: str) -> Any:
            return getattr(session.tokenizer, name)

    table = TokenTable(TwoEnds(), 260)  # type: ignore[arg-type]
    assert allowed(JsonConstraint(form({"const": 1}), table, "1"), table) == {"<256>", "<257>"}
    TwoEnds.eos_ids = ()  # type: ignore[assignment]
    with pytest.raises(RefusedError, match="could not end"):
        TokenTable(TwoEnds(), 260)  # type: ignore[arg-type]


def test_a_form_judges_text_alone() -> None:
    it = form(OBJECT)
    assert it.accepts('{"name": "a", "n": 1}')
    assert it.accepts(' {"name":"é","n":1}')
    for text in ("", "{}", '{"name": "a", "n": 1', '{"name": "a", "n": 1}}', '{"name": "toolong", "n": 1}', "[]"):
        assert not it.accepts(text)
    assert form(ANY_OBJECT).accepts('{"x": [1, {"y": null}]}')


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("[1]", "not a JSON object"),
        ('{"type":', "line 1 column 9"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ({"type": "objekt"}, "at its top: Invalid type: objekt"),
        ({"properties": {"a": {"items": {"type": "strin"}}}}, "at /properties/a/items: Invalid type: strin"),
        ({"anyOf": [{"type": "null"}, {"not": {}}]}, 'at /anyOf/1: Unimplemented keys: ["not"]'),
        ({"properties": {"a/b": {"pattern": "(?=x)"}}}, "at /properties/a~1b: error: look-around"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"uniqueItems": True, "type": "array"}}}, "at /$defs/x: Unimplemented"),
        ({"$ref": "http://example.org/x"}, "http://example.org/x"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength (3) is greater than maxLength (2)"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "coerce_one_of"),
        ({"x-guidance": 1}, "x-guidance is not an object"),
        ({"x-guidance": {"what": 1}}, "unknown field `what`"),
        ('{"items":' * 5000, "nested too deeply"),
        ('{"items":' * 400 + "{}" + "}" * 400, "recursion limit exceeded"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_named(schema: object, says: str) -> None:
    with pytest.raises(UsageError) as error:
        form(schema)
    assert error.value.message.startswith("--schema: ")
    assert says in error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) < 500


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RefusedError, match="needs the package llguidance"):
        form(OBJECT)


@pytest.mark.parametrize("kind", ["v1", "llama", "smol"])
def test_real_tokenizers(kind: str, request: pytest.FixtureRequest) -> None:
    """Sentencepiece's model, its tokenizer.json and a byte-level one: every answer's tokens decode to the JSON."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    table = TokenTable(tokenizer, tokenizer.vocab_size + 64)
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        constraint = JsonConstraint(form(OBJECT), table)
        ids: list[int] = []
        while not ids or ids[-1] not in tokenizer.eos_ids:
            likely = torch.rand(table.size, generator=generator).masked_fill(~constraint.allowed(), -1)
            ids.append(int(likely.argmax()))
            constraint.accept(ids[-1])
            assert len(ids) < 200
        text = tokenizer.decode(ids)
        jsonschema.validate(json.loads(text), json.loads(OBJECT))
        assert form(OBJECT).accepts(text)


@pytest.mark.parametrize("kind", ["v1", "llama", "smol"])
def test_the_models_own_tokens_are_allowed(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    constraint = JsonConstraint(form(OBJECT), TokenTable(tokenizer, tokenizer.vocab_size))
    for token in tokenizer.encode('{"name": "Bob", "n": 42}'):
        assert constraint.allowed()[token], tokenizer.token_bytes(token)
        constraint.accept(token)
