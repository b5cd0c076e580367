"""Triton programs for a GPU. T = tokens, R = rows, C = columns, B = blocks of 64 columns.

Every output is one fixed sequence of operations, whatever is computed beside it. Four-bit and int8 products follow
`integer.py` to the bit: whole numbers add up exactly in any order, so that few and many tokens may be multiplied in
different ways. None of this may be contracted (`enable_fp_fusion=False`): a * b + c rounds twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

Value: TypeAlias = tl.tensor  # of numbers or of addresses
CompilationError: type[Exception] = triton.CompilationError


def program(source: Callable[..., Any]) -> Any:
    """Compiled when it is first launched; functions that take a step are compiled into those that call them."""
    return triton.jit(source)


@program
def _exponential(x: Value) -> Value:
    """The compiled kernels' (body_float.inc), to the bit: Cephes' expf."""
    bounded = tl.minimum(tl.maximum(x, -87.3), 88.3)
    power = _nearest(bounded * 1.44269504)
    rest = tl.fma(power, tl.full(x.shape, -0.693359375, tl.float32), bounded)
    rest = tl.fma(power, tl.full(x.shape, 2.12194440e-4, tl.float32), rest)
    p = tl.full(x.shape, 1.9875691500e-4, tl.float32)
    p = tl.fma(p, rest, tl.full(x.shape, 1.3981999507e-3, tl.float32))
    p = tl.fma(p, rest, tl.full(x.shape, 8.3334519073e-3, tl.float32))
    p = tl.fma(p, rest, tl.full(x.shape, 4.1665795894e-2, tl.float32))
    p = tl.fma(p, rest, tl.full(x.shape, 1.6666665459e-1, tl.float32))
    p = tl.fma(p, rest, tl.full(x.shape, 5.0000001201e-1, tl.float32))
    p = tl.fma(p * rest, rest, rest) + 1.0
    result = p * ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, tl.where(x < -87.3, 0.0, result))


@program
def _nearest(x: Value) -> Value:
    """To whole numbers, halves to even, below 2^22: 1.5 * 2^23 leaves no bit for what is behind the point."""
    return (x + 12582912.0) - 12582912.0


@program
def quantize_rows(
    x: Value, up: Value, codes: Value, scales: Value, columns: Value, blocks: Value, step: Value,
    swiglu: tl.constexpr, paired: tl.constexpr,
) -> None:  # fmt: skip
    """x [T, C], or silu(x) * up, to whole numbers int8 [T, B * 64] and scales float32 [T, B], times `step`.

    paired: even columns in the first half of a block and odd ones in the second, as the nibbles of a byte are.
    `blocks` is a multiple of 8; what lies past the columns counts as zero.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * 8 + tl.arange(0, 8)
    inner = tl.arange(0, 64)
    column = block[:, None] * 64 + inner[None, :]
    value = tl.load(x + token * columns + column, mask=column < columns, other=0.0)
    if swiglu:
        other = tl.load(up + token * columns + column, mask=column < columns, other=0.0)
        value = tl.div_rn(value, _exponential(-value) + 1.0) * other
    bits = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = bits.to(tl.float32, bitcast=True)
    finite, zero = bits < 0x7F800000, largest < 1e-36
    limit = tl.full((8,), 127.0, tl.float32)
    usable = finite & (largest >= 1e-36)
    inverse = tl.where(usable, tl.div_rn(limit, tl.where(usable, largest, 1.0)), 0.0)
    whole = _nearest(tl.where(finite[:, None], value, 0.0) * inverse[:, None])
    scale = tl.where(finite, tl.where(zero, 0.0, tl.div_rn(largest, limit)), float("nan")) * step
    place = inner % 2 * 32 + inner // 2 if paired else inner
    tl.store(codes + token * blocks * 64 + block[:, None] * 64 + place[None, :], whole.to(tl.int8))
    tl.store(scales + token * blocks + block, scale)


@program
def _in_order(sums: Value, n: tl.constexpr) -> Value:
    """[n, 8] -> [n]: ((0 + 1) + (4 + 5)) + ((2 + 3) + (6 + 7))."""
    pairs = tl.sum(tl.reshape(sums, (n, 2, 2, 2)), axis=3)
    return tl.sum(tl.sum(pairs, axis=1), axis=1)


