"""mixlocal bench"""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from mixlocal.app import bench, bench_cases, bench_kernels, bench_weights, measure
from mixlocal.app.bench_compare import CompareRow
from mixlocal.cli import compare_figure
from mixlocal.cli.figures import DPI
from mixlocal.kernels.isa import native_isas
from mixlocal.model.transformer import Transformer
from mixlocal.quant.format import KINDS

SMALL = ("bench", "-m", "tiny", "-p", "6", "-n", "3", "-r", "2")
COLUMNS = [
    "model",
    "size",
    "params",
    "backend",
    "threads",
    "test",
    "t/s",
    "bytes/token",
    "of bandwidth",
    "experts in RAM",
    "RAM hits",
    "disk/token",
    "stall/token",
]
FIELDS = [
    "model", "variant", "run", "model_size", "model_n_params", "backend", "n_threads", "test", "n_prompt", "n_gen",
    "n_depth",
    "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts", "ram_budget", "ram_slots",
    "n_records", "gpu_hits", "ram_hits", "disk_hits", "bytes_read", "stall_s", "prefetch_recall", "bytes_per_token",
    "read_bandwidth", "bandwidth_share",
]  # fmt: skip


BOTH = ("bench", "--compare", "tiny:bf16,tiny:q4", "-p", "6", "-n", "3", "-r", "2", "--device", "cpu")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "lamps.txt"
    path.write_text("The keeper counted the lamps, and one was missing; nobody had seen it leave.\n" * 3)
    return path


