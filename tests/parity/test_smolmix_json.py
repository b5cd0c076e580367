"""The model that is always at hand, held to JSON schemas."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from mixlocal.app.budgets import RunOptions
from mixlocal.app.json_form import read_form
from mixlocal.app.session import Session
from mixlocal.app.structured import JsonConstraint, TokenTable
from mixlocal.engine.params import SamplingParams
from mixlocal.store.model_store import ModelStore

QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("Describe Bob, who is 42, in JSON.", {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}}),
    ("Name three colours.", {"colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3}}),
    ("Is water wet?", {"wet": {"type": "boolean"}, "why": {"type": "string", "maxLength": 80}}),
    ("When was 1 May 2020?", {"date": {"type": "string", "format": "date"}, "year": {"enum": [2019, 2020]}}),
]


@pytest.fixture(scope="module")
def session(smolmix_reference: ModelStore) -> Session:
    return Session(smolmix_reference, RunOptions())


@pytest.fixture(scope="module")
def table(session: Session) -> TokenTable:
    return TokenTable(session.tokenizer, session.config.vocab_size)


@pytest.mark.parametrize(("question", "properties"), QUESTIONS, ids=[question for question, _ in QUESTIONS])
def test_answers_in_json(question: str, properties: dict[str, Any], session: Session, table: TokenTable) -> None:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    constraint = JsonConstraint(read_form(json.dumps(schema).encode(), "it"), table)
    chunks = list(
        session.stream(question, SamplingParams(max_tokens=120, temperature=0.5, seed=3), constraint=constraint)
    )
    assert chunks[-1].finish == "stop"
    text = "".join(chunk.text for chunk in chunks)
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
