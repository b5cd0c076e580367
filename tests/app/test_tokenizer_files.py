"""Tokenizer files that are missing, wrong, cut or damaged: a tokenizer that works, or an error that names the file."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vocabularies import V1_MODEL, byte_level_document

from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.errors import CorruptError, MixlocalError, NotFoundError, RefusedError


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(NotFoundError):
        load_tokenizer(tmp_path / "nowhere")


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CorruptError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("generation_config.json", '{"eos_token_id": 99999}', "99999"),
        ("generation_config.json", '{"eos_token_id": -1}', "-1"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id"),
        ("config.json", '{"eos_token_id": "2"}', "eos_token_id"),
        ("config.json", '{"eos_token_id": [2, null]}', "eos_token_id"),
        ("tokenizer_config.json", '{"eos_token": "<nope>"}', "<nope>"),
        ("tokenizer_config.json", '{"bos_token": 1}', "bos_token"),
        ("tokenizer_config.json", "[]", "object"),
        ("tokenizer_config.json", '{"a"', "not JSON"),
        ("tokenizer_config.json", '{"x": ' + "[" * 200_000, "nested"),
    ],
)
@pytest.mark.parametrize("kind", ["v1_folder", "smol_folder"])
def test_a_bad_configuration_is_named(
    tmp_path: Path, request: pytest.FixtureRequest, kind: str, name: str, content: str, words: str
) -> None:
    folder: Path = request.getfixturevalue(kind)
    for file in ("tokenizer.json", "tokenizer.model"):
        if (folder / file).exists():
            shutil.copy(folder / file, tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises((RefusedError, CorruptError)) as caught:
        load_tokenizer(tmp_path)
    assert name in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize(
    "added", [{"1": {"content": "<S>"}}, {"-1": {"content": "x"}}, {"4000000000": {"content": "x"}}]
)
def test_added_tokens_that_contradict_the_model_are_refused(
    tmp_path: Path, v1_folder: Path, added: dict[str, object]
) -> None:
    shutil.copy(v1_folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(RefusedError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def edited(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = byte_level_document(300)
    change(document)
    return json.dumps(document).encode()


WRONG_DOCUMENTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda d: d.pop("model"),
    "model is a list": lambda d: d.update(model=[]),
    "model is null": lambda d: d.update(model=None),
    "unknown model": lambda d: d["model"].update(type="Oracle"),
    "vocab is a string": lambda d: d["model"].update(vocab="abc"),
    "vocab id is text": lambda d: d["model"]["vocab"].update({"!": "3"}),
    "vocab id is a float": lambda d: d["model"]["vocab"].update({"!": 3.5}),
    "vocab id is negative": lambda d: d["model"]["vocab"].update({"!": -3}),
    "vocab id is huge": lambda d: d["model"]["vocab"].update({"!": 4294967295}),
    "vocab id is enormous": lambda d: d["model"]["vocab"].update({"!": 10**30}),
    "merge of unknown tokens": lambda d: d["model"]["merges"].append(["qqq", "zzz"]),
    "merge is one word": lambda d: d["model"]["merges"].append("abc"),
    "merges is a number": lambda d: d["model"].update(merges=7),
    "added id is huge": lambda d: d["added_tokens"][0].update(id=2**31),
    "added id is another's": lambda d: d["added_tokens"][0].update(id=77),
    "added id is text": lambda d: d["added_tokens"][0].update(id="0"),
    "added content is a number": lambda d: d["added_tokens"][0].update(content=5),
    "added_tokens is an object": lambda d: d.update(added_tokens={}),
    "no decoder": lambda d: d.update(decoder=None),
    "unknown decoder": lambda d: d.update(decoder={"type": "CTC"}),
    "decoders in another order": lambda d: d.update(
        decoder={"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]}
    ),
    "bad regex": lambda d: d.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated",
    "invert": False}),
    "unknown normalizer": lambda d: d.update(normalizer={"type": "Magic"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_DOCUMENTS)
def test_a_wrong_tokenizer_json_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(edited(WRONG_DOCUMENTS[name]))
    with pytest.raises((RefusedError, CorruptError), match=r"tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert len(caught.value.message.splitlines()) == 1


def test_a_panic_of_the_library_is_a_refusal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A merge shorter than the subword prefix makes the library panic: a BaseException of no importable class."""
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"], "continuing_subword_prefix": "##"}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model, "decoder": decoder}))
    with pytest.raises(RefusedError, match=r"tokenizer\.json is not a usable tokenizer"):
        load_tokenizer(tmp_path)
    assert "panicked" in capfd.readouterr().err


