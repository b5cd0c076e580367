"""The built-in templates against mistral-common's v1 instruct tokenizer, and how a template is chosen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conversations import CONTENTS, CONVERSATIONS, SMOLLM2, assistant, system, user
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from vocabularies import ANY_TEXT

from mixlocal.app.template import ChatML, ChatTemplate, Message, MistralV1, PlainTemplate
from mixlocal.app.template_jinja import JinjaTemplate
from mixlocal.app.templates import TEMPLATES, describe_template, load_template
from mixlocal.app.tokenizer import Tokenizer
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.errors import CorruptError, RefusedError, UsageError


@pytest.fixture(scope="module")
def instruct() -> MistralTokenizer:
    return MistralTokenizer.v1()


def mistral_common_ids(instruct: MistralTokenizer, messages: Sequence[Message], prefill: str = "") -> list[int]:
    makers: dict[str, Any] = {"user": UserMessage, "assistant": AssistantMessage, "system": SystemMessage}
    turns = [makers[message.role](content=message.content) for message in messages]
    turns += [AssistantMessage(content=prefill, prefix=True)] if prefill else []
    tokens: list[int] = instruct.encode_chat_completion(ChatCompletionRequest(messages=turns)).tokens
    return tokens


def test_mistral_v1_equals_mistral_common(v1: Tokenizer, instruct: MistralTokenizer) -> None:
    """mistral-common takes no empty system or assistant text; those conversations have a test of their own."""
    compared = [c for c in CONVERSATIONS if all(m.content or m.role == "user" for m in c)]
    assert len(compared) >= 120
    for messages in compared:
        assert MistralV1().encode(messages, v1) == mistral_common_ids(instruct, messages)


@given(
    contents=st.lists(ANY_TEXT.filter(bool), min_size=1, max_size=9).filter(lambda c: len(c) % 2 == 1), head=ANY_TEXT
)
@settings(max_examples=200, deadline=None)
def test_mistral_v1_equals_mistral_common_on_any_text(
    v1: Tokenizer, instruct: MistralTokenizer, contents: list[str], head: str
) -> None:
    messages = [system(head)] if head else []
    messages += [(user if n % 2 == 0 else assistant)(content) for n, content in enumerate(contents)]
    assert MistralV1().encode(messages, v1) == mistral_common_ids(instruct, messages)


@pytest.mark.parametrize("prefill", [c for c in CONTENTS if c])
def test_mistral_v1_prefill_equals_mistral_common(v1: Tokenizer, instruct: MistralTokenizer, prefill: str) -> None:
    for messages in ([user("Hi")], [system("Be brief."), user("Hi"), assistant("Yes?"), user("Go on")]):
        assert MistralV1().encode(messages, v1, prefill=prefill) == mistral_common_ids(instruct, messages, prefill)


def test_mistral_v1_spells_the_format(v1: Tokenizer) -> None:
    ids = MistralV1().encode([system("S"), user("A"), assistant("B"), user("C")], v1)
    assert ids == [1, *v1.encode("[INST] S\n\nA [/INST]"), *v1.encode("B"), 2, *v1.encode("[INST] C [/INST]")]
    assert ids.count(1) == 1


def test_mistral_v1_takes_an_empty_answer_and_empty_system_text(v1: Tokenizer) -> None:
    inst = v1.encode("[INST] A [/INST]")
    assert MistralV1().encode([system(""), user("A"), assistant(""), user("A")], v1) == [1, *inst, 2, *inst]


def test_mistral_v1_joins_system_messages_as_mistral_common(v1: Tokenizer, instruct: MistralTokenizer) -> None:
    messages = [system("one"), system("two"), user("A")]
    assert MistralV1().encode(messages, v1) == mistral_common_ids(instruct, messages)


def test_mistral_v1_needs_bos_and_eos(smol_folder: Path, tmp_path: Path) -> None:
    shutil.copy(smol_folder / "tokenizer.json", tmp_path)
    with pytest.raises(RefusedError, match="BOS and EOS"):
        MistralV1().encode([user("A")], load_tokenizer(tmp_path))


BAD_ORDERS: dict[str, list[Message]] = {
    "nothing": [],
    "system only": [system("S")],
    "assistant first": [assistant("A"), user("B")],
    "assistant after system": [system("S"), assistant("A"), user("B")],
    "late system": [user("A"), system("S"), user("B")],
    "nothing to answer": [user("A"), assistant("B")],
}


@pytest.mark.parametrize("name", BAD_ORDERS)
def test_roles_out_of_order_are_a_usage_error(v1: Tokenizer, smol: Tokenizer, name: str) -> None:
    pairs: list[tuple[ChatTemplate, Tokenizer]] = [(MistralV1(), v1), (ChatML(), smol), (JinjaTemplate(SMOLLM2), smol)]
    for template, tokenizer in pairs:
        with pytest.raises(UsageError) as caught:
            template.encode(BAD_ORDERS[name], tokenizer)
        assert "\n" not in caught.value.message


def test_mistral_v1_takes_turns(v1: Tokenizer) -> None:
    with pytest.raises(UsageError, match="two user messages in a row"):
        MistralV1().encode([user("A"), user("B")], v1)
    with pytest.raises(UsageError, match="two assistant messages in a row"):
        MistralV1().encode([user("A"), assistant("B"), assistant("C"), user("D")], v1)


def test_a_finished_conversation_can_be_encoded(v1: Tokenizer, smol: Tokenizer) -> None:
    done = [user("A"), assistant("B")]
    assert MistralV1().encode(done, v1, add_generation_prompt=False)[-1] == 2
    ids = ChatML().encode(done, smol, add_generation_prompt=False)
    assert smol.decode(ids).endswith("assistant\nB\n")
    with pytest.raises(UsageError, match="prefill"):
        MistralV1().encode([user("A")], v1, add_generation_prompt=False, prefill="x")


def test_chatml_needs_its_tokens(v1: Tokenizer) -> None:
    with pytest.raises(RefusedError, match=r"<\|im_start\|>"):
        ChatML().encode([user("A")], v1)


def test_plain_is_the_text_after_bos(v1: Tokenizer, smol: Tokenizer) -> None:
    assert PlainTemplate().encode([user("Once upon")], v1) == [1, *v1.encode("Once upon")]
    assert PlainTemplate().encode([user("Once")], smol, prefill=" upon") == smol.encode("Once upon")
    assert 1 not in PlainTemplate().encode([user("<s>")], v1)[1:]
    for messages in ([], [assistant("A")], [system("S"), user("A")], [user("A"), assistant("B"), user("C")]):
        with pytest.raises(UsageError, match="no chat format"):
            PlainTemplate().encode(messages, v1)


def test_the_names_of_the_catalogue() -> None:
    assert set(TEMPLATES) == {"mistral-v1", "chatml", "plain"}


def test_a_name_wins_over_the_folder(smol_folder: Path) -> None:
    assert load_template(smol_folder, "plain") is TEMPLATES["plain"]
    with pytest.raises(UsageError, match="no template called 'llama'") as caught:
        load_template(smol_folder, "llama")
    assert "mistral-v1, chatml, plain" in caught.value.hint


def test_the_folders_own_template(tmp_path: Path, smol: Tokenizer) -> None:
    messages = [user("Hi")]
    config_file = tmp_path / "tokenizer_config.json"
    assert isinstance(load_template(tmp_path, None), PlainTemplate)
    config_file.write_text(json.dumps({"chat_template": SMOLLM2}))
    assert load_template(tmp_path, None).encode(messages, smol) == ChatML().encode(messages, smol)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "list"}]
    config = {"chat_template": named, "bos_token": {"content": "<|im_start|>"}, "eos_token": None}
    config_file.write_text(json.dumps(config))
    assert load_template(tmp_path, None).encode(messages, smol) == smol.encode("list")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file", encoding="utf-8")
    assert load_template(tmp_path, None).encode(messages, smol) == [1, *smol.encode("file")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_built_in_is_described_in_one_line(tmp_path: Path, name: str) -> None:
    description = describe_template(tmp_path, name)
    assert description.startswith(f"{name}: ")
    assert len(description.splitlines()) == 1


def test_a_folders_template_is_described_by_its_source(tmp_path: Path) -> None:
    assert describe_template(tmp_path, None) == "none: the model continues plain text"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": SMOLLM2}))
    assert describe_template(tmp_path, None) == SMOLLM2
    (tmp_path / "chat_template.jinja").write_text("{{ broken", encoding="utf-8")
    assert describe_template(tmp_path, None) == "{{ broken"
    with pytest.raises(UsageError, match="no template called 'llama'"):
        describe_template(tmp_path, "llama")


def test_only_a_jinja_template_loads_jinja(tmp_path: Path) -> None:
    """jinja2 would slow the start of every prompt."""
    code = (
        "import sys; from pathlib import Path; from mixlocal.app.templates import load_template;"
        f"load_template(Path({str(tmp_path)!r}), 'chatml'); load_template(Path({str(tmp_path)!r}), None);"
        "sys.exit('jinja2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": "x"}]}'),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}'),
        ("tokenizer_config.json", b'{"chat_template": "{{"}'),
        ("tokenizer_config.json", b'{"chat_template": "' + b"a" * 70_000 + b'"}'),
        ("tokenizer_config.json", b"\xff\xfe"),
        ("chat_template.jinja", b"\xff\xfe"),
        ("chat_template.jinja", b"{% for %}"),
        ("chat_template.jinja", b"a" * 70_000),
    ],
)
def test_a_bad_template_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((RefusedError, CorruptError)) as caught:
        load_template(tmp_path, None)
    assert name in caught.value.message
