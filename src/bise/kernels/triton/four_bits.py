"""4-bit weights in the matrix kernel: 256 columns a step, levels formed two at a time, scales decoded there.

A code q becomes `BASE` + 8q without a conversion: its bits are those of the mantissa of 128, in 16 bits two
of them at once. What the base and the zero point of a group of columns add to a product is the same for every
column, so it is the sum of the group's x times `lift`, whatever the row of the weight:

    sum of x (8q + z) = dot(x, BASE + 8q) + (z - BASE) sum(x)

Both sums go through `tl.dot`. A group's sum is scaled, and the groups are added one after the other: whether
the rows of x stand side by side, or one row alone has its groups side by side.
"""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAssignmentType=false
from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl

from bise.kernels.triton.fold import columns_of


class Scales(IntEnum):
    """How the words of a row hold the scales of 256 columns."""

    NONE = 0
    """There are no words: floats, and 8-bit codes, whose scales are numbers."""
    HALVES = 1
    """Two groups' scales, a half each."""
    PAIRS = 2
    """One group's scale and minimum."""
    U7 = 3
    U6 = 4
    S8 = 5
    """See `bise.kernels.grouped.Grouped.nested`."""


@triton.jit
def _half(bits):
    """Return numbers whose low 16 bits are a float16, in float32."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _number(field):
    """Return integers below 2^23 as float32: the low bits of 2^23; a conversion takes four times as long."""
    return (field | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _levels(words, level_table, P: tl.constexpr, CODEBOOK: tl.constexpr, TO: tl.constexpr):
    """Return levels [64, 2 W] of the P-th codes of both halves of words [64, W]: `BASE` + 8q, or those of the
    codebook. Neighbours in a row come from one word.
    """
    if CODEBOOK:
        first = tl.load(level_table + ((words >> (4 * P)) & 15)).to(TO)
        second = tl.load(level_table + ((words >> (16 + 4 * P)) & 15)).to(TO)
    elif tl.float32 == TO:
        first = _number((words >> (4 * P)) & 15) * 8.0 - 64.0
        second = _number((words >> (16 + 4 * P)) & 15) * 8.0 - 64.0
    else:
        PLACE: tl.constexpr = 3 if tl.bfloat16 == TO else 6
        both = words << (PLACE - 4 * P) if PLACE > 4 * P else words >> (4 * P - PLACE)
        if tl.bfloat16 == TO:
            both = (both & 0x00780078) | 0x43004300
        else:
            both = (both & 0x03C003C0) | 0x58005800
        first = both.to(tl.uint16)
        second = (both >> 16).to(tl.uint16)
    joined = tl.reshape(tl.join(first, second), (64, 2 * words.shape[1]))
    return joined if CODEBOOK or tl.float32 == TO else joined.to(TO, bitcast=True)


@triton.jit
def _fields(word, top, low_top, ODD: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr,
            CODEBOOK: tl.constexpr, BASE: tl.constexpr):  # fmt: skip
    """Return what multiplies BASE + 8q (or a level of the codebook), the lift, and the minimum of the even or
    the odd group of words.
    """
    lift = tl.full(word.shape, -BASE - 8 * ZERO, tl.float32)
    minimum = lift
    if SCALES == 1:
        scale = _half(word >> (16 * ODD))
    elif SCALES == 2:
        scale = _half(word)
        minimum = _half(word >> 16)
    elif SCALES == 3:
        scale = top * _number((word >> (14 * ODD)) & 127)
        lift = _number((word >> (14 * ODD + 7)) & 127) - (128 + BASE)
    elif SCALES == 4:
        scale = top * _number((word >> (12 * ODD)) & 63)
        minimum = low_top * _number((word >> (12 * ODD + 6)) & 63)
    else:
        scale = top * (_number(((word >> (8 * ODD)) & 255) ^ 128) - 128.0)
    return scale if CODEBOOK or SCALES == 3 else scale * 0.125, lift, minimum


@triton.jit
def _tops(first, second, third, fourth, SCALES: tl.constexpr):
    """Return what the groups of a row's four words share: the scale above their scales, and the minimum."""
    top = first
    low_top = first
    if SCALES == 3 or SCALES == 5:
        bits = (
            ((first >> 28) & 15) | ((second >> 24) & 240) | ((third >> 20) & 3840) | ((fourth >> 16) & 61440)
        )
        top = _half(bits)
    elif SCALES == 4:
        top = _half(((first >> 24) & 255) | ((second >> 16) & 65280))
        low_top = _half(((third >> 24) & 255) | ((fourth >> 16) & 65280))
    return top / 1024.0 if SCALES == 3 else top, low_top