@pytest.fixture(autouse=True)
def _little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(bench_kernels, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(bench_kernels, "NEEDED_BYTES", 1)
    monkeypatch.setattr(bench_cases, "SHAPES", ((128, 64),))
    monkeypatch.setattr(bench_cases, "SMALL_SHAPE", (128, 64))
    monkeypatch.setattr(bench_cases, "MOE_HIDDEN", 128)
    monkeypatch.setattr(bench_cases, "MOE_DIM", 64)
    monkeypatch.setattr(bench_cases, "SAMPLE_BYTES", 1 << 14)
    monkeypatch.setattr(bench_weights, "ROTATION_BYTES", 1 << 16)


def cells(table: str) -> list[list[str]]:
    assert len({len(line) for line in table.splitlines()}) == 1, table
    return loose_cells(table)


def loose_cells(table: str) -> list[list[str]]:
    """Of a table that shows the perplexity of random weights, which is wider than any other."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_is_llama_bench_s(run) -> None:
    result = run(*SMALL, "-d", "0,16", "--threads", "1,2")
    assert result.code == 0, result.err
    head, rule, *rows = cells(result.out)
    assert head == COLUMNS
    assert all(set(cell) <= {"-", ":"} for cell in rule)
    tests = ["pp6", "tg3"] * 2 + ["pp6 @ d16", "tg3 @ d16"] * 2
    assert [row[5] for row in rows] == tests
    assert [row[4] for row in rows] == ["1", "1", "2", "2"] * 2
    assert {tuple(row[:1]) for row in rows} == {("tiny:q4",)}
    for row in rows:
        average, sign, spread = row[6].split()
        assert (float(average) > 0, sign, float(spread) >= 0) == (True, "±", True)
        generates = row[5].startswith("tg")
        assert (row[7], row[8][-1]) == ("125 kB" if generates else "-", "%" if generates and native_isas() else "-")


@pytest.mark.parametrize(("skip", "left"), [("-p", "tg3"), ("-n", "pp6")])
def test_zero_skips_a_kind(run, skip: str, left: str) -> None:
    rows = json.loads(run(*SMALL, skip, "0", "--json").out)
    assert [row["test"] for row in rows] == [left]


def test_json_and_csv_hold_every_field(run) -> None:
    rows = json.loads(run(*SMALL, "-o", "json", "--no-warmup").out)
    assert [list(row) for row in rows] == [FIELDS, FIELDS]
    prompt, generation = rows
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["bytes_per_token"]) == (6, 0, None)
    assert (generation["n_prompt"], generation["n_gen"], generation["bytes_per_token"]) == (0, 3, 125184)
    assert (generation["model"], generation["variant"]) == ("tiny", "q4")
    installed = json.loads(run("ls", "--json").out)
    assert generation["model_size"] == next(row["bytes"] for row in installed if row["variant"] == "q4")
    assert generation["model_n_params"] == json.loads(run("show", "tiny", "--json").out)["total"]
    assert len(generation["samples_ns"]) == 2
    table = list(csv.DictReader(run(*SMALL, "-o", "csv").out.splitlines()))
    assert [list(row) for row in table] == [FIELDS, FIELDS]
    assert [row["test"] for row in table] == ["pp6", "tg3"]
    assert len(table[0]["samples_ns"].split()) == 2
    assert table[0]["bytes_per_token"] == ""


def test_talk_is_on_stderr(run) -> None:
    assert "pp6: warm-up" in run(*SMALL).err
    quiet = run("-q", *SMALL)
    assert quiet.err == ""
    assert "pp6" in quiet.out


def test_kernels_need_no_model(run) -> None:
    result = run("bench", "--kernels", "--quick", "--threads", "2")
    assert result.code == 0, result.err
    head, _, *rows = cells(result.out)
    assert head == [
        "test", "format", "shape", "tokens", "backend", "threads", "ms", "GB/s", "of bandwidth", "GFLOP/s",
    ]  # fmt: skip
    if not native_isas():
        assert [row[4] for row in rows] == ["reference"]
        return
    assert rows[-1][:5] == ["read", "-", "-", "-", "-"]
    assert {row[1] for row in rows[:-1]} == set(KINDS)
    assert [row[2] for row in rows if row[4] == "reference"] == ["128 x 64"]
    for row in rows[:-1]:
        assert (row[8] == "-", row[9] == "-") == ((True, False) if row[3] == "512" else (False, True))


def test_kernels_as_json(run) -> None:
    rows = json.loads(run("bench", "--kernels", "--quick", "--json").out)
    assert all(row["median_ns"] > 0 and row["bytes_per_second"] > 0 for row in rows)
    if native_isas():
        assert (rows[-1]["test"], rows[-1]["n_bytes"]) == ("read", 1 << 20)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("-p", "-5"), 2, "'-p' / '--n-prompt': '-5' is not a whole number"),
        (("-p", "many"), 2, "'many'"),
        (("-p", "128,"), 2, "'128,'"),
        (("-n", "1.5"), 2, "'-n' / '--n-gen': '1.5'"),
        (("-d", "-1"), 2, "'-d' / '--n-depth': '-1'"),
        (("-r", "0"), 2, "-r"),
        (("-r", "x"), 2, "-r"),
        (("--threads", "0"), 2, "'--threads': '0' is not a whole number of 1 or more"),
        (("-p", "0", "-n", "0"), 2, "no test is left"),
        (("-m", "tiny", "-p", "500", "-d", "20"), 2, "pp500 @ d20 needs a context of 520 tokens and the model has 512"),
        (("-m", "tiny", "-n", "513"), 2, "tg513 needs a context of 513"),
        (("-m", "nobody"), 3, "no model is called nobody"),
        (("--kernels", "-m", "tiny"), 2, "-m does not go with --kernels"),
        (("--kernels", "-p", "1"), 2, "-p does not go with --kernels"),
        (("--kernels", "-n", "1"), 2, "-n does not go with --kernels"),
        (("--kernels", "-d", "0"), 2, "-d does not go with --kernels"),
        (("--kernels", "--vary", "ram=1G"), 2, "--vary does not go with --kernels"),
        (("--kernels", "--ram", "1G"), 2, "--ram does not go with --kernels"),
        (("-m", "tiny", "--vary", "ram"), 2, "'ram' is not of the form NAME=VALUE,..."),
        (("-m", "tiny", "--vary", "ram="), 2, "NAME is one of ram, kv-dtype, experts-per-token, lookahead"),
        (("-m", "tiny", "--vary", "colour=red"), 2, "'colour=red' is not of the form"),
        (("-m", "tiny", "--vary", "lookahead=on,maybe"), 2, "'maybe' is no value of lookahead"),
        (("-m", "tiny", "--vary", "experts-per-token=2,two"), 2, "is no value of experts-per-token"),
        (("-m", "tiny", "--vary", "experts-per-token=2,5"), 2, "--experts-per-token 5 is outside 1 to 4"),
        (("-m", "tiny", "--vary", "kv-dtype=f16,f17"), 2, "--kv-dtype 'f17' is none of f16, f32"),
        (("-m", "tiny", "--vary", "ram=1G,lots"), 2, "--ram 'lots' is no size"),
        (("-m", "tiny", "--vary", "ram=1G,"), 2, "--ram '' is no size"),
        (("-m", "tiny", "--vary", "ram=1G,250M"), 7, "tiny:q4 needs at least --ram 2"),
        (("--quick",), 2, "--quick needs --kernels"),
        (("--kernels", "--compare", "tiny:q4,tiny:bf16"), 2, "--compare does not go with --kernels"),
        (("--compare", "tiny:q4"), 2, "--compare takes two models or more"),
        (("--compare", "tiny:q4,,tiny:bf16"), 2, "'tiny:q4,,tiny:bf16' has an empty name"),
        (("--compare", ""), 2, "has an empty name"),
        (("--compare", "tiny:q4,nobody"), 3, "no model is called nobody"),
        (("--compare", "tiny:q4,tiny:q8"), 3, "tiny:q8 is not installed"),
        (("--compare", "tiny:q4,tiny:bf16", "-n", "513"), 2, "tg513 needs a context of 513"),
        (("--compare", "tiny:q4,tiny:bf16", "--threads", "1,2"), 2, "--compare takes one number of --threads"),
        (("--compare", "tiny:q4,tiny:bf16", "-m", "tiny"), 2, "-m does not go with --compare"),
        (("--compare", "tiny:q4,tiny:bf16", "--vary", "ram=1G"), 2, "--vary does not go with --compare"),
        (("--compare", "tiny:q4,tiny:bf16", "--quick"), 2, "--quick needs --kernels"),
        (("--compare", "tiny:q4,tiny:bf16", "--ram", "250M"), 7, "tiny:q4 needs at least --ram 2"),
        (("--quality",), 2, "--quality needs --compare"),
        (("--compare", "tiny:q4,tiny:bf16", "--against", "tiny:q4"), 2, "--against needs --quality"),
        (("--compare", "tiny:q4,tiny:bf16", "--text", "x"), 2, "--text needs --quality"),
        (("--compare", "tiny:q4,tiny:bf16", "--ctx", "64"), 2, "--ctx needs --quality"),
        (("--compare", "tiny:q4,tiny:bf16", "--chunks", "1"), 2, "--chunks needs --quality"),
        (("--compare", "tiny:q4,tiny:bf16", "--plot", "x.png"), 2, "--plot needs --quality"),
        (("--compare", "tiny:q4,tiny:bf16", "--quality", "--plot", "x.jpg"), 2, "pictures are PNG files"),
        (("--compare", "tiny:q4,tiny:bf16", "--quality", "--text", "/nowhere"), 3, "/nowhere"),
        (("--compare", "tiny:q4,tiny:bf16", "--quality", "--against", "nobody"), 3, "no model is called nobody"),
        (("--compare", "tiny:q4,tiny:bf16", "--quality", "--ctx", "513"), 2, "513"),
        (("-o", "xml"), 2, "xml"),
        (("-o", "csv", "--json"), 2, "contradict"),
    ],
)
def test_bad_input(run, arguments: tuple[str, ...], code: int, says: str) -> None:
    result = run("bench", *arguments)
    assert result.code == code, result.err
    assert says in result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert len(result.err.splitlines()) <= 2


def test_a_budget_may_vary(run, tiny_budget) -> None:
    """A row of each test for each value, and hits that go with the room."""
    little_ram = tiny_budget(experts=6, context=6)
    given = (*SMALL, "--device", "cpu", "--vary", f"ram={little_ram},1G")
    little_prompt, little, large_prompt, large = json.loads(run(*given, "--json").out)
    for few, all_of_them in ((little_prompt, large_prompt), (little, large)):
        assert (few["ram_budget"], all_of_them["ram_budget"]) == (little_ram, 10**9)
        assert (few["ram_slots"], all_of_them["ram_slots"]) == (6, 8)
        assert few["bytes_read"] > 0 == all_of_them["bytes_read"] == all_of_them["disk_hits"]
    table = cells(run(*given).out)
    assert [row[1] for row in table[2:]] == [f"ram={little_ram}"] * 2 + ["ram=1G"] * 2
    assert [row[10] for row in table[2:]] == ["6 of 8", "6 of 8", "8 of 8", "8 of 8"]
    assert [row[12] for row in table[4:]] == ["0 B", "0 B"]


def test_other_options_may_vary(run, tiny_budget) -> None:
    ram = str(tiny_budget(experts=6, context=6))
    small = (*SMALL, "-p", "0", "--device", "cpu", "--ram", ram, "--json", "--vary")
    ahead, plain = json.loads(run(*small, "lookahead=on,off").out)
    assert (ahead["run"], plain["run"]) == ("lookahead=on", "lookahead=off")
    assert (ahead["prefetch_recall"] is None, plain["prefetch_recall"] is None) == (False, True)
    one, two = json.loads(run(*small, "experts-per-token=1,2").out)
    assert one["bytes_per_token"] < two["bytes_per_token"]
    assert [row["test"] for row in json.loads(run(*small, "kv-dtype=f16, f32").out)] == ["tg3", "tg3"]


def test_one_model_at_a_time_is_in_memory(run, tiny_budget, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the one before is the next one's."""
    little_ram = tiny_budget(experts=6, context=6)
    alive: weakref.WeakSet[Transformer] = weakref.WeakSet()
    before, open_bench = [], bench.open_bench

    def counting(*given):
        before.append(len(alive))
        target = open_bench(*given)
        alive.add(target.model)
        return target

    monkeypatch.setattr(bench, "open_bench", counting)
    assert run(*SMALL, "--device", "cpu", "--vary", f"ram={little_ram},1G,{little_ram}").code == 0
    assert before == [0, 0, 0]


def test_compared_models_have_a_line_each(run) -> None:
    result = run(*BOTH, "-d", "0,4", "--threads", "1")
    assert result.code == 0, result.err
    head, _, base, other = cells(result.out)
    speeds = [f"{test}{depth} t/s" for depth in ("", " @ d4") for test in ("pp6", "tg3")]
    assert head == ["model", "size", *(title for speed in speeds for title in (speed, "times baseline"))]
    assert (base[0], other[0]) == ("tiny:bf16", "tiny:q4")
    assert base[3::2] == ["baseline"] * 4
    for cell in (*base[2::2], *other[2:]):
        median, low, _, high = cell.replace("(", "").replace(")", "").split()
        assert 0 < float(low) <= float(median) <= float(high)
    assert "2 rounds of tiny:bf16, tiny:q4 in turns" in result.err


def test_compared_quality(run, text: Path) -> None:
    asked = (*BOTH, "-n", "0", "--quality", "--ctx", "64", "--text", str(text))
    result = run(*asked)
    assert result.code == 0, result.err
    head, _, base, other = loose_cells(result.out)
    assert head == [
        "model", "size", "bits/weight", "of experts", "pp6 t/s", "times baseline", "perplexity", "mean KL",
        "same top %",
    ]  # fmt: skip
    assert base[7:] == ["0.00000 ± 0.00000", "100.00 ± 0.00"], "the first is the reference"
    assert float(base[3]) == 16 > float(other[3]) > 4
    against = run("quality", "tiny:q4", "--against", "tiny:bf16", "--ctx", "64", "--text", str(text), "--device", "cpu")
    (line,) = (dict(zip(*rows, strict=True)) for rows in [loose_cells(against.out)[::2]])
    assert dict(zip(head, other, strict=True)).items() >= {name: line[name] for name in head[-3:]}.items()
    assert "lamps.txt: 3 chunks of 64 tokens, 93 of them scored" in result.err
    alone = loose_cells(run(*asked, "--against", "none").out)
    assert (alone[0], alone[3][6]) == (head[:7], other[6])
    reversed_, _ = json.loads(run(*asked, "--against", "tiny:q4", "-o", "json").out)
    assert (reversed_["label"], reversed_["against"]) == ("tiny:bf16", "tiny:q4")
    assert reversed_["mean_kl"] > 0


def test_compared_models_as_json_and_csv(run) -> None:
    fields = [field.name for field in dataclasses.fields(CompareRow)]
    rows = json.loads(run(*BOTH, "--json").out)
    assert [list(row) for row in rows] == [fields] * 4
    assert [(row["label"], row["test"]) for row in rows] == [
        ("tiny:bf16", "pp6"), ("tiny:bf16", "tg3"), ("tiny:q4", "pp6"), ("tiny:q4", "tg3"),
    ]  # fmt: skip
    assert rows[3]["ratio"] == pytest.approx(sum(rows[3]["ratios"]) / 2)
    table = list(csv.DictReader(run(*BOTH, "-o", "csv").out.splitlines()))
    assert [list(row) for row in table] == [fields] * 4
    assert len(table[0]["samples_ts"].split()) == 2
    assert (table[0]["mean_kl"], table[0]["together"]) == ("", "True")


def test_loading_again_is_said(run, tiny_budget) -> None:
    result = run(*BOTH, "--ram", str(tiny_budget(experts=8, context=6) + 2_000_000))
    assert result.code == 0, result.err
    assert "do not fit in memory together" in result.err
    assert len(cells(result.out)) == 4


def test_compared_models_as_a_picture(run, text: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = tmp_path / "compared.png"
    result = run(*BOTH, "--quality", "--ctx", "64", "--text", str(text), "--plot", str(path))
    assert result.code == 0, result.err
    assert f"drawn: {path}" in result.err
    picture = imread(path)
    assert picture.shape[:2] == (compare_figure.HEIGHT * DPI, compare_figure.WIDTH * DPI)
    assert 0.01 < (picture[..., :3].min(axis=-1) < 0.9).mean() < 0.5, "neither blank nor black"


def compared(variant: str, speed: float, kl: float | None, tests: tuple[str, ...] = ("pp6", "tg3")) -> list[CompareRow]:
    """Of a model of 86 million parameters."""
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(CompareRow))
    return [
        CompareRow(**nothing | {
            "label": f"mini:{variant}", "model": "mini", "variant": variant, "model_size": 5e7 + 1e7 * len(variant),
            "model_n_params": 86_000_000, "test": test, "n_gen": 3 if test == "tg3" else 0,
            "median_ts": speed, "min_ts": speed - 2, "max_ts": speed + 1, "samples_ts": (speed,) * 5,
            "text": "lamps.txt", "tokens": 93, "perplexity": 20 + speed, "perplexity_error": 1.5,
            "against": None if kl is None else "mini:bf16", "mean_kl": kl, "mean_kl_error": kl and kl / 9,
        })
        for test in tests
    ]  # fmt: skip


FIGURES = {
    "divergence": [("bf16", 20, 0.0), ("q8", 35, 0.003), ("q4", 55, 0.1)],
    "perplexity": [("bf16", 20, None), ("q4", 55, None)],
    "same": [("q4", 55, 0.0), ("q4 #2", 55.1, 0.0)],
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_picture_says_what_it_shows(name: str) -> None:
    figure = compare_figure.draw([row for given in FIGURES[name] for row in compared(*given)])
    figure.canvas.draw()
    size, speed = figure.axes
    against = "" if name == "perplexity" else ", against mini:bf16"
    title = f"What bits cost, and how fast they are: lamps.txt, 93 tokens scored{against}"
    assert figure.get_suptitle() == title
    assert size.get_xlabel() == "GB on disk"
    assert size.get_ylabel() == f"{'perplexity' if name == 'perplexity' else 'mean KL, nats a token'} (bars: 95 %)"
    assert size.get_yscale() == ("linear" if name == "perplexity" else "log")
    assert speed.get_xlabel() == "tokens/s, tg3, median of 5 (bars: slowest to fastest)"
    for axes in (size, speed):
        labels = [label.get_text() for label in axes.texts]
        assert labels == [f"{variant}: 0" if kl == 0 else variant for variant, _, kl in FIGURES[name]]
        boxes = [label.get_window_extent() for label in axes.texts]
        assert all(axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1 for box in boxes)
        assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


def test_points_and_bars_lie_at_the_figures() -> None:
    size, speed = compare_figure.draw([*compared("q8", 35, 0.003), *compared("q4", 55, 0.1)]).axes
    points = [
        [tuple(map(float, point)) for line in axes.lines for point in line.get_xydata()] for axes in (size, speed)
    ]
    assert {(0.07, 0.003), (0.07, 0.1)} <= set(points[0])
    assert {(35, 0.003), (55, 0.1)} <= set(points[1])
    bars = [bar.tolist() for found in speed.collections for bar in found.get_segments()]
    assert [[33, 0.003], [36, 0.003]] in bars, "slowest to fastest"
    assert [[53, 0.1], [56, 0.1]] in bars


def test_a_picture_of_prompts_where_nothing_is_generated() -> None:
    _, speed = compare_figure.draw([*compared("q8", 35, 0.003, ("pp6",)), *compared("q4", 55, 0.1, ("pp6",))]).axes
    assert speed.get_xlabel().startswith("tokens/s, pp6, median of 5")


def test_too_little_memory_for_the_kernels(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "NEEDED_BYTES", 1 << 60)
    assert run("bench", "--kernels").code == 7


def test_help_imports_no_torch() -> None:
    probe = "import sys; from mixlocal.cli import bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
