"""Triton programs for a GPU. T = tokens, R = rows, C = columns, B = blocks of 64 columns.

Every output is one fixed sequence of operations, whatever is computed beside it. Four-bit and int8 products follow
`integer.py` to the bit: whole numbers add up exactly in any order, so that few and many tokens may be multiplied in
different ways. None of this may be contracted (`enable_fp_fusion=False`): a * b + c rounds twice.

planes: what `QuantSpec.planes` says of four-bit weights, and 0 for int8: 1, 2 and 4 mean a codebook, int4 and int4-32.
A piece is the columns that share a scale and a zero, or else a block.
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
    x: Value, up: Value, codes: Value, scales: Value, totals: Value, columns: Value, blocks: Value, step: Value,
    swiglu: tl.constexpr, piece: tl.constexpr, summed: tl.constexpr,
) -> None:  # fmt: skip
    """x [T, C], or silu(x) * up, to whole numbers int8 [T, B * 64] and scales float32 [T, B], times `step`.

    piece: even columns of so many in their first half and odd ones in the second, as the nibbles of a byte are; 0: as
    they lie. summed: totals float32 [T, B * 64 / piece] become the sums of whole numbers. `blocks` is a multiple of 8;
    what lies past the columns counts as zero.
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
    place = inner
    if piece:
        place = inner // piece * piece + inner % 2 * (piece // 2) + inner % piece // 2
    tl.store(codes + token * blocks * 64 + block[:, None] * 64 + place[None, :], whole.to(tl.int8))
    tl.store(scales + token * blocks + block, scale)
    if summed:
        pieces: tl.constexpr = 64 // piece
        at = (token * blocks + tl.program_id(1) * 8) * pieces + tl.arange(0, 8 * pieces)
        tl.store(totals + at, tl.sum(tl.reshape(whole, (8 * pieces, piece)), axis=1))


@program
def _in_order(sums: Value, n: tl.constexpr) -> Value:
    """[n, 8] -> [n]: ((0 + 1) + (4 + 5)) + ((2 + 3) + (6 + 7))."""
    pairs = tl.sum(tl.reshape(sums, (n, 2, 2, 2)), axis=3)
    return tl.sum(tl.sum(pairs, axis=1), axis=1)


@program
def _nibbles(read: Value, levels: Value, planes: tl.constexpr) -> tuple[Value, Value]:
    """The whole numbers, int32, that the high and the low nibbles of bytes stand for."""
    both = read.to(tl.int32)
    if planes == 1:
        both = tl.load(levels + both).to(tl.int32)
        left, right = both >> 8, (both << 24) >> 24
    else:
        left, right = both >> 4, both & 15
    return left, right


@program
def multiply_few(
    weight: Value, weight_scales: Value, levels: Value, codes: Value, scales: Value, totals: Value, out: Value,
    rows: Value, bytes_per_row: Value, weight_blocks: Value, blocks: Value, planes: tl.constexpr, n: tl.constexpr,
) -> None:  # fmt: skip
    """out [T, R] of n rows and one token. levels int16 [256]: what a codebook's two nibbles of a byte stand for."""
    token = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * n + tl.arange(0, n)
    inside = row < rows
    bytes_per_block: tl.constexpr = 32 if planes else 64
    pieces: tl.constexpr = 2 if planes == 4 else 1
    size: tl.constexpr = bytes_per_block // pieces
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
        if planes:
            left, right = _nibbles(read, levels, planes)
            place = at // size * (2 * size) + at % size
            even = tl.load(numbers + place).to(tl.int32)
            odd = tl.load(numbers + place + size).to(tl.int32)
            products = left * even[None, :] + right * odd[None, :]
        else:
            products = read.to(tl.int32) * tl.load(numbers + at).to(tl.int32)[None, :]
        whole = tl.sum(tl.reshape(products, (n, 8 * pieces, size)), axis=2).to(tl.float32)
        block = run * 8 + eight
        scale = tl.load(scales + token * blocks + block)[None, :]
        if planes >= 2:
            part = tl.arange(0, 8 * pieces)
            plane, its_block = part % pieces, run * 8 + part // pieces
            known = inside[:, None] & (its_block < weight_blocks)[None, :]
            of_row = weight_scales + row[:, None] * planes * weight_blocks
            first = of_row + (plane * weight_blocks + its_block)[None, :]
            slope = tl.load(first, mask=known, other=0.0).to(tl.float32)
            zero = tl.load(first + pieces * weight_blocks, mask=known, other=0.0).to(tl.float32)
            total = tl.load(totals + (token * blocks + run * 8) * pieces + part)
            whole = whole * slope + total[None, :] * zero
        if planes == 4:
            whole = tl.sum(tl.reshape(whole, (n, 8, 2)), axis=2)
        if planes == 1:
            known = inside[:, None] & (block < weight_blocks)[None, :]
            absmax = tl.load(weight_scales + row[:, None] * weight_blocks + block[None, :], mask=known, other=0.0)
            scale = absmax.to(tl.float32) * scale
        sums += whole * scale
    result = _in_order(sums, n)
    if not planes:
        result = result * tl.load(weight_scales + row, mask=inside, other=0.0)
    tl.store(out + token * rows + row, result, mask=inside)


