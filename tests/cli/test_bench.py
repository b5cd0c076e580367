"""mixlocal bench"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import weakref

import pytest

from mixlocal.app import bench, bench_cases, bench_kernels, bench_weights, measure
from mixlocal.kernels.isa import native_isas
from mixlocal.model.transformer import Transformer

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
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1, table
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


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
    assert {row[1] for row in rows[:-1]} == {"nf4", "fp4", "int8", "bf16"}
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


def test_too_little_memory_for_the_kernels(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_kernels, "NEEDED_BYTES", 1 << 60)
    assert run("bench", "--kernels").code == 7


def test_help_imports_no_torch() -> None:
    probe = "import sys; from mixlocal.cli import bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