def works_or_refuses(folder: Path) -> bool:
    """True if the folder's tokenizer can be used, False if it is refused; any other exception is a failure."""
    try:
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode("hello wörld 😀 <s> 12", special=True) + tokenizer.encode("<|im_end|>\0")
        tokenizer.decode(ids)
        for token_id in range(min(tokenizer.vocab_size, 400)):
            tokenizer.token_bytes(token_id)
    except MixlocalError:
        return False
    return True


def cut_points(length: int, count: int) -> Iterator[int]:
    return iter(sorted({*range(16), *(length * n // count for n in range(count)), length - 1}))


def test_a_truncated_tokenizer_json_is_corrupt(tmp_path: Path) -> None:
    whole = json.dumps(byte_level_document(300)).encode()
    for cut in cut_points(len(whole), 150):
        (tmp_path / "tokenizer.json").write_bytes(whole[:cut])
        with pytest.raises(CorruptError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)


def test_a_truncated_tokenizer_model_never_escapes(tmp_path: Path) -> None:
    """A cut between two pieces is a valid, shorter model; only the manifest's checksum can tell."""
    whole = V1_MODEL.read_bytes()
    for cut in [*range(64), *cut_points(len(whole), 60)]:
        (tmp_path / "tokenizer.model").write_bytes(whole[:cut])
        works_or_refuses(tmp_path)
    for cut in (0, 1, 5):
        (tmp_path / "tokenizer.model").write_bytes(whole[:cut])
        assert not works_or_refuses(tmp_path)


def mutated(data: bytes, rng: random.Random) -> bytes:
    copy = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 30])):
        at = rng.randrange(len(copy))
        copy[at : at + rng.choice([0, 1, 1, 1, 4])] = rng.choice(
            [rng.randbytes(1), rng.randbytes(3), b'"', b"0", b"9" * 9]
        )
    return bytes(copy)


WRONG_VALUES: list[Any] = [None, True, -1, 2**32, 2**70, 0.5, "", "x", [], {}, [[]], {"type": "Fuse"}, {"a": 4000}]


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON document, but only a few of its vocabulary and merges."""
    keys: list[Any] = []
    if isinstance(node, dict):
        keys = list(node)[: 6 if len(node) > 30 else None]
    elif isinstance(node, list):
        keys = list(range(min(len(node), 4)))
    return [(node, key) for key in keys] + [place for key in keys for place in places(node[key])]


def test_wrong_values_anywhere_never_escape(tmp_path: Path) -> None:
    """Each of the document's places in turn holds each wrong value."""
    original = json.dumps(byte_level_document(300))
    used = 0
    for number in range(len(places(json.loads(original)))):
        for value in WRONG_VALUES:
            document = json.loads(original)
            container, key = places(document)[number]
            container[key] = value
            (tmp_path / "tokenizer.json").write_text(json.dumps(document))
            used += works_or_refuses(tmp_path)
    assert used > 0


MUTATE = """
import sys, random
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import test_tokenizer_files as t
folder, name, count = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
whole = (folder / name).read_bytes()
rng = random.Random(7)
used = 0
for n in range(count):
    random_bytes = rng.randbytes(rng.randrange(200))
    (folder / name).write_bytes(random_bytes if n % 8 == 0 else t.mutated(whole, rng))
    used += t.works_or_refuses(folder)
print("done", used)
"""


@pytest.mark.parametrize(("name", "count"), [("tokenizer.json", 300), ("tokenizer.model", 60)])
def test_mutated_files_never_escape(tmp_path: Path, name: str, count: int) -> None:
    """In a process of its own: a signal would be a failure too."""
    whole = json.dumps(byte_level_document(300)).encode() if name == "tokenizer.json" else V1_MODEL.read_bytes()
    (tmp_path / name).write_bytes(whole)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", MUTATE, here, str(tmp_path), name, str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.startswith("done")