@triton.jit
def _side_by_side(word, SCALES: tl.constexpr):
    """As `_tops`, of the words [64, 4] of each row."""
    place = tl.arange(0, 4)[None, :]
    top = tl.zeros((64,), tl.float32)
    low_top = top
    if SCALES == 3 or SCALES == 5:
        top = _half(tl.sum(((word >> 28) & 15) << (4 * place), 1))
    elif SCALES == 4:
        byte = ((word >> 24) & 255) << (8 * (place % 2))
        top = _half(tl.sum(tl.where(place < 2, byte, 0), 1))
        low_top = _half(tl.sum(tl.where(place < 2, 0, byte), 1))
    return (top / 1024.0 if SCALES == 3 else top)[:, None], low_top[:, None]


@triton.jit
def _group(
    codes, x, sums, word, top, low_top, level_table, GROUP: tl.constexpr, SCALES: tl.constexpr,
    ZERO: tl.constexpr, CODEBOOK: tl.constexpr, BASE: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Return the products [64, rows] of one of eight groups: codes [64, 16], x [32, rows] and its sums."""
    dots = tl.dot(_levels(codes, level_table, GROUP // 2, CODEBOOK, TO), x, input_precision="ieee")
    scale, lift, minimum = _fields(word, top, low_top, GROUP % 2, SCALES, ZERO, CODEBOOK, BASE)
    if not CODEBOOK:
        dots = tl.fma(sums, tl.broadcast_to(lift[:, None], dots.shape), dots)
    dots = dots * scale[:, None]
    if SCALES == 2 or SCALES == 4:
        dots -= sums * minimum[:, None]
    return dots


@triton.jit
def add_rows_step(
    acc, acc2, x_row, row_scales, norm_weight, codes, words, codes2, words2, level_table, k0, valid,
    num_columns, TWO: tl.constexpr, NORMED: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr, H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Add the products of 256 columns of a block, or two, and several rows to acc [64, rows]."""
    BASE: tl.constexpr = -64 if tl.float32 == TO else 128
    row = tl.arange(0, 64)
    at = row[:, None] * 32 + tl.arange(0, 16)[None, :]
    even, odd = tl.load(codes + at), tl.load(codes + at + 16)
    even2, odd2 = even, odd
    line = words + row * 4
    top, low_top = row, row
    if SCALES > 2:
        top, low_top = _tops(tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3), SCALES)
    top2, low_top2 = top, low_top
    if TWO:
        even2, odd2 = tl.load(codes2 + at), tl.load(codes2 + at + 16)
        line = words2 + row * 4
        if SCALES > 2:
            top2, low_top2 = _tops(
                tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3), SCALES
            )
    ones = tl.full((64, 32), 1.0, TO)
    STRIDE: tl.constexpr = 8 if SCALES == 2 else 4
    for group in tl.static_range(8):
        k = k0 + 32 * group + tl.arange(0, 32)[:, None]
        inside = k < num_columns
        x = columns_of(x_row, row_scales, norm_weight, k, valid[None, :] & inside, inside, NORMED, H, TO)
        sums = tl.zeros((64, x.shape[1]), tl.float32)
        if not CODEBOOK:
            sums = tl.dot(ones, x, input_precision="ieee")
        at = row * STRIDE + (group if SCALES == 2 else group // 2)
        acc += _group(
            odd if group % 2 else even, x, sums, tl.load(words + at), top, low_top, level_table, group,
            SCALES, ZERO, CODEBOOK, BASE, TO,
        )  # fmt: skip
        if TWO:
            acc2 += _group(
                odd2 if group % 2 else even2, x, sums, tl.load(words2 + at), top2, low_top2, level_table,
                group, SCALES, ZERO, CODEBOOK, BASE, TO,
            )  # fmt: skip
    return acc, acc2


@triton.jit
def _add_groups(
    acc, dots, sums, words, SCALES: tl.constexpr, ZERO: tl.constexpr, CODEBOOK: tl.constexpr,
    BASE: tl.constexpr,
):  # fmt: skip
    """Add the product of 256 columns to acc [64, 1], from dot products and sums [64, 8] of their groups."""
    row = tl.arange(0, 64)[:, None]
    if SCALES == 2:
        word = tl.load(words + row * 8 + tl.arange(0, 8)[None, :])
        scale, lift, minimum = _fields(word, word, word, 0, SCALES, ZERO, CODEBOOK, BASE)
    else:
        word = tl.load(words + row * 4 + tl.arange(0, 4)[None, :])
        top, low_top = _side_by_side(word, SCALES)
        scale, lift, minimum = _fields(word, top, low_top, 0, SCALES, ZERO, CODEBOOK, BASE)
        scale1, lift1, minimum1 = _fields(word, top, low_top, 1, SCALES, ZERO, CODEBOOK, BASE)
        scale = tl.reshape(tl.join(scale, scale1), (64, 8))
        lift = tl.reshape(tl.join(lift, lift1), (64, 8))
        minimum = tl.reshape(tl.join(minimum, minimum1), (64, 8))
    if not CODEBOOK:
        dots = tl.fma(sums, lift, dots)
    dots = dots * scale
    if SCALES == 2 or SCALES == 4:
        dots -= sums * minimum
    even, odd = tl.split(tl.reshape(dots, (64, 4, 2)))
    even, even2 = tl.split(tl.reshape(even, (64, 2, 2)))
    odd, odd2 = tl.split(tl.reshape(odd, (64, 2, 2)))
    first, fifth = tl.split(even)
    second, sixth = tl.split(odd)
    third, seventh = tl.split(even2)
    fourth, eighth = tl.split(odd2)
    total = tl.reshape(acc, (64,)) + first + second + third + fourth
    return (total + fifth + sixth + seventh + eighth)[:, None]


@triton.jit
def add_row_step(
    acc, acc2, x_row, row_scales, norm_weight, codes, words, codes2, words2, level_table, k0, valid,
    num_columns, TWO: tl.constexpr, NORMED: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr, H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """As `add_rows_step`, for one row: its groups stand side by side, eight columns of one product whose
    other elements are zero. So one product takes 256 columns, and no row is computed that is not there.
    """
    BASE: tl.constexpr = -64 if tl.float32 == TO else 128
    row = tl.arange(0, 64)[:, None]
    group = tl.arange(0, 8)[None, :]
    ones = tl.full((64, 64), 1.0, TO)
    at = row * 32 + tl.arange(0, 32)[None, :]
    pairs = tl.load(codes + at)
    pairs2 = pairs
    if TWO:
        pairs2 = tl.load(codes2 + at)
    dots = tl.zeros((64, 8), tl.float32)
    sums = tl.zeros((64, 8), tl.float32)
    dots2 = tl.zeros((64, 8), tl.float32)
    for p in tl.static_range(4):
        place = 64 * p + tl.arange(0, 64)[:, None]
        inside = k0 + place < num_columns
        mine = valid[None, :] & inside & (place // 32 == group)
        x = columns_of(x_row, row_scales, norm_weight, k0 + place + group * 0, mine, inside, NORMED, H, TO)
        dots = tl.dot(_levels(pairs, level_table, p, CODEBOOK, TO), x, dots, input_precision="ieee")
        if not CODEBOOK:
            sums = tl.dot(ones, x, sums, input_precision="ieee")
        if TWO:
            dots2 = tl.dot(_levels(pairs2, level_table, p, CODEBOOK, TO), x, dots2, input_precision="ieee")
    acc = _add_groups(acc, dots, sums, words, SCALES, ZERO, CODEBOOK, BASE)
    if TWO:
        acc2 = _add_groups(acc2, dots2, sums, words2, SCALES, ZERO, CODEBOOK, BASE)
    return acc, acc2


@triton.jit
def code_of(codes, column):
    """Return the codes of columns [W], below 256, of a row whose 32 words lie at `codes`."""
    word = tl.load(codes + column % 64 // 2)
    return (word >> (column // 64 * 4 + column % 2 * 16)) & 15


@triton.jit
def scale_of(words, column, SCALES: tl.constexpr):
    """Return scale and minimum of columns [W], below 256, of a row whose words lie at `words`: the numbers
    that `Grouped` has.
    """
    odd = column // 32 % 2
    if SCALES == 2:
        word = tl.load(words + column // 32)
        return _half(word), _half(word >> 16)
    word = tl.load(words + column // 64)
    if SCALES == 1:
        scale = _half(word >> (16 * odd))
        return scale, scale
    top, low_top = _tops(tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3), SCALES)
    if SCALES == 3:
        unit = top * _number((word >> (14 * odd)) & 127)
        return 8.0 * unit, unit * (128.0 - _number((word >> (14 * odd + 7)) & 127))
    if SCALES == 4:
        return top * _number((word >> (12 * odd)) & 63), low_top * _number((word >> (12 * odd + 6)) & 63)
    scale = top * (_number(((word >> (8 * odd)) & 255) ^ 128) - 128.0)
    return scale, scale
