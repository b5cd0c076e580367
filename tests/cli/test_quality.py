"""mixlocal quality"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixlocal.app.quality.run import QualityRow
from mixlocal.cli.figures import DPI
from mixlocal.cli.quality_figure import HEIGHT, WIDTH, draw

SMALL = ("quality", "--ctx", "64")
FIELDS = [field.name for field in dataclasses.fields(QualityRow)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "harbour.txt"
    path.write_text("The keeper counted the boats, and one was missing; nobody had seen it leave.\n" * 3)
    return path


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table(run, text: Path) -> None:
    result = run(*SMALL, "tiny:bf16", "tiny:q4", "--against", "tiny:bf16", "--text", str(text))
    assert result.code == 0, result.err
    head, _, same, other = result.out.splitlines()
    names = cells(head)
    assert names[:5] == ["model", "size", "bits/weight", "of experts", "perplexity"]
    row = dict(zip(names, cells(same), strict=True))
    assert (row["model"], row["mean KL"], row["same top %"]) == ("tiny:bf16", "0.00000 ± 0.00000", "100.00 ± 0.00")
    row = dict(zip(names, cells(other), strict=True))
    assert row["model"] == "tiny:q4"
    value, sign, error = row["mean KL"].split()
    assert 0.001 < float(value) < 1
    assert (sign, float(error) > 0) == ("±", True)
    assert float(row["median KL"]) <= float(row["99 % KL"]) <= float(row["max KL"])
    assert "harbour.txt: 3 chunks of 64 tokens, 93 of them scored; the reference's logits take 0.1 MB" in result.err


def test_without_a_reference_it_is_perplexity_alone(run, text: Path) -> None:
    result = run(*SMALL, "tiny:q4", "--text", str(text), "--experts-per-token", "1,2")
    head, _, one, two = result.out.splitlines()
    assert cells(head) == ["model", "experts/token", "size", "bits/weight", "of experts", "perplexity"]
    assert [cells(line)[1] for line in (one, two)] == ["1", "2"]
    assert cells(one)[5] != cells(two)[5]
    assert "1 experts per token; the model was trained with 2" in result.err


def test_json_and_csv_hold_every_field(run, text: Path) -> None:
    asked = (*SMALL, "tiny:q4", "--against", "tiny:bf16", "--text", str(text))
    (row,) = json.loads(run(*asked, "--json").out)
    assert list(row) == FIELDS
    assert (row["against"], row["context"], row["chunks"], row["tokens"]) == ("tiny:bf16", 64, 3, 93)
    assert 0 < row["same_top"] < 1
    (line,) = csv.DictReader(run(*asked, "-o", "csv").out.splitlines())
    assert list(line) == FIELDS
    assert float(line["mean_kl"]) == row["mean_kl"]
    (alone,) = json.loads(run(*SMALL, "tiny:q4", "--text", str(text), "-o", "json").out)
    assert list(alone) == FIELDS
    assert alone["mean_kl"] is None
    assert alone["perplexity"] == row["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "MODEL"),
        (("tiny:q4", "--ctx", "512", "--text", "TEXT"), 2, "has 231 tokens for tiny:q4, and a chunk has --ctx 512"),
        (("tiny:q4", "--text", "TEXT", "--against", "tiny:q8"), 3, "tiny:q8 is not installed"),
        (("tiny:q4", "--text", "TEXT", "--experts-per-token", "2,x"), 2, "'2,x' is not a count of 1 or more"),
        (
            ("tiny:q4", "--ctx", "64", "--text", "TEXT", "--experts-per-token", "9"),
            2,
            "--experts-per-token 9 is outside 1 to 4",
        ),
        (("tiny:q4", "--text", "TEXT", "--json", "-o", "md"), 2, "contradict"),
        (("tiny:q4", "--text", "TEXT", "--plot", "x.jpg"), 2, "pictures are PNG files"),
        (("tiny:q4", "--text", "TEXT", "--logits", "x"), 2, "--logits needs --against"),
        (("tiny:q4", "--text", "/nowhere"), 3, "/nowhere"),
    ],
)
def test_refusals(run, text: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    result = run("quality", *(str(text) if word == "TEXT" else word for word in arguments))
    assert (result.code, result.out) == (code, "")
    assert words in result.err


def test_a_reference_from_another_text_is_refused(run, text: Path, tmp_path: Path) -> None:
    asked = (*SMALL, "tiny:q4", "--against", "tiny:bf16", "--logits", str(tmp_path / "mine"), "--text", str(text))
    assert run(*asked).code == 0
    text.write_text(text.read_text().replace("boats", "ships"))
    result = run(*asked)
    assert (result.code, result.out) == (4, "")
    assert "a reference from another text" in result.err


def row(variant: str, bits: float, kl: float | None, model: str = "smolmix", experts: int = 2) -> QualityRow:
    divergence = dict.fromkeys(FIELDS[FIELDS.index("mean_kl") : FIELDS.index("seconds")], kl)
    if kl is not None:
        divergence |= {"mean_kl_error": kl / 20}
    return QualityRow(
        model, variant, experts, int(bits * 86_000_000), bits, bits, "evaluation.txt", 512, 8, 2040,
        24 + (kl or 1 / bits), 1.5, "smolmix:bf16" if kl is not None else None, **divergence, seconds=1.0,
    )  # fmt: skip


ROWS = {
    "divergence": [row("bf16", 16, 0.0), row("q8", 8.7, 0.0026), row("q4", 5.2, 0.103), row("int4", 5.3, 0.06)],
    "perplexity": [row("bf16", 16, None), row("q4", 5.2, None)],
    "experts": [row("q4", 5.2, kl, experts=count) for count, kl in ((1, 0.9), (2, 0.1), (3, 0.15), (4, 0.3))],
    "near": [row(f"variant-{n}", 5.2 + n / 400, 0.1 + n / 9000) for n in range(7)],
    "one": [row("q4", 5.2, 0.1)],
}


@pytest.mark.parametrize("name", ROWS)
def test_the_figure_says_what_it_shows(name: str) -> None:
    rows = ROWS[name]
    figure = draw(rows)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert axes.get_xlabel() == "GB on disk"
    against = "" if name == "perplexity" else ", against smolmix:bf16"
    assert axes.get_title() == f"What bits cost: evaluation.txt, 2040 tokens scored{against}"
    assert axes.get_yscale() == ("linear" if name == "perplexity" else "log")
    assert axes.get_ylabel() == f"{'perplexity' if name == 'perplexity' else 'mean KL, nats a token'} (bars: 95 %)"
    labels = [label.get_text() for label in axes.texts]
    assert len(labels) == len(rows)
    if name == "divergence":
        assert sorted(labels) == ["bf16: 0", "int4", "q4", "q8"]
    if name == "experts":
        assert labels[0] == "q4, 1 expert"
    boxes = [label.get_window_extent() for label in axes.texts]
    for i, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1, "within the axes"
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_plot(run, text: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "quality.png"
    result = run(
        *SMALL, "tiny:bf16", "tiny:q4", "--against", "tiny:bf16", "--text", str(text), "--plot", str(path)
    )  # fmt: skip
    assert result.code == 0, result.err
    picture = imread(path)
    assert picture.shape[:2] == (HEIGHT * DPI, WIDTH * DPI)
    assert 0.01 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5, "neither blank nor black"


def test_an_interrupt_leaves_a_reference_to_go_on_with(home: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text("The keeper counted the boats.\n" * 3000)
    environment = os.environ | {"MIXLOCAL_HOME": str(home)}
    asked = [sys.executable, "-m", "mixlocal", *SMALL, "tiny:q4", "--against", "tiny:bf16", "--text", str(text)]
    stopped = subprocess.Popen(asked, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder, deadline = home / "cache" / "logits", time.monotonic() + 60
    large = 400_000  # bytes: several chunks
    while not any(file.stat().st_size > large for file in folder.glob("*.logits")) and stopped.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 130, errors
    again = subprocess.run([*asked, "--chunks", "1"], env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0, again.stderr
    assert "reference logits: " in again.stderr, "the first chunk is there"
