"""Rows as products take them, and sums whose order does not depend on how a kernel is compiled."""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold(values, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """Return the sums [ROWS] of values [ROWS, LENGTH], LENGTH a power of two: neighbours first, then sums of
    neighbours, and so on. `tl.sum` adds in the order of the threads, which differs from kernel to kernel.
    """
    LEVELS: tl.constexpr = LENGTH.bit_length() - 1
    for level in tl.static_range(LEVELS):
        left, right = tl.split(tl.reshape(values, (ROWS, LENGTH >> (level + 1), 2)))
        values = left + right
    return tl.reshape(values, (ROWS,))


@triton.jit
def row_scale(squares, row, width, eps, ROWS: tl.constexpr, SQUARES: tl.constexpr):
    """Return 1 / sqrt(mean(x^2) + eps) of rows [ROWS] whose squares are summed per 64 columns, SQUARES sums
    at most.
    """
    block = tl.arange(0, SQUARES)[None, :]
    count = (width + 63) // 64
    parts = tl.load(squares + row[:, None] * count + block, mask=block < count, other=0.0)
    return 1.0 / tl.sqrt(fold(parts, ROWS, SQUARES) / width + eps)


@triton.jit
def columns_of(
    x_row, row_scales, norm_weight, k, inside, in_weight, NORMED: tl.constexpr, H: tl.constexpr,
    TO: tl.constexpr,
):  # fmt: skip
    """Return columns k [W, 1] of the rows, [W, rows], those `inside` (None: all); normed as `fused.norm`
    does, where asked for.
    """
    values = tl.load(x_row[None, :] + k, mask=inside, other=None if inside is None else 0.0)
    if NORMED:
        weights = tl.load(norm_weight + k, mask=in_weight, other=None if in_weight is None else 0.0)
        values = (values * row_scales[None, :] * weights).to(H)
    return values.to(TO)