@program
def _block_products(
    weight: Value, weight_scales: Value, levels: Value, codes: Value, scales: Value, totals: Value, row: Value,
    token: Value, inside: Value, asked: Value, block: Value, bytes_per_row: Value, weight_blocks: Value,
    blocks: Value, planes: tl.constexpr,
) -> Value:  # fmt: skip
    """[m, n] of one block of 64 columns that share what they are scaled by."""
    at = tl.arange(0, 32)
    first = codes + token[:, None] * blocks * 64 + block * 64 + at[None, :]
    low = tl.load(first, mask=asked[:, None], other=0)
    high = tl.load(first + 32, mask=asked[:, None], other=0)
    scale = tl.load(scales + token * blocks + block, mask=asked, other=0.0)[:, None]
    if planes:
        here = block * 32 + at
        read = tl.load(
            weight + row[None, :] * bytes_per_row + here[:, None],
            mask=inside[None, :] & (here < bytes_per_row)[:, None],
            other=0,
        )
        left, right = _nibbles(read, levels, planes)
        left, right = left.to(tl.int8), right.to(tl.int8)
    else:
        here = block * 64 + at
        start = weight + row[None, :] * bytes_per_row + here[:, None]
        left = tl.load(start, mask=inside[None, :] & (here < bytes_per_row)[:, None], other=0)
        right = tl.load(start + 32, mask=inside[None, :] & (here + 32 < bytes_per_row)[:, None], other=0)
    whole = tl.dot(low, left, out_dtype=tl.int32)
    whole = tl.dot(high, right, acc=whole, out_dtype=tl.int32).to(tl.float32)
    if planes == 1:
        known = inside & (block + tl.zeros_like(row) < weight_blocks)
        absmax = tl.load(weight_scales + row * weight_blocks + block, mask=known, other=0.0)
        scale = absmax.to(tl.float32)[None, :] * scale
    elif planes == 2:
        whole = _line(whole, weight_scales, totals, row, token, inside, asked, block, weight_blocks, blocks, 0, 1)
    return whole * scale


@program
def _line(
    whole: Value, weight_scales: Value, totals: Value, row: Value, token: Value, inside: Value, asked: Value,
    block: Value, weight_blocks: Value, blocks: Value, number: tl.constexpr, pieces: tl.constexpr,
) -> Value:  # fmt: skip
    """whole [m, n] * scale + total * zero, of one piece of a block."""
    known = inside & (block + tl.zeros_like(row) < weight_blocks)
    first = weight_scales + (row * 2 * pieces + number) * weight_blocks + block
    scale = tl.load(first, mask=known, other=0.0).to(tl.float32)
    zero = tl.load(first + pieces * weight_blocks, mask=known, other=0.0).to(tl.float32)
    total = tl.load(totals + (token * blocks + block) * pieces + number, mask=asked, other=0.0)
    return whole * scale[None, :] + total[:, None] * zero[None, :]


