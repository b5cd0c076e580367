"""An answer keeps the tokens it was generated as: a prompt and its answer's ids begin the next prompt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conversations import ALPACA, CONVERSATIONS, MIXTRAL, SMOLLM2, THINKING, assistant, system, user
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import ANY_TEXT, SPECIALS

from mixlocal.app.template import ChatML, ChatTemplate, Message, MistralV1
from mixlocal.app.template_jinja import JinjaTemplate
from mixlocal.app.tokenizer import Tokenizer

Pairs = dict[str, tuple[ChatTemplate, Tokenizer]]


@pytest.fixture(scope="module")
def pairs(v1: Tokenizer, smol: Tokenizer, llama: Tokenizer) -> Iterator[Pairs]:
    own = {"bos_token": "<s>", "eos_token": "</s>"}
    smollm2, mixtral, alpaca = JinjaTemplate(SMOLLM2), JinjaTemplate(MIXTRAL, **own), JinjaTemplate(ALPACA, **own)
    yield {
        "mistral-v1": (MistralV1(), v1),
        "mistral-v1 on tokenizer.json": (MistralV1(), llama),
        "chatml": (ChatML(), smol),
        "smollm2": (smollm2, smol),
        "mixtral": (mixtral, v1),
        "alpaca, byte level": (alpaca, smol),
        "alpaca, sentencepiece": (alpaca, v1),
        "alpaca, tokenizer.json": (alpaca, llama),
    }
    for template in (smollm2, mixtral, alpaca):
        template.close()


NAMES = [
    "mistral-v1", "mistral-v1 on tokenizer.json", "chatml", "smollm2", "mixtral", "alpaca, byte level",
    "alpaca, sentencepiece", "alpaca, tokenizer.json",
]  # fmt: skip


def check_prefixes(pair: tuple[ChatTemplate, Tokenizer], head: str, turns: list[tuple[str, str, list[int]]]) -> None:
    """turns: (question, answer, the ids it was generated as)."""
    template, tokenizer = pair
    messages = [system(head)] if head else []
    so_far: list[int] = []
    for question, answer, ids in [*turns, ("And now?", "", [])]:
        messages.append(user(question))
        prompt = template.encode(messages, tokenizer)
        assert prompt[: len(so_far)] == so_far
        so_far = prompt + ids
        messages.append(Message("assistant", answer, tuple(ids)))


def text_ids(tokenizer: Tokenizer) -> list[int]:
    return [n for n in range(min(tokenizer.vocab_size, 900)) if tokenizer.is_text(n)]


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_prompt_and_any_answer_begin_the_next_prompt(pairs: Pairs, name: str, data: st.DataObject) -> None:
    """A model writes what ids it likes, and their text is what the tokenizer makes of them."""
    _, tokenizer = pairs[name]
    answers = st.lists(st.sampled_from(text_ids(tokenizer)), max_size=8)
    drawn = data.draw(st.lists(st.tuples(ANY_TEXT, answers), min_size=1, max_size=4))
    turns = [(question, tokenizer.decode(ids, continuation=True), ids) for question, ids in drawn]
    check_prefixes(pairs[name], data.draw(ANY_TEXT), turns)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", ["", "Be brief."])
def test_every_content_one_token_a_byte(pairs: Pairs, name: str, head: str) -> None:
    """The tokenization that is least like the tokenizer's own."""
    _, tokenizer = pairs[name]
    spelled = {c: [n for char in c for n in tokenizer.encode(char)] for m in CONVERSATIONS[:40] for c in [m[0].content]}
    assert any(tokenizer.encode(content) != ids for content, ids in spelled.items())
    turns = [(content, content, ids) for content, ids in spelled.items()]
    check_prefixes(pairs[name], head, turns)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", ["", " ", "\n", "\n\n "])
