"""Kernels for a GPU: Triton's, or bitsandbytes' where there is no Triton, and PyTorch for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from subprocess import SubprocessError
from typing import TypeGuard, cast

import torch

from mixlocal.errors import UsageError
from mixlocal.kernels import Expert, Kernels
from mixlocal.kernels.checks import check_linear
from mixlocal.kernels.integer import integer_linear
from mixlocal.kernels.reference import ReferenceKernels
from mixlocal.quant.format import BLOCK_SIZE, ExpertWeights, Kind, QuantSpec, QuantTensor, Weight
from mixlocal.quant.quantize import row_chunks

FOUR_BIT: tuple[Kind, ...] = ("nf4", "fp4")
CHECKED: tuple[Kind, ...] = ("nf4",)  # before a model is loaded
AFFINE: tuple[Kind, ...] = ("int4", "int4-32")  # at their first use: others need not wait until they are compiled
FEW_TOKENS = 7  # as many float32 rows as bitsandbytes multiplies straight from the codes
CHUNK_ELEMENTS = 1 << 24  # dequantized at once for more tokens: 64 MB, and few launches for a matrix of an expert
OLDEST = (8, 0)  # compute capability: Ampere's, whose matrix units take int8 and bfloat16
ALIGNMENT = 16  # bytes that its kernel loads at once
TOLERANCE = 0.01  # of a product's norm: wrong kernels are off by about 1, a setting that allows TF32 by 1e-3
INSTALL = "pip install 'bitsandbytes>=0.50' into mixlocal's environment, or use cpu"
DIAGNOSE = f"python -m bitsandbytes tells what it finds; {INSTALL}"


@dataclass(frozen=True, slots=True)
class TritonProducts:
    """See `cuda_linear`."""

    multiply: Callable[[torch.Tensor, Weight], torch.Tensor]
    expert: Callable[[torch.Tensor, ExpertWeights], torch.Tensor]


class CudaKernels(ReferenceKernels):
    """With Triton, what `CpuKernels` computes with four-bit and int8 weights, to the bit, and float32 sums of exact
    products with bfloat16 ones: a row's products do not depend on the rows beside it.

    With bitsandbytes, the reference's arithmetic, float32 throughout, with four-bit codes read where they lie. Half
    precision is further off (float16 by 3e-4 of a product's norm, bfloat16 by 3e-3) and gains nothing for few tokens,
    which wait for the codes. int8 and bfloat16 weights are multiplied as the reference does it: LLM.int8 would round a
    whole row of activations to int8, 1 % off, and 7 % where two columns are 40 times the others.
    """

    def __init__(self, device: str, *, triton: bool = True) -> None:
        """triton: False for bitsandbytes. Raises `UsageError` if neither is there and computes right on `device`."""
        self._device, self._affine_checked = device, False
        self._triton = triton_products(device) if triton and device != "cpu" else None
        if self._triton is None:
            _import_bitsandbytes()
            check_products(self, device)

    @property
    def name(self) -> str:
        return f"{self._device} {'triton' if self._triton else 'bitsandbytes'}"

    def computes_as(self, kernels: Kernels, spec: QuantSpec) -> bool:
        """Whether experts of that format give the bits that `kernels` give; the scalar ones round SwiGLU otherwise."""
        compiled = kernels.name.startswith("cpu-") and kernels.name != "cpu-scalar"
        return self._triton is not None and compiled and spec.kind != "bf16"

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See `Kernels.linear`."""
        check_linear(x, weight)
        if self._triton and _has_program(weight):
            self._check_affine(weight)
            return self._triton.multiply(x, weight)
        if not (0 < len(x) <= FEW_TOKENS and _readable(weight) and _aligned(x)):
            return super().linear(x, weight)
        absmax, kind = _float_scales(weight.scales), weight.spec.kind
        out: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit(x, weight.codes, weight.shape, absmax, BLOCK_SIZE, kind)
        return out

    def expert(self, x: torch.Tensor, expert: Expert) -> torch.Tensor:
        """See `ReferenceKernels.expert`."""
        weights = cast(ExpertWeights, expert)
        matrices = weights.w1, weights.w3, weights.w2
        if self._triton and all(isinstance(matrix, QuantTensor) for matrix in matrices):
            self._check_affine(*matrices)
            return self._triton.expert(x, weights)
        return super().expert(x, expert)

    def _check_affine(self, *weights: Weight) -> None:
        """Raises `UsageError` if Triton's products with an affine one of them are wrong here."""
        assert self._triton is not None
        affine = [weight for weight in weights if isinstance(weight, QuantTensor) and weight.spec.affine]
        if affine and not self._affine_checked:
            check_triton(self._triton.multiply, str(affine[0].codes.device), AFFINE)
            self._affine_checked = True

    def exact_rows(self, weight: Weight) -> Iterator[tuple[slice, torch.Tensor]]:
        """See `ReferenceKernels.exact_rows`."""
        if not _readable(weight) or (self._triton and _has_program(weight)):
            yield from super().exact_rows(weight)
            return
        for part in row_chunks(*weight.shape, CHUNK_ELEMENTS):
            codes, absmax = weight.codes[part], _float_scales(weight.scales[part])
            shape, kind = (len(codes), weight.shape[1]), weight.spec.kind
            yield part, torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK_SIZE, kind, shape, torch.float32)


