"""Kernels for this machine's CPU: the face of native/, and what to say where it is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache

import torch
from torch.nn.functional import linear as plain_linear

from mixlocal.errors import RefusedError, UsageError
from mixlocal.kernels.reference import check_linear, check_quantized, grouped_moe_ffn
from mixlocal.quant.format import CODEBOOKS, ExpertWeights, QuantSpec, QuantTensor, Weight
from mixlocal.quant.quantize import check_finite, empty, quantize, relative_error, row_chunks

try:
    from mixlocal.kernels.native import _native

    MISSING = ""
except ImportError as error:  # no compiler when mixlocal was installed
    MISSING = str(error)

ISA_VARIABLE = "MIXLOCAL_ISA"
REFERENCE = "reference"  # as a value of MIXLOCAL_ISA: PyTorch, although the compiled kernels are there


class CpuKernels:
    """The compiled kernels of one instruction set.

    Weights must be contiguous; they are read where they lie. Up to 4 tokens at a time each output has the same bits
    whatever the other tokens are; larger batches add in another order.
    """

    def __init__(self, isa: str) -> None:
        if isa not in native_isas():
            raise _no_such_isa(isa)
        self._isa = isa

    @property
    def name(self) -> str:
        return f"cpu-{self._isa}"

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See `Kernels.linear`."""
        check_linear(x, weight)
        if isinstance(weight, torch.Tensor) and weight.dtype == torch.float32:
            return plain_linear(x, weight)
        x = x.detach().contiguous()
        out = torch.empty(len(x), weight.shape[0])
        _native.linear(self._isa, *_operand(weight), x.data_ptr(), len(x), out.data_ptr())
        return out

    def moe_ffn(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        experts: Mapping[int, ExpertWeights],
    ) -> torch.Tensor:
        """See `Kernels.moe_ffn`."""
        return grouped_moe_ffn(self.linear, x, expert_ids, weights, experts)


def quantize_rows(name: str, weight: torch.Tensor, spec: QuantSpec, out: Weight | None = None) -> tuple[Weight, float]:
    """`quantize` and `relative_error` in one pass over a [R, C] weight, compiled where possible; the same bits.

    `out`: where to put the result, such as views into a record. The error agrees with `relative_error` to four digits.
    Raises `RefusedError` as `quantize` does.
    """
    if spec.kind == "bf16" and weight.dtype == torch.bfloat16:
        check_finite(name, weight)
        return _placed(weight, out), 0.0
    isa = chosen_isa()
    if isa is None or spec.kind == "bf16" or weight.device.type != "cpu":
        quantized, relative = _quantize_by_specification(name, weight, spec)
        return _placed(quantized, out), relative
    rows, columns = weight.shape
    spec.check_shape(name, (rows, columns))
    target = empty(spec, (rows, columns)) if out is None else out
    if not isinstance(target, QuantTensor) or (target.spec, target.shape) != (spec, (rows, columns)):
        raise RefusedError(f"{name}: there is no room for it where it should go")
    check_quantized(target)
    codes, scales = target.codes, target.scales
    error = power = 0.0
    for part, source in _sources(weight):
        part_error, part_power, bad = _quantize_part(isa, spec, source, codes[part], scales[part])
        if bad >= 0:
            row = bad // columns
            check_finite(name, source[row : row + 1], part.start + row)
        error, power = error + part_error, power + part_power
    if not bool(scales.isfinite().all()):
        return _quantize_by_specification(name, weight, spec)  # which says what is wrong
    return target, (error / power) ** 0.5 if power else 0.0


def native_isas() -> tuple[str, ...]:
    """The compiled instruction sets that this machine can run, best first; empty where none were built."""
    return () if MISSING else tuple(_native.available_isas())


def native_isa() -> str | None:
    """The best of `native_isas()`, or None; `MISSING` says why there is none."""
    return next(iter(native_isas()), None)


def chosen_isa() -> str | None:
    """What MIXLOCAL_ISA asks for, else the best; None means the reference.

    Raises `UsageError` if this machine does not have what is asked for.
    """
    wanted = os.environ.get(ISA_VARIABLE)
    if not wanted:
        return native_isa()
    if wanted == REFERENCE:
        return None
    if wanted not in native_isas():
        raise _no_such_isa(wanted)
    return wanted


def set_threads(count: int) -> None:
    """Compute with `count` threads, 1 or more.

    Where the compiled kernels do the work, PyTorch keeps to one thread: its own would wait for each other by spinning
    after every small operation, and a busy neighbour on the machine then costs ten times the work.
    """
    if count < 1:
        raise UsageError(f"{count} threads cannot compute anything", "use 1 or more")
    if chosen_isa() is None:
        torch.set_num_threads(count)
    else:
        torch.set_num_threads(1)
        _native.set_threads(count)


def _no_such_isa(isa: str) -> UsageError:
    names = ", ".join((*native_isas(), REFERENCE))
    return UsageError(f"this machine has no {isa!r} kernels", f"set {ISA_VARIABLE} to one of: {names}")


def _placed(weight: Weight, out: Weight | None) -> Weight:
    """`weight` itself, or its copy in `out`."""
    if out is None:
        return weight
    if isinstance(weight, QuantTensor) and isinstance(out, QuantTensor):
        out.codes.copy_(weight.codes)
        out.scales.copy_(weight.scales)
    elif isinstance(weight, torch.Tensor) and isinstance(out, torch.Tensor):
        out.copy_(weight)
    return out


def _quantize_by_specification(name: str, weight: torch.Tensor, spec: QuantSpec) -> tuple[Weight, float]:
    quantized = quantize(name, weight, spec)
    return quantized, relative_error(weight, quantized)


def _quantize_part(
    isa: str, spec: QuantSpec, source: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> tuple[float, float, int]:
    """Sums of squares of error and source, and the flat index of the first NaN or infinity or -1."""
    rows, columns = source.shape
    kind, codebook = (_native.FOUR_BIT, _codebook(spec.kind).data_ptr()) if spec.four_bit else (_native.INT8, 0)
    return _native.quantize(
        isa, kind, rows, columns, source.data_ptr(), source.dtype == torch.bfloat16,
        codebook, _address("codes", codes), _address("scales", scales), scales.dtype == torch.float16,
    )  # fmt: skip


def _operand(weight: Weight) -> tuple[int, int, int, int, int, bool, int]:
    """What the compiled code is told of a weight that `check_linear` has passed."""
    rows, columns = weight.shape
    if isinstance(weight, torch.Tensor):
        return _native.BF16, rows, columns, _address("weight", weight), 0, False, 0
    codes, scales = _address("codes", weight.codes), _address("scales", weight.scales)
    if weight.spec.four_bit:
        half = weight.scales.dtype == torch.float16
        return _native.FOUR_BIT, rows, columns, codes, scales, half, _codebook(weight.spec.kind).data_ptr()
    return _native.INT8, rows, columns, codes, scales, False, 0


def _address(name: str, array: torch.Tensor) -> int:
    if not array.is_contiguous() or array.device.type != "cpu":
        raise RefusedError(f"linear: {name} are not contiguous in memory")
    return array.data_ptr()


def _sources(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """A weight as the compiled quantizer reads it: whole if it can, else as float32 some rows at a time."""
    weight = weight.detach()
    if weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous():
        yield slice(0, len(weight)), weight
        return
    for part in row_chunks(*weight.shape):
        yield part, weight[part].float().contiguous()


@cache
def _codebook(kind: str) -> torch.Tensor:
    return torch.tensor(CODEBOOKS[kind])
