"""What `bench` shows of its rows in a Markdown table: llama-bench's columns, and ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixlocal.cli.render import count, size
from mixlocal.cli.report import Column

if TYPE_CHECKING:
    from mixlocal.app.bench import BenchModel, BenchRow
    from mixlocal.app.bench_kernels import KernelRow
    from mixlocal.app.bench_request import BenchRequest

NOTHING = "-"


def model_columns(model: BenchModel, request: BenchRequest) -> list[Column[BenchRow]]:
    name = f"{model.model}:{model.variant}"
    return [
        Column("model", lambda row: f"{row.model}:{row.variant}", len(name), right=False),
        *([Column("run", lambda row: row.run, len(model.run), right=False)] if model.run else []),
        Column("size", lambda row: size(row.model_size), 7),
        Column("params", lambda row: count(row.model_n_params), 7),
        Column("backend", lambda row: row.backend, len(model.backend), right=False),
        Column("threads", lambda row: str(row.n_threads)),
        Column("test", lambda row: row.test, max(len(test.name) for test in request.tests())),
        Column("t/s", lambda row: f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}", 20),
        Column("bytes/token", lambda row: NOTHING if row.bytes_per_token is None else size(row.bytes_per_token)),
        Column("of bandwidth", lambda row: _percent(row.bandwidth_share)),
        Column("experts in RAM", lambda row: f"{row.ram_slots} of {row.n_records}"),
        Column("RAM hits", lambda row: _percent(row.ram_hits / max(1, row.gpu_hits + row.ram_hits + row.disk_hits))),
        Column("disk/token", lambda row: size(row.bytes_read // _tokens(row))),
        Column("stall/token", lambda row: f"{1e3 * row.stall_s / _tokens(row):.1f} ms"),
    ]


def _tokens(row: BenchRow) -> int:
    """Of all repetitions."""
    return len(row.samples_ns) * (row.n_prompt or row.n_gen)


def kernel_columns() -> list[Column[KernelRow]]:
    from mixlocal.app.bench_cases import BATCH
    from mixlocal.quant.format import KINDS

    def shape(row: KernelRow) -> str:
        return NOTHING if row.rows is None else f"{row.rows} x {row.columns}"

    def flops(row: KernelRow) -> str:
        if row.flop_per_second is None or row.n_tokens is None or row.n_tokens < BATCH:
            return NOTHING
        return f"{row.flop_per_second / 1e9:.1f}"

    return [
        Column("test", lambda row: row.test, 6, right=False),
        Column("format", lambda row: row.format or NOTHING, max(map(len, KINDS)), right=False),
        Column("shape", shape, 12),
        Column("tokens", lambda row: NOTHING if row.n_tokens is None else str(row.n_tokens)),
        Column("backend", lambda row: row.backend or NOTHING, 14, right=False),
        Column("threads", lambda row: str(row.n_threads)),
        Column("ms", lambda row: f"{row.median_ns / 1e6:.3f}", 9),
        Column("GB/s", lambda row: f"{row.bytes_per_second / 1e9:.2f}", 6),
        Column("of bandwidth", lambda row: _percent(row.bandwidth_share)),
        Column("GFLOP/s", flops),
    ]


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}%"