@program
def multiply_few(
    weight: Value, weight_scales: Value, levels: Value, codes: Value, scales: Value, out: Value, rows: Value,
    bytes_per_row: Value, weight_blocks: Value, blocks: Value, four_bit: tl.constexpr, n: tl.constexpr,
) -> None:  # fmt: skip
    """out [T, R] of n rows and one token. levels int16 [256]: what the two nibbles of a byte stand for."""
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * n + tl.arange(0, n)
    inside = row < rows
    bytes_per_block: tl.constexpr = 32 if four_bit else 64
    at = tl.arange(0, 8 * bytes_per_block)
    eight = tl.arange(0, 8)
    sums = tl.zeros((n, 8), tl.float32)
    for run in range(blocks // 8):
        here = run * 8 * bytes_per_block + at
        read = tl.load(
            weight + row[:, None] * bytes_per_row + here[None, :],
            mask=inside[:, None] & (here < bytes_per_row)[None, :],
            other=0,
        )
        numbers = codes + token * blocks * 64 + run * 512
        if four_bit:
            both = tl.load(levels + read.to(tl.int32)).to(tl.int32)
            place = at // 32 * 64 + at % 32
            even = tl.load(numbers + place).to(tl.int32)
            odd = tl.load(numbers + place + 32).to(tl.int32)
            products = (both >> 8) * even[None, :] + ((both << 24) >> 24) * odd[None, :]
        else:
            products = read.to(tl.int32) * tl.load(numbers + at).to(tl.int32)[None, :]
        whole = tl.sum(tl.reshape(products, (n, 8, bytes_per_block)), axis=2).to(tl.float32)
        block = run * 8 + eight
        scale = tl.load(scales + token * blocks + block)[None, :]
        if four_bit:
            known = inside[:, None] & (block < weight_blocks)[None, :]
            absmax = tl.load(weight_scales + row[:, None] * weight_blocks + block[None, :], mask=known, other=0.0)
            scale = absmax.to(tl.float32) * scale
        sums += whole * scale
    result = _in_order(sums, n)
    if not four_bit:
        result = result * tl.load(weight_scales + row, mask=inside, other=0.0)
    tl.store(out + token * rows + row, result, mask=inside)


@program
def _block_products(
    weight: Value, weight_scales: Value, levels: Value, codes: Value, scales: Value, row: Value, token: Value,
    inside: Value, asked: Value, block: Value, bytes_per_row: Value, weight_blocks: Value, blocks: Value,
    four_bit: tl.constexpr,
) -> Value:  # fmt: skip
    """[m, n] of one block: its whole sums times both scales."""
    at = tl.arange(0, 32)
    first = codes + token[:, None] * blocks * 64 + block * 64 + at[None, :]
    low = tl.load(first, mask=asked[:, None], other=0)
    high = tl.load(first + 32, mask=asked[:, None], other=0)
    scale = tl.load(scales + token * blocks + block, mask=asked, other=0.0)[:, None]
    if four_bit:
        here = block * 32 + at
        read = tl.load(
            weight + row[None, :] * bytes_per_row + here[:, None],
            mask=inside[None, :] & (here < bytes_per_row)[:, None],
            other=0,
        )
        both = tl.load(levels + read.to(tl.int32)).to(tl.int32)
        left, right = (both >> 8).to(tl.int8), ((both << 24) >> 24).to(tl.int8)
        known = inside & (block + tl.zeros_like(row) < weight_blocks)
        absmax = tl.load(weight_scales + row * weight_blocks + block, mask=known, other=0.0)
        scale = absmax.to(tl.float32)[None, :] * scale
    else:
        here = block * 64 + at
        start = weight + row[None, :] * bytes_per_row + here[:, None]
        left = tl.load(start, mask=inside[None, :] & (here < bytes_per_row)[:, None], other=0)
        right = tl.load(start + 32, mask=inside[None, :] & (here + 32 < bytes_per_row)[:, None], other=0)
    whole = tl.dot(low, left, out_dtype=tl.int32)
    whole = tl.dot(high, right, acc=whole, out_dtype=tl.int32)
    return whole.to(tl.float32) * scale


@program
def _pair(
    weight: Value, weight_scales: Value, levels: Value, codes: Value, scales: Value, row: Value, token: Value,
    inside: Value, asked: Value, first: Value, bytes_per_row: Value, weight_blocks: Value, blocks: Value,
    four_bit: tl.constexpr, m: tl.constexpr, n: tl.constexpr,
) -> Value:  # fmt: skip
    """[m, n], two of the eight running sums: of every eighth block from `first` on, and of those behind them."""
    even = tl.zeros((m, n), tl.float32)
    odd = tl.zeros((m, n), tl.float32)
    for block in range(first, blocks, 8):
        even += _block_products(
            weight, weight_scales, levels, codes, scales, row, token, inside, asked, block, bytes_per_row,
            weight_blocks, blocks, four_bit,
        )  # fmt: skip
        odd += _block_products(
            weight, weight_scales, levels, codes, scales, row, token, inside, asked, block + 1, bytes_per_row,
            weight_blocks, blocks, four_bit,
        )  # fmt: skip
    return even + odd


@program
def multiply_many(
    weight: Value, weight_scales: Value, levels: Value, codes: Value, scales: Value, out: Value, tokens: Value,
    rows: Value, bytes_per_row: Value, weight_blocks: Value, blocks: Value, four_bit: tl.constexpr, m: tl.constexpr,
    n: tl.constexpr,
) -> None:  # fmt: skip
    """out [T, R] of m tokens and n rows, in matrix units."""
    row = tl.program_id(1).to(tl.int64) * n + tl.arange(0, n)
    token = tl.program_id(0).to(tl.int64) * m + tl.arange(0, m)
    inside, asked = row < rows, token < tokens
    low = _pair(
        weight, weight_scales, levels, codes, scales, row, token, inside, asked, 0, bytes_per_row,
        weight_blocks, blocks, four_bit, m, n,
    )  # fmt: skip
    low += _pair(
        weight, weight_scales, levels, codes, scales, row, token, inside, asked, 4, bytes_per_row,
        weight_blocks, blocks, four_bit, m, n,
    )  # fmt: skip
    high = _pair(
        weight, weight_scales, levels, codes, scales, row, token, inside, asked, 2, bytes_per_row,
        weight_blocks, blocks, four_bit, m, n,
    )  # fmt: skip
    high += _pair(
        weight, weight_scales, levels, codes, scales, row, token, inside, asked, 6, bytes_per_row,
        weight_blocks, blocks, four_bit, m, n,
    )  # fmt: skip
    result = low + high
    if not four_bit:
        result = result * tl.load(weight_scales + row, mask=inside, other=0.0)[None, :]
    tl.store(out + token[:, None] * rows + row[None, :], result, mask=asked[:, None] & inside[None, :])


@program
def multiply_bfloat16(
    weight: Value,
    x: Value,
    out: Value,
    tokens: Value,
    rows: Value,
    columns: Value,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
) -> None:
    """out [T, R] of m tokens and n rows of a bfloat16 weight, in matrix units.

    A float32 number is the sum of three bfloat16 ones, so products are exact; k columns add up in the units, and each
    of these sums to the others as float32. m is the same for any number of tokens, or else bits would not be.
    """
    row = tl.program_id(0).to(tl.int64) * n + tl.arange(0, n)
    token = tl.program_id(1).to(tl.int64) * m + tl.arange(0, m)
    inside, asked = row < rows, token < tokens
    at = tl.arange(0, k)
    result = tl.zeros((m, n), tl.float32)
    for start in range(0, columns, k):
        here = start + at
        read = tl.load(
            weight + row[None, :] * columns + here[:, None],
            mask=inside[None, :] & (here < columns)[:, None],
            other=0.0,
        )
        value = tl.load(
            x + token[:, None] * columns + here[None, :], mask=asked[:, None] & (here < columns)[None, :], other=0.0
        )
        first = value.to(tl.bfloat16)
        rest = value - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        sums = tl.dot(third, read, out_dtype=tl.float32)
        sums = tl.dot(second, read, acc=sums, out_dtype=tl.float32)
        result += tl.dot(first, read, acc=sums, out_dtype=tl.float32)
    tl.store(out + token[:, None] * rows + row[None, :], result, mask=asked[:, None] & inside[None, :])
