"""mixlocal experts, and /experts in a chat"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from matplotlib.image import imread
from rich.color import Color
from rich.text import Text
from stores import open_model, quantized

from mixlocal.app.expert_caches import CacheHits, cache_hits
from mixlocal.app.expert_reading import ExpertFigures
from mixlocal.app.expert_usage import RouterFigures, usage
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.cli.experts_colour import EIGHT, palette
from mixlocal.cli.experts_figure import HEIGHT, WIDTH, draw
from mixlocal.cli.experts_table import MOST_SIZES, bars, hit_table
from mixlocal.cli.figures import DPI, save
from mixlocal.model.kv_cache import own_cache
from mixlocal.store.model_store import ModelStore

WORDS = "Experts live in memory,\n\tnaïve 東京 ones on disk: \x1b[31m."


def routed(store: ModelStore, pieces: list[list[int]]) -> list[list[list[int]]]:
    """[L][T][K], from the model itself: what its normal trace holds of each piece."""
    layers: list[list[list[int]]] = []
    for ids in pieces:
        model, config = open_model(store)
        cache = own_cache(config, len(ids))
        for token in ids:
            model.forward(torch.tensor([token]), cache)
        rows = model.experts.trace.choices().tolist()
        layers = [before + row for before, row in zip(layers or [[] for _ in rows], rows, strict=True)]
    return layers


def words_ids(store: ModelStore, text: str = WORDS) -> list[int]:
    return load_tokenizer(store.folder).encode(text)


@pytest.fixture
def store(home: Path) -> ModelStore:
    return ModelStore.open(home / "models" / "tiny" / "q4")


def test_json_against_the_model_itself(run, store: ModelStore) -> None:
    """Pieces of 16 tokens: every figure counted once more, in plain loops."""
    ids = words_ids(store)
    pieces = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    layers = routed(store, pieces)
    result = run("experts", "tiny", "--prompt", WORDS, "--ctx", "16", "--json")
    assert (result.code, result.err) == (0, "loading the model\n")
    body = json.loads(result.out)
    assert (body["model"], body["variant"], body["text"]) == ("tiny", "q4", "--prompt")
    assert (body["tokens"], body["pieces"], body["ctx"]) == (len(ids), len(pieces), 16)
    assert (body["n_experts"], body["experts_per_token"], body["layers"]) == (4, 2, [0, 1])
    pairs = [(t, t + 1) for t in range(len(ids) - 1) if (t + 1) % 16]
    assert body["pairs"] == len(pairs) == len(ids) - len(pieces)
    for layer, rows in enumerate(layers):
        used = [sum(expert in row for row in rows) for expert in range(4)]
        assert body["token_share"][layer] == pytest.approx([count / len(ids) for count in used])
        assert body["load"][layer] == pytest.approx([count / 2 / len(ids) for count in used])
        assert body["most_used"][layer] == used.index(max(used))
        assert body["least_used"][layer] == used.index(min(used))
        same = sum(rows[a][0] == rows[b][0] for a, b in pairs)
        shared = sum(bool(set(rows[a]) & set(rows[b])) for a, b in pairs)
        assert body["first_same"][layer] == pytest.approx(same / len(pairs))
        assert body["shared"][layer] == pytest.approx(shared / len(pairs))
        assert 0 < body["router_entropy"][layer] <= 2
    assert body["random"] == {"first_same": 0.25, "shared": pytest.approx(1 - 1 / 6)}
    assert body["recall"][0] is None
    assert 0.3 < body["recall"][1] <= 1
    assert body["hits"]["slots"] == [1, 2, 3]
    expected = cache_hits(np.array(layers, dtype=np.int16), 4)
    assert body["hits"]["lru"] == pytest.approx(expected.lru)
    assert body["hits"]["aged"] == pytest.approx(expected.aged)


def test_a_token_in_front_of_a_text_is_not_of_the_text(run, tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "checkpoint")
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    store = quantized(checkpoint, tmp_path / "store")
    ids = words_ids(store)
    pieces = [[tiny.CONFIG["bos_token_id"], *ids[i : i + 15]] for i in range(0, len(ids), 15)]
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    body = json.loads(run("experts", str(store.folder), "--prompt", WORDS, "--ctx", "16", "--json").out)
    assert (body["tokens"], body["pieces"]) == (len(ids), len(pieces))
    for layer, rows in enumerate(routed(store, pieces)):
        of_text = [row for t, row in enumerate(rows) if t not in starts]
        used = [sum(expert in row for row in of_text) / len(ids) for expert in range(4)]
        assert body["token_share"][layer] == pytest.approx(used)


def test_the_table(run) -> None:
    result = run("experts", "tiny")
    body = json.loads(run("experts", "tiny", "--json").out)
    lines = result.out.splitlines()
    assert result.code == 0
    read = f"{body['tokens']} tokens in {body['pieces']} pieces of at most 512, 2 of 4 experts each"
    assert lines[0] == f"tiny:{body['variant']}, evaluation.txt: {read}"
    first = next(line for line in lines if re.match(r" +0 ", line))
    for name in ("first_same", "shared"):
        assert f"{100 * body[name][0]:.1f} %" in first
    assert bars(body["load"][0], max(map(max, body["load"]))) in first
    summary = next(line for line in lines if line.startswith("same first choice"))
    same = body["first_same"]
    shown = [f"{100 * share:.1f} %" for share in (min(same), sum(same) / 2, max(same), 0.25)]
    mixtral = ["13.6 to 14.9 %", "23.6 to 28.4 %", "19.7 to 26.3 %"]
    assert re.split(" {2,}", summary) == ["same first choice", *shown, *mixtral]
    held = next(line for line in lines if line.startswith("2 of 4"))
    assert [float(x) for x in re.findall(r"([\d.]+) %", held)] == [
        50.0, round(100 * body["hits"]["lru"][1], 1), round(100 * body["hits"]["aged"][1], 1)
    ]  # fmt: skip
    assert lines[-1].endswith("of the first 1024 tokens one by one, from an empty cache.")
    assert "\x1b" not in result.out


def test_some_layers(run) -> None:
    whole = json.loads(run("experts", "tiny", "--prompt", WORDS, "--json").out)
    one = json.loads(run("experts", "tiny", "--prompt", WORDS, "--layer", "1", "--json").out)
    assert one["layers"] == [1]
    for name in ("load", "first_same", "shared", "router_entropy", "load_entropy", "recall", "token_share"):
        assert one[name] == whole[name][1:]
    assert one["hits"] == whole["hits"]
    table = run("experts", "tiny", "--prompt", WORDS, "--layer", "1").out
    assert re.search(r"(?m)^ +1 ", table)
    assert not re.search(r"(?m)^ +0 ", table)
    assert json.loads(run("experts", "tiny", "--prompt", WORDS, "--layer", "1,0,1", "--json").out)["layers"] == [1, 0]


def test_other_experts_per_token_and_a_file(run, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text(WORDS)
    body = json.loads(
        run("experts", "tiny", "--text", str(tmp_path / "words.txt"), "--experts-per-token", "1", "--json").out
    )
    assert (body["text"], body["experts_per_token"]) == ("words.txt", 1)
    assert body["shared"] == body["first_same"]
    assert [sum(row) for row in body["token_share"]] == pytest.approx([1, 1])


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def backgrounds(line: str) -> list[tuple[str, str | None]]:
    """Each character of a coloured line with what is behind it."""
    text = Text.from_ansi(line)
    found: list[tuple[str, str | None]] = [(character, None) for character in text.plain]
    for span in text.spans:
        for at in range(span.start, span.end):
            assert not isinstance(span.style, str)
            background = span.style.bgcolor
            found[at] = found[at][0], background.name if background else None
    return found


@pytest.mark.usefixtures("colours")
def test_a_coloured_text(run, store: ModelStore) -> None:
    """Byte tokens: what is shown of a character is coloured by the token of its last byte."""
    ids = words_ids(store)
    layers = routed(store, [ids])
    result = run("--color", "always", "experts", "tiny:q4", "--prompt", WORDS, "--colour", "--layer", "0,1")
    assert result.code == 0
    shown = result.out.split("\n")
    assert len(shown) == 2 * 3 + 1
    for layer in (0, 1):
        legend, *lines = shown[3 * layer : 3 * layer + 3]
        meaning = {color: int(c) for c, color in backgrounds(legend) if color and c != " "}
        assert Text.from_ansi(legend).plain == f"layer {layer}, first expert:  0  1  2  3 "
        assert list(meaning.values()) == [0, 1, 2, 3]
        ends = np.cumsum([len(c.encode()) for c in WORDS]) - 1
        experts = dict(zip(ends.tolist(), WORDS, strict=True))
        looks = {"\x1b": "^[", "\t": " " * 8, "\n": ""}
        expected = [
            (c, layers[layer][end][0]) for end, character in experts.items() for c in looks.get(character, character)
        ]
        assert [(c, meaning[color]) for line in lines for c, color in backgrounds(line) if color] == expected


@pytest.mark.usefixtures("colours")
def test_the_middle_layer_is_shown_by_itself(run) -> None:
    result = run("--color", "always", "experts", "tiny", "--prompt", "some words", "--colour")
    assert result.out.startswith("layer 1, first expert: ")
    assert Text.from_ansi(result.out.splitlines()[1]).plain == "some words"


def test_colours_can_be_told_apart() -> None:
    for few in (False, True):
        assert len({style.bgcolor for style in palette(8, few=few)}) == 8
    assert len({style.bgcolor for style in palette(128)}) == 128
    assert [len(palette(n, few=few)) for n in (4, 40) for few in (True, False)] == [4, 4, 40, 40]
    for name, _ in EIGHT:  # black on them is easy to read: contrast of at least 7 (WCAG 2.2, level AAA)
        channels = [c / 255 for c in Color.parse(name).get_truecolor()]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert (luminance + 0.05) / 0.05 >= 7


def made_up(load: list[list[float]], top_k: int = 1) -> ExpertFigures:
    n_layers, n_experts = len(load), len(load[0])
    tokens = np.zeros((n_layers, 4, top_k), dtype=np.int16)
    found = replace(usage(tokens, n_experts), load=tuple(map(tuple, load)))
    slots = tuple(range(1, n_experts))
    hits = CacheHits(4, slots, tuple(s / 10 for s in slots), tuple(s / 9 for s in slots), tuple(s / 11 for s in slots))
    return ExpertFigures(found, RouterFigures((1.0,) * n_layers, (None, *(0.5,) * (n_layers - 1))), hits)


@pytest.mark.parametrize("shape", [(30, 8), (1, 2)])
def test_the_heat_map_shows_the_load(shape: tuple[int, int], tmp_path: Path) -> None:
    """In the file, the cell of each layer and expert is as bright as its load is high."""
    n_layers, n_experts = shape
    draw_loads = np.random.default_rng(1)
    load = draw_loads.dirichlet(np.ones(n_experts), size=n_layers)
    load[0] = np.eye(n_experts)[1]  # one expert has it all
    figure = draw(made_up(load.tolist()), "made up: $x_1 \u6771\x1b")
    save(figure, tmp_path / "load.png")
    pixels = imread(tmp_path / "load.png")
    assert pixels.shape[:2] == (round(HEIGHT * DPI), round(WIDTH * DPI))
    axes = figure.axes[0]
    assert axes.get_title().startswith("Load")

    def brightness(layer: int, expert: int) -> float:
        x, y = axes.transData.transform((expert, layer))
        red, green, blue = pixels[int(pixels.shape[0] - y), int(x), :3]
        return float(0.2126 * red + 0.7152 * green + 0.0722 * blue)

    found = np.array([[brightness(layer, expert) for expert in range(n_experts)] for layer in range(n_layers)])
    assert found[0].argmax() == 1
    order = np.argsort(load.ravel())
    assert (np.diff(found.ravel()[order]) > -0.02).all()  # the colour map is even to so much
    assert found.ravel()[order[-1]] - found.ravel()[order[0]] > 0.5


def test_every_panel_says_what_it_is(tmp_path: Path) -> None:
    figure = draw(made_up([[0.25] * 4] * 3), "made up")
    save(figure, tmp_path / "x.png")
    bar = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert "% of choices" in bar[0].get_xlabel()
    panels = [axes for axes in figure.axes if axes not in bar]
    assert len(panels) == 5
    assert all(axes.get_title() and axes.get_xlabel() and axes.get_ylabel() for axes in panels)
    height = figure.bbox.height
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for number, box in enumerate(boxes):  # nothing reaches out of the picture or into a neighbour
        assert box.y0 > -1
        assert box.y1 < height + 1
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    labels = {line.get_label(): line.get_ydata() for line in panels[1].lines}
    assert list(labels["same first choice"]) == [100.0] * 3
    assert list(panels[4].lines[1].get_ydata()) == pytest.approx([10, 20, 30])


def test_a_picture_and_the_table(run, tmp_path: Path) -> None:
    plain = run("experts", "tiny", "--prompt", WORDS)
    result = run("experts", "tiny", "--prompt", WORDS, "--plot", str(tmp_path / "out.PNG"))
    assert (result.code, result.out) == (0, plain.out)
    assert imread(BytesIO((tmp_path / "out.PNG").read_bytes()), format="png").shape[2] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out.PNG"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--prompt", ""), 2, "the text has 0 tokens"),
        (("--prompt", "a"), 2, "the text has 1 token;"),
        (("--text", "EMPTY"), 2, "the text has 0 tokens"),
        (("--text", "LATIN"), 2, "is not UTF-8: byte 2 is 0xef"),
        (("--text", "NOWHERE"), 3, "no such file"),
        (("--text", "LATIN", "--prompt", "x"), 2, "give one of them"),
        (("--layer", "2"), 2, "tiny:bf16 has layers 0 to 1"),
        (("--layer", "-1"), 2, "'-1' is not a layer's number"),
        (("--layer", "0,"), 2, "'0,' is not a layer's number"),
        (("--ctx", "1"), 2, "no room for two tokens"),
        (("--ctx", "513"), 2, "--ctx 513 is outside 1 to 512"),
        (("--experts-per-token", "5"), 2, "--experts-per-token 5 is outside 1 to 4"),
        (("--colour",), 2, "--color always"),
        (("--colour", "--json"), 2, "contradict"),
        (("--plot", "out.pdf"), 2, "pictures are PNG files"),
        (("--plot", "NOWHERE/out.png"), 3, "there is no folder"),
        (("--ram", "100M"), 7, "needs at least --ram"),
        (("--device", "cuda:9"), 2, "cuda"),
    ],
)
def test_bad_input(run, tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    places = {"EMPTY": tmp_path / "empty", "LATIN": tmp_path / "latin", "NOWHERE": tmp_path / "nowhere"}
    words = [re.sub("^(EMPTY|LATIN|NOWHERE)", lambda found: str(places[found[0]]), word) for word in arguments]
    result = run("experts", "tiny:bf16", *words)
    assert (result.code, result.out) == (code, "")
    assert says in result.err
    assert "Traceback" not in result.err


def test_no_such_model(run) -> None:
    result = run("experts", "nobody")
    assert (result.code, result.out) == (3, "")


def test_colours_that_are_not_wanted_are_told_before_the_work(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    result = run("--color", "always", "experts", "nobody", "--colour")
    assert (result.code, "NO_COLOR" in result.err) == (2, True)


def test_nothing_is_written(run, home: Path, tmp_path: Path) -> None:
    """A text that is looked into teaches no later run."""
    shutil.copytree(home / "models", tmp_path / "models")

    def everything() -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    before = everything()
    assert run("--home", str(tmp_path), "experts", "tiny", "--prompt", WORDS * 3).code == 0
    assert everything() == before


def test_in_a_chat(run, home: Path, tmp_path: Path) -> None:
    quantized(home / "checkpoint", tmp_path / "models" / "tiny" / "q4", template="mistral-v1")
    lines = b"/experts\nHello there\n/experts\n"
    result = run("--home", str(tmp_path), "-q", "chat", "-m", "tiny", "-T", "0", "-n", "6", stdin=lines)
    assert result.code == 0
    assert "nothing has been computed yet" in result.err
    told = re.findall(r"(?m)^layer  ([01])  ([ ▁-█]{7})   most: ([0-3]) \((\d+) %\)   same +(\d+) %   shared +(\d+) %$",
                      result.err)  # fmt: skip
    assert [row[0] for row in told] == ["0", "1"]
    for _, blocks, most, load, *shares in told:
        assert 25 <= int(load) <= 50
        assert len(blocks[::2]) == 4
        assert blocks[2 * int(most)] == max(blocks)
        assert all(0 <= int(share) <= 100 for share in shares)
    assert re.search(r"the last \d+ tokens, by layer: .* 0 to 3;\n.*random: 25 %\).*random: 83 %", result.err)


def test_bars() -> None:
    assert bars([0.0, 0.1, 0.4, 0.8], 0.8) == "  ▁ ▄ █"
    assert bars([0.5] * 20, 0.5) == "█" * 20


def test_many_experts_have_a_table_of_few_rows() -> None:
    rows = [len(hit_table(made_up([[1 / n] * n] * 2)).rows) for n in (2, 8, 17, 64, 128)]
    assert rows == [1, 7, MOST_SIZES, 15, 15]