@program
def _piece_products(
    weight: Value, weight_scales: Value, codes: Value, totals: Value, row: Value, token: Value, inside: Value,
    asked: Value, block: Value, bytes_per_row: Value, weight_blocks: Value, blocks: Value, number: tl.constexpr,
) -> Value:  # fmt: skip
    """[m, n] of one half of a block, before the activations' scale.

    Matrix units take 32 whole numbers at least, so the bytes are read twice, for their high and their low nibbles.
    """
    at = tl.arange(0, 32)
    numbers = tl.load(
        codes + token[:, None] * blocks * 64 + block * 64 + number * 32 + at[None, :], mask=asked[:, None], other=0
    )
    here = block * 32 + number * 16 + at % 16
    read = tl.load(
        weight + row[None, :] * bytes_per_row + here[:, None],
        mask=inside[None, :] & (here < bytes_per_row)[:, None],
        other=0,
    )
    nibbles = (read.to(tl.int32) >> (4 - at // 16 * 4)[:, None]) & 15
    whole = tl.dot(numbers, nibbles.to(tl.int8), out_dtype=tl.int32).to(tl.float32)
    return _line(whole, weight_scales, totals, row, token, inside, asked, block, weight_blocks, blocks, number, 2)


@program
def _products(
    weight: Value, weight_scales: Value, levels: Value, codes: Value, scales: Value, totals: Value, row: Value,
    token: Value, inside: Value, asked: Value, block: Value, bytes_per_row: Value, weight_blocks: Value,
    blocks: Value, planes: tl.constexpr,
) -> Value:  # fmt: skip
    """[m, n] of one block."""
    if planes == 4:
        first = _piece_products(
            weight, weight_scales, codes, totals, row, token, inside, asked, block, bytes_per_row, weight_blocks,
            blocks, 0,
        )  # fmt: skip
        last = _piece_products(
            weight, weight_scales, codes, totals, row, token, inside, asked, block, bytes_per_row, weight_blocks,
            blocks, 1,
        )  # fmt: skip
        scale = tl.load(scales + token * blocks + block, mask=asked, other=0.0)
        result = (first + last) * scale[:, None]
    else:
        result = _block_products(
            weight, weight_scales, levels, codes, scales, totals, row, token, inside, asked, block, bytes_per_row,
            weight_blocks, blocks, planes,
        )  # fmt: skip
    return result


@program
def _pair(
    weight: Value, weight_scales: Value, levels: Value, codes: Value, scales: Value, totals: Value, row: Value,
    token: Value, inside: Value, asked: Value, first: Value, bytes_per_row: Value, weight_blocks: Value,
    blocks: Value, planes: tl.constexpr, m: tl.constexpr, n: tl.constexpr,
) -> Value:  # fmt: skip
    """[m, n], two of the eight running sums: of every eighth block from `first` on, and of those behind them."""
    even = tl.zeros((m, n), tl.float32)
    odd = tl.zeros((m, n), tl.float32)
    for block in range(first, blocks, 8):
        even += _products(
            weight, weight_scales, levels, codes, scales, totals, row, token, inside, asked, block, bytes_per_row,
            weight_blocks, blocks, planes,
        )  # fmt: skip
        odd += _products(
            weight, weight_scales, levels, codes, scales, totals, row, token, inside, asked, block + 1, bytes_per_row,
            weight_blocks, blocks, planes,
        )  # fmt: skip
    return even + odd


@program
def multiply_many(
    weight: Value, weight_scales: Value, levels: Value, codes: Value, scales: Value, totals: Value, out: Value,
    tokens: Value, rows: Value, bytes_per_row: Value, weight_blocks: Value, blocks: Value, planes: tl.constexpr,
    m: tl.constexpr, n: tl.constexpr,
) -> None:  # fmt: skip
    """out [T, R] of m tokens and n rows, in matrix units."""
    row = tl.program_id(1).to(tl.int64) * n + tl.arange(0, n)
    token = tl.program_id(0).to(tl.int64) * m + tl.arange(0, m)
    inside, asked = row < rows, token < tokens
    low = _pair(
        weight, weight_scales, levels, codes, scales, totals, row, token, inside, asked, 0, bytes_per_row,
        weight_blocks, blocks, planes, m, n,
    )  # fmt: skip
    low += _pair(
        weight, weight_scales, levels, codes, scales, totals, row, token, inside, asked, 4, bytes_per_row,
        weight_blocks, blocks, planes, m, n,
    )  # fmt: skip
    high = _pair(
        weight, weight_scales, levels, codes, scales, totals, row, token, inside, asked, 2, bytes_per_row,
        weight_blocks, blocks, planes, m, n,
    )  # fmt: skip
    high += _pair(
        weight, weight_scales, levels, codes, scales, totals, row, token, inside, asked, 6, bytes_per_row,
        weight_blocks, blocks, planes, m, n,
    )  # fmt: skip
    result = low + high
    if not planes:
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