def test_an_answer_without_words_keeps_its_ids(pairs: Pairs, name: str, answer: str) -> None:
    ids = pairs[name][1].encode("x y\n")
    check_prefixes(pairs[name], "", [("A", answer, ids), ("B", "b", ids), ("C", answer, ids)])


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_taken_as_they_are(pairs: Pairs, name: str) -> None:
    """Whether they agree with the text or not, one beyond the vocabulary too, and each answer its own."""
    template, tokenizer = pairs[name]
    far = tokenizer.vocab_size + 7
    ids = template.encode([user("A"), Message("assistant", "B", (far, 5)), user("A")], tokenizer)
    at = ids.index(far)
    assert ids[:at] == template.encode([user("A")], tokenizer)
    assert ids[at + 1] == 5
    twice = [user("A"), Message("assistant", "B", (far,)), user("A"), Message("assistant", "B", (far + 1,)), user("A")]
    ids = template.encode(twice, tokenizer)
    assert ids.index(far) < ids.index(far + 1)
    assert ids.count(far) == ids.count(far + 1) == 1


@pytest.mark.parametrize("name", NAMES)
def test_answers_without_ids_are_encoded_as_before(pairs: Pairs, name: str) -> None:
    """Ids may be known of some answers only: of those before a model was changed they are not."""
    template, tokenizer = pairs[name]
    ids = tuple(tokenizer.encode("odd") + tokenizer.encode("ly"))
    messages = [user("A"), assistant("plain"), user("B"), Message("assistant", "oddly", ids), user("C")]
    before = template.encode(messages[:3], tokenizer)
    assert before == template.encode([user("A"), Message("assistant", "plain"), user("B")], tokenizer)
    assert template.encode(messages, tokenizer)[: len(before) + len(ids)] == [*before, *ids]


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizers_own_ids_change_nothing(pairs: Pairs, name: str) -> None:
    """What comes after an answer has the ids that it has without: no tokenizer adds a space of its own to it."""
    template, tokenizer = pairs[name]
    conversation = [user("Hi"), assistant("Hello there."), user("What is 2+2?"), assistant("It is 4"), user("Why")]
    plain = template.encode(conversation, tokenizer)
    known = list(conversation)
    for n in (1, 3):
        before = template.encode(conversation[:n], tokenizer)
        ids = template.encode(conversation[:n], tokenizer, prefill=conversation[n].content)[len(before) :]
        known[n] = Message("assistant", conversation[n].content, tuple(ids))
    assert template.encode(known, tokenizer) == plain


def test_control_tokens_are_read_in_trusted_text_only(smol: Tokenizer, pairs: Pairs) -> None:
    """Spliced ids do not open the way for those written around them."""
    spelled = tuple(smol.encode("<|im_end|>"))
    for name in ("chatml", "smollm2"):
        template, _ = pairs[name]
        plain = template.encode([user("A"), assistant("B"), user("C")], smol)
        messages = [user("<|im_start|>"), Message("assistant", "<|im_end|>", spelled), user("<|im_end|>")]
        ids = template.encode(messages, smol)
        assert [n for n in ids if not smol.is_text(n)] == [n for n in plain if not smol.is_text(n)]
        assert all(special in smol.decode(ids) for special in SPECIALS[1:])


def test_a_content_that_is_cut_or_stripped_is_encoded_anew(smol: Tokenizer) -> None:
    template = JinjaTemplate(THINKING)
    odd = tuple(n for char in "hm</think>\nB" for n in smol.encode(char))

    def encode(answer: Message) -> list[int]:
        return template.encode([user("A"), answer, user("C")], smol)

    for content in ("hm</think>\nB", "\nB", "\n\nB"):
        assert encode(Message("assistant", content, odd)) == encode(assistant("B"))
    kept = encode(Message("assistant", "B", odd))
    assert any(kept[n : n + len(odd)] == list(odd) for n in range(len(kept)))


def test_a_prefill_follows_spliced_answers(smol: Tokenizer) -> None:
    messages = [user("A"), Message("assistant", "ab", tuple(smol.encode("a") + smol.encode("b"))), user("C")]
    prompt = ChatML().encode(messages, smol)
    assert ChatML().encode(messages, smol, prefill="Well") == prompt + smol.encode("Well")
