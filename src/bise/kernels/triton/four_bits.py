"""4-bit weights in the matrix kernel: 256 columns a step, levels formed two at a time, scales decoded there.

A code q becomes q / 8 without a conversion: in the lowest bits of a 16-bit number it is a tiny one, and one
multiplication by a power of two, which adds the zero point on the way, makes the level:

    level = q / 8 + zero        (z4: (8q + z - 128) / 64, eight bits; exact in every type)

A group of columns goes through `tl.dot` with its levels, and its sum is added times eight scales, in float32:
weights are never rounded. So for several rows, side by side, and for one, whose groups stand side by side.
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
    """For each of two groups 16 bits: zero point of 7 bits, scale of 7, and 2 bits of the half above them: of
    its low byte those of the first groups, of its high byte those of the second ones. See `tiles.py`."""
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
def _low(words, TO: tl.constexpr):
    """Return the numbers whose 16 bits are the low ones of words."""
    return words.to(tl.uint16).to(TO, bitcast=True)


@triton.jit
def _levels(words, zero, level_table, P: tl.constexpr, CODEBOOK: tl.constexpr, TO: tl.constexpr):
    """Return levels [M, 2 W] of the P-th codes of both halves of words [M, W], whose zero points are [M, 1]:
    neighbours in a row come from one word.
    """
    if CODEBOOK:
        second = tl.load(level_table + ((words >> (16 + 4 * P)) & 15)).to(TO)
        first = tl.load(level_table + ((words >> (4 * P)) & 15)).to(TO)
    elif tl.float32 == TO:
        second = _number((words >> (16 + 4 * P)) & 15) * 0.125 + zero
        first = _number((words >> (4 * P)) & 15) * 0.125 + zero
    else:
        # The bits of a code as those of a 16-bit float: q / 8 times the smallest number over `UNIT`.
        PLACE: tl.constexpr = 3 if tl.bfloat16 == TO else 6
        MASK: tl.constexpr = 0x00780078 if tl.bfloat16 == TO else 0x03C003C0
        UNIT: tl.constexpr = 2.0**127 if tl.bfloat16 == TO else 2.0**15
        both = words << (PLACE - 4 * P) if PLACE > 4 * P else words >> (4 * P - PLACE)
        both = both & MASK
        unit = tl.full(both.shape, UNIT, TO)
        zeros = tl.broadcast_to(zero, both.shape)
        # In this order the assembler takes both halves of a word by one instruction, without swapping them.
        second = tl.fma(_low(both >> 16, TO), unit, zeros)
        first = tl.fma(_low(both, TO), unit, zeros)
    return tl.reshape(tl.join(first, second), (words.shape[0], 2 * words.shape[1]))


@triton.jit
def _zeros(words, SCALES: tl.constexpr, ZERO: tl.constexpr, TO: tl.constexpr):
    """Return what is added to q / 8 to make a level, of the even and the odd group of the words at `words`
    [M].
    """
    if SCALES != 3:
        even = tl.full(words.shape, -ZERO / 8, TO)
        odd = even
    elif tl.float32 == TO:
        word = tl.load(words)
        even = _number(word & 127) / 64 - 2.0
        odd = _number((word >> 16) & 127) / 64 - 2.0
    else:
        fields = tl.load(words) & 0x007F007F
        # Taken off the bits of -4, in both halves at once: -4 + z / 64.
        both = -0x3F7F3F80 - fields if tl.bfloat16 == TO else -0x3BFF3C00 - (fields << 3)
        two = tl.full(words.shape, 2.0, TO)
        odd = _low(both >> 16, TO) + two
        even = _low(both, TO) + two
    return even, odd


@triton.jit
def _scale(word, top, low_top, ODD: tl.constexpr, SCALES: tl.constexpr, CODEBOOK: tl.constexpr):
    """Return what multiplies a level, and the minimum, of the even or the odd group of words [M]."""
    minimum = top
    if SCALES == 1:
        scale = _half(word >> (16 * ODD))
    elif SCALES == 2:
        scale = _half(word)
        minimum = _half(word >> 16)
    elif SCALES == 3:
        # As bits of the mantissa of 128; products of 8 bits and a half are exact.
        field = ((word >> 7 if ODD else word << 9) & 0x007F0000) | 0x43000000
        unit = top * 0.0078125
        scale = tl.fma(field.to(tl.float32, bitcast=True), unit, unit * -128.0)
    elif SCALES == 4:
        scale = top * _number((word >> (12 * ODD)) & 63)
        minimum = low_top * _number((word >> (12 * ODD + 6)) & 63)
    else:
        scale = top * (_number(((word >> (8 * ODD)) & 255) ^ 128) - 128.0)
    return scale if CODEBOOK else scale * 8.0, minimum


@triton.jit
def _tops(words, SCALES: tl.constexpr):
    """Return what the groups of rows share, whose four words each lie at `words` [M]: the half above their
    scales, and that above their minimums.
    """
    first, second = tl.load(words), tl.load(words + 1)
    third, fourth = tl.load(words + 2), tl.load(words + 3)
    low_top = first
    if SCALES == 4:
        top = _half(((first >> 24) & 255) | ((second >> 16) & 65280))
        low_top = _half(((third >> 24) & 255) | ((fourth >> 16) & 65280))
    elif SCALES == 3:
        bits = ((first >> 14) & 0x00030003) | ((second >> 12) & 0x000C000C)
        bits = bits | ((third >> 10) & 0x00300030) | ((fourth >> 8) & 0x00C000C0)
        top = _half((bits & 255) | ((bits >> 8) & 0xFF00))
    else:
        bits = ((first >> 28) & 15) | ((second >> 24) & 240)
        top = _half(bits | ((third >> 20) & 3840) | ((fourth >> 16) & 61440))
    return top, low_top


@triton.jit
def _eight(values):
    """Return the columns of values [M, 8], or every second one of [M, 16], as eight of [M]."""
    if values.shape[1] == 16:
        values, _ = tl.split(tl.reshape(values, (values.shape[0], 8, 2)))
    even, odd = tl.split(tl.reshape(values, (values.shape[0], 4, 2)))
    even, even2 = tl.split(tl.reshape(even, (values.shape[0], 2, 2)))
    odd, odd2 = tl.split(tl.reshape(odd, (values.shape[0], 2, 2)))
    first, fifth = tl.split(even)
    second, sixth = tl.split(odd)
    third, seventh = tl.split(even2)
    fourth, eighth = tl.split(odd2)
    return first, second, third, fourth, fifth, sixth, seventh, eighth


@triton.jit
def _add_group(
    acc, dots, sums, words, top, low_top, GROUP: tl.constexpr, SCALES: tl.constexpr, CODEBOOK: tl.constexpr,
):  # fmt: skip
    """Add a group's products [M, rows] of levels, times their scale, to acc; less its sums times the
    minimum.
    """
    word = tl.load(words + (GROUP if SCALES == 2 else GROUP // 2))
    scale, minimum = _scale(word, top, low_top, GROUP % 2, SCALES, CODEBOOK)
    acc = tl.fma(dots, tl.broadcast_to(scale[:, None], dots.shape), acc)
    if SCALES == 2 or SCALES == 4:
        acc = tl.fma(sums, tl.broadcast_to(-minimum[:, None], dots.shape), acc)
    return acc


@triton.jit
def add_step(
    acc, x_row, row_scales, norm_weight, codes, words, level_table, k0, valid, num_columns,
    ROWS: tl.constexpr, NORMED: tl.constexpr, SCALES: tl.constexpr, ZERO: tl.constexpr,
    CODEBOOK: tl.constexpr, EVEN: tl.constexpr, LEAST: tl.constexpr, H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Add the products of 256 columns to acc [M, ROWS]; `codes` and `words` [M] are where the words of each
    output lie.

    The groups of one row stand side by side, in LEAST columns of products whose other elements are zero: they
    add up in place.
    """
    HAS_MIN: tl.constexpr = SCALES == 2 or SCALES == 4
    WIDTH: tl.constexpr = LEAST if ROWS == 1 else ROWS
    M: tl.constexpr = codes.shape[0]
    at = codes[:, None] + tl.arange(0, 16)[None, :]
    even, odd = tl.load(at), tl.load(at + 16)
    top, low_top = tl.zeros((M,), tl.float32), tl.zeros((M,), tl.float32)
    if SCALES > 2:
        top, low_top = _tops(words, SCALES)
    column = tl.arange(0, WIDTH)[None, :]
    ones = tl.full((M, 32), 1.0, TO)
    dots = tl.zeros((M, WIDTH), tl.float32)
    sums = dots
    for group in tl.static_range(8):
        k = k0 + 32 * group + tl.arange(0, 32)[:, None]
        in_weight = None if EVEN else k < num_columns
        inside = in_weight
        if ROWS == 1:
            inside = valid[None, :] & (column == group * (WIDTH // 8))
            if not EVEN:
                inside = inside & in_weight
            k = k + 0 * column
        x = columns_of(x_row, row_scales, norm_weight, k, inside, in_weight, NORMED, H, TO)
        zero, zero_odd = _zeros(words + group // 2, SCALES, ZERO, TO)
        if group % 2:
            levels = _levels(odd, zero_odd[:, None], level_table, group // 2, CODEBOOK, TO)
        else:
            levels = _levels(even, zero[:, None], level_table, group // 2, CODEBOOK, TO)
        if ROWS == 1:
            dots = tl.dot(levels, x, dots, input_precision="ieee")
            if HAS_MIN:
                sums = tl.dot(ones, x, sums, input_precision="ieee")
        else:
            dots = tl.dot(levels, x, input_precision="ieee")
            if HAS_MIN:
                sums = tl.dot(ones, x, input_precision="ieee")
            acc = _add_group(acc, dots, sums, words, top, low_top, group, SCALES, CODEBOOK)
    if ROWS == 1:
        each = _eight(dots)
        sum_of = _eight(sums)
        for group in tl.static_range(8):
            mine, its_sum = each[group][:, None], sum_of[group][:, None]
            acc = _add_group(acc, mine, its_sum, words, top, low_top, group, SCALES, CODEBOOK)
    return acc


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
    top, low_top = _tops(words, SCALES)
    if SCALES == 3:
        unit = top * 0.0009765625 * _number((word >> (16 * odd + 7)) & 127)
        return 8.0 * unit, unit * (128.0 - _number((word >> (16 * odd)) & 127))
    if SCALES == 4:
        return top * _number((word >> (12 * odd)) & 63), low_top * _number((word >> (12 * odd + 6)) & 63)
    scale = top * (_number(((word >> (8 * odd)) & 255) ^ 128) - 128.0)
    return scale, scale