def _has_program(weight: Weight) -> bool:
    """Whether Triton multiplies by it."""
    return isinstance(weight, QuantTensor) or weight.dtype == torch.bfloat16


def _readable(weight: Weight) -> TypeGuard[QuantTensor]:
    """Whether bitsandbytes can take the arrays of a four-bit weight as they are.

    Its blocks run over the flattened matrix, ours along each row: the same where rows are whole blocks. Its kernels
    trust that there are codes, dense and aligned.
    """
    return (
        isinstance(weight, QuantTensor)
        and weight.spec.kind in FOUR_BIT
        and weight.shape[1] % BLOCK_SIZE == 0
        and weight.codes.numel() > 0
        and weight.codes.is_contiguous()
        and _aligned(weight.codes)
    )


def _aligned(tensor: torch.Tensor) -> bool:
    """PyTorch's allocators align the beginning of every storage by more."""
    return tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0


def _float_scales(scales: torch.Tensor) -> torch.Tensor:
    """As bitsandbytes takes them, dense. Converted at every use, for a slot of memory holds one expert after another;
    16-bit scales are a sixteenth of the bytes of the codes that they go with."""
    return scales.float().flatten()


@cache
def triton_products(device: str) -> TritonProducts | None:
    """None where Triton is not installed or cannot compile, as without a C compiler or for GPUs before Ampere.

    Raises `UsageError` if what it compiles is wrong.
    """
    if torch.cuda.get_device_capability(device) < OLDEST:
        return None
    try:
        from mixlocal.kernels import cuda_linear, cuda_programs
    except ImportError:
        return None
    try:
        check_triton(cuda_linear.multiply, device)
    except (RuntimeError, OSError, SubprocessError, cuda_programs.CompilationError):
        return None
    return TritonProducts(cuda_linear.multiply, cuda_linear.expert)


def check_triton(
    multiply: Callable[[torch.Tensor, Weight], torch.Tensor], device: str, kinds: tuple[Kind, ...] = CHECKED
) -> None:
    """Four-bit products of few and of many tokens, to the bit. Raises `UsageError` if they are others."""
    for kind in kinds:
        weight = _every_code(kind)
        there = QuantTensor(weight.spec, weight.shape, weight.codes.to(device), weight.scales.to(device))
        for tokens in (1, FEW_TOKENS + 1):
            x = torch.linspace(-1.0, 1.5, tokens * weight.shape[1]).view(tokens, -1)
            if not torch.equal(multiply(x.to(device), there).cpu(), integer_linear(x, weight)):
                way_out = "use another variant" if kind in AFFINE else "uninstall Triton, for bitsandbytes"
                raise UsageError(f"Triton multiplies {kind} weights wrongly on {device}", f"{way_out}, or use cpu")


def _every_code(kind: Kind) -> QuantTensor:
    """Every byte of codes, and more columns than a warp's 32 lanes take at once."""
    rows, columns = 8, 1088
    codes = (torch.arange(rows * columns // 2) % 256).to(torch.uint8).view(rows, -1)
    spec = QuantSpec(kind, 32)
    scales = torch.linspace(0.5, 2.0, rows * spec.planes * columns // BLOCK_SIZE).view(rows, -1)
    return QuantTensor(spec, (rows, columns), codes, scales)


def _import_bitsandbytes() -> None:
    """Registers its operators with PyTorch. Raises `UsageError` if it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError(f"GPUs need bitsandbytes: {error}", INSTALL) from error


def check_products(kernels: ReferenceKernels, device: str) -> None:
    """Every way to multiply by four-bit weights, over every byte of codes, compared with the reference.

    Raises `UsageError` if one fails or is off, so that an installation whose kernels do not fit the GPU is found here
    and not in the text that a model writes.
    """
    for kind in FOUR_BIT:
        for tokens in (1, FEW_TOKENS, FEW_TOKENS + 1):
            try:
                off = _product_error(kernels, kind, tokens, device)
            except (AttributeError, RuntimeError) as error:  # an operator is not there, or fails
                reason = str(error).partition("\n")[0]
                raise UsageError(f"bitsandbytes does not compute on {device}: {reason}", DIAGNOSE) from error
            if not off < TOLERANCE:
                wrong = f"bitsandbytes multiplies {kind} weights wrongly on {device}: they are {off:.2g} off"
                raise UsageError(wrong, DIAGNOSE)


def _product_error(kernels: ReferenceKernels, kind: Kind, tokens: int, device: str) -> float:
    """Norm of the difference to the reference's product, over that product's norm."""
    made = _every_code(kind)
    weight = QuantTensor(made.spec, made.shape, made.codes.to(device), made.scales.to(device))
    columns = weight.shape[1]
    x = torch.linspace(-1.0, 1.5, tokens * columns, device=device).view(tokens, columns)
    expected = ReferenceKernels().linear(x, weight)
    return float((kernels.linear(x, weight) - expected).norm() / expected.norm())


def check_device(device: str) -> None:
    """Raises `UsageError` unless `device`, "cuda" or "cuda:N", is a GPU that PyTorch can use here."""
    if not torch.cuda.is_available():
        reason = "nvidia-smi shows if the driver sees one" if torch.version.cuda else "it was built without CUDA"
        raise UsageError(f"{device}: PyTorch finds no GPU", f"{reason}; use cpu")
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        raise UsageError(f"there is no {device}: PyTorch finds {count} GPU{'s' * (count > 1)}", "the first is cuda:0")
