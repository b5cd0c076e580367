"""Where the system text goes, and what is said of it."""

from __future__ import annotations

import pytest
from conversations import CONVERSATIONS, MIXTRAL, SMOLLM2, assistant, system, user

from mixlocal.app.template import SYSTEM_NOTE, ChatML, MistralV1, PlainTemplate
from mixlocal.app.template_jinja import JinjaTemplate
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.errors import RefusedError, UsageError

GEMMA = (  # says no to a system message
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
)
DEAF = (  # leaves it out
    "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}"
)
LAST = (  # puts it before the last message
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}{% else %}"
    "{{ m.role + ':' + (ns.system if loop.last else '') + m.content + '\n' }}{% endif %}{% endfor %}"
)
TALK = [user("A"), assistant("B"), user("C")]


@pytest.mark.parametrize("source", [GEMMA, DEAF], ids=["refuses", "drops"])
def test_a_system_text_without_a_role_goes_before_the_first_user_text(smol: Tokenizer, source: str) -> None:
    template = JinjaTemplate(source)
    for turns in (TALK[:1], TALK):
        merged = [user(f"Be brief.\n\n{turns[0].content}"), *turns[1:]]
        assert template.encode([system("Be brief."), *turns], smol) == template.encode(merged, smol)
        assert template.system_note([system("Be brief."), *turns]) == SYSTEM_NOTE
        assert template.system_note(turns) is None
    two = [system("Be brief."), system("Be kind."), user("A")]
    assert smol.decode(template.encode(two, smol)) == "user:Be brief.\n\nBe kind.\n\nA\n"


@pytest.mark.parametrize("source", [GEMMA, DEAF], ids=["refuses", "drops"])
@pytest.mark.parametrize("content", ["<|im_end|>", "user:", "x" * 300, " {{ 7 }} "])
def test_a_merged_system_text_is_not_trusted(smol: Tokenizer, source: str, content: str) -> None:
    ids = JinjaTemplate(source).encode([system(content), user("A")], smol)
    assert all(smol.is_text(n) for n in ids)
    assert smol.decode(ids) == f"user:{content}\n\nA\n"


@pytest.mark.parametrize("source", [SMOLLM2, LAST], ids=["role", "last"])
def test_a_template_that_shows_the_system_text_keeps_it(smol: Tokenizer, source: str) -> None:
    template = JinjaTemplate(source)
    messages = [system("Be brief."), *TALK]
    assert template.system_note(messages) is None
    assert smol.decode(template.encode(messages, smol)).count("Be brief.") == 1


def test_mixtrals_own_template_merges_as_mistral_v1_does(v1: Tokenizer) -> None:
    """Its template knows no system role; ours writes the same, and says the same."""
    own = JinjaTemplate(MIXTRAL, bos_token="<s>", eos_token="</s>")
    messages = [system("Be brief."), user("A")]
    assert own.encode(messages, v1) == MistralV1().encode(messages, v1)
    assert own.system_note(messages) == MistralV1().system_note(messages) == SYSTEM_NOTE


def test_what_the_built_ins_say(v1: Tokenizer) -> None:
    messages = [system("Be brief."), *TALK]
    assert MistralV1().system_note(messages) == SYSTEM_NOTE
    assert MistralV1().system_note(TALK) is MistralV1().system_note([system(""), *TALK]) is None
    assert all(ChatML().system_note(c) is None for c in (messages, TALK))
    assert PlainTemplate().system_note([user("A")]) is None
    with pytest.raises(UsageError, match="no chat format"):
        PlainTemplate().encode(messages, v1)


def test_a_note_is_for_a_finished_conversation_too() -> None:
    assert JinjaTemplate(DEAF).system_note([system("Be brief."), *TALK[:2]]) == SYSTEM_NOTE


def test_an_empty_system_text_needs_no_place(smol: Tokenizer) -> None:
    for source in (GEMMA, DEAF):
        template = JinjaTemplate(source)
        assert template.encode([system(""), *TALK], smol) == template.encode(TALK, smol)
        assert template.system_note([system(""), *TALK]) is None


def test_a_template_that_changes_the_system_text_is_refused(smol: Tokenizer) -> None:
    shouts = "{% for m in messages %}{{ m.content | upper if m.role == 'system' else m.content }}{% endfor %}"
    with pytest.raises(RefusedError, match="changes what a message says"):
        JinjaTemplate(shouts).encode([system("Be brief."), user("A")], smol)


def test_a_refusal_for_another_reason_is_said(smol: Tokenizer) -> None:
    picky = JinjaTemplate("{{ raise_exception('never on a Monday') }}", origin="f.jinja")
    for messages in ([user("A")], [system("S"), user("A")]):
        with pytest.raises(UsageError, match=r"f\.jinja does not take this conversation: never on a Monday"):
            picky.encode(messages, smol)


def test_every_conversation_shows_its_system_text_once(smol: Tokenizer) -> None:
    templates = [JinjaTemplate(source) for source in (GEMMA, DEAF)]
    for messages in CONVERSATIONS:
        if messages[0].role != "system" or len(messages[0].content.strip()) < 4:
            continue
        for template in templates:
            assert messages[0].content in smol.decode(template.encode(messages, smol))
