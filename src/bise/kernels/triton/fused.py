"""Row-wise kernels: rows of the embedding table, norms of many rows, sums over experts, the plain gate."""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAssignmentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bise.kernels.panels import TILE_COLUMNS
from bise.kernels.triton import EXACT
from bise.kernels.triton.fold import fold, row_scale
from bise.kernels.triton.four_bits import code_of, scale_of
from bise.kernels.triton.matmul import Normed
from bise.kernels.triton.tiles import Tiles

_PIECE = 1024
"""Columns of a program of the kernels that go through rows in pieces."""


@triton.jit
def _embed(
    token_ids, codes, scale, minimum, level_table, out, squares, width, steps, tiles,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, HAS_MIN: tl.constexpr,
    CODEBOOK: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Program (row, 64 columns): out = a piece of a token's row; squares = the sum of its squares."""
    row = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1)
    token = tl.load(token_ids + row).to(tl.int64)
    inner = token % 64
    column = tl.arange(0, 64)
    tile = token // 64 * tiles + (step // 4 if BITS == 4 else step)
    if BITS == 4:
        place = step % 4 * 64 + column
        raw = code_of(codes + (tile * 64 + inner) * 32, place)
        stride: tl.constexpr = 8 if SCALES == 2 else 4
        factor, less = scale_of(scale + (tile * 64 + inner) * stride, place, SCALES)
    elif BITS == 8:
        raw = tl.load(codes + tile * 4096 + column // GROUP * 64 * GROUP + inner * GROUP + column % GROUP)
        at = (tile * (64 // GROUP) + column // GROUP) * 64 + inner
        factor = tl.load(scale + at).to(tl.float32)
        less = tl.load(minimum + at).to(tl.float32) if HAS_MIN else factor
    else:
        raw = tl.load(codes + tile * 4096 + inner * 64 + column)
    if BITS:
        value = (
            tl.load(level_table + raw.to(tl.int32)).to(tl.float32)
            if CODEBOOK
            else (raw.to(tl.int32) - ZERO).to(tl.float32)
        )
        value = value * factor
        if HAS_MIN:
            value = value - less
    else:
        value = raw.to(tl.float32)
    place = step * 64 + column
    value = tl.where(place < width, value, 0.0)
    tl.store(out + row * width + place, value, mask=place < width)
    sums = fold(tl.reshape(value * value, (1, 64)), 1, 64)
    tl.store(squares + row * steps + step + tl.arange(0, 1), sums)


@triton.jit
def _add_rows(x, y, squares, width, y_stride, HAS_Y: tl.constexpr):
    """Program (row, 64 columns): x += y; squares = the sum of the squares of the sum."""
    row = tl.program_id(0).to(tl.int64)
    step = tl.program_id(1)
    column = step * 64 + tl.arange(0, 64)
    value = tl.load(x + row * width + column, mask=column < width, other=0.0)
    if HAS_Y:
        value += tl.load(y + row * y_stride + column, mask=column < width, other=0.0)
        tl.store(x + row * width + column, value, mask=column < width)
    sums = fold(tl.reshape(value * value, (1, 64)), 1, 64)
    tl.store(squares + row * tl.num_programs(1) + step + tl.arange(0, 1), sums)


@triton.jit
def _norm(x, squares, weight, out, width, eps, SQUARES: tl.constexpr, WIDTH: tl.constexpr):
    """Program (row): out = x / sqrt(mean(x^2) + eps) * weight."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0)
    scale = tl.sum(row_scale(squares, row + tl.arange(0, 1), width, eps, 1, SQUARES), 0)  # of one number
    weights = tl.load(weight + column, mask=inside, other=0.0)
    tl.store(out + row * width + column, (values * scale * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(left, right, out, width, left_stride, right_stride, BLOCK: tl.constexpr):
    """Program (row, piece): out = silu(left) * right."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(left + row * left_stride + column, mask=inside, other=0.0)
    up = tl.load(right + row * right_stride + column, mask=inside, other=0.0)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _mix(parts, shares, out, width, parts_stride, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program (row, piece): out = the sum over ranks of share x part, best expert first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in tl.static_range(TOP_K):
        slot = row * TOP_K + rank
        total += tl.load(shares + slot) * tl.load(
            parts + slot * parts_stride + column, mask=inside, other=0.0
        )
    tl.store(out + row * width + column, total, mask=inside)


def embed(table: Tiles, token_ids: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [T, E] of the table in float32, and the sums of their squares per 64 columns; `levels` are
    the values of a codebook.
    """
    width, device = table.num_columns, table.codes.device
    rows, steps = len(token_ids), -(-width // TILE_COLUMNS)
    out = torch.empty((rows, width), dtype=torch.float32, device=device)
    squares = torch.empty((rows, steps), dtype=torch.float32, device=device)
    _embed[(rows, steps)](
        token_ids,
        table.codes,
        out if table.scale is None else table.scale,
        out if table.minimum is None else table.minimum,
        levels,
        out,
        squares,
        width,
        steps,
        table.steps,
        BITS=table.bits,
        GROUP=table.group,
        ZERO=table.zero,
        HAS_MIN=table.has_minimum,
        CODEBOOK=table.codebook,
        SCALES=int(table.scales),
        num_warps=2,
        **EXACT,
    )
    return out, squares


def add_rows(x: Tensor, y: Tensor | None) -> Tensor:
    """Add y to x [T, E] in place (both float32); return the sums of the squares per 64 columns."""
    rows, width = x.shape
    steps = -(-width // 64)
    squares = torch.empty((rows, steps), dtype=torch.float32, device=x.device)
    stride = 0 if y is None else y.stride(0)
    _add_rows[(rows, steps)](
        x, x if y is None else y, squares, width, stride, HAS_Y=y is not None, num_warps=2, **EXACT
    )
    return squares


def norm(x: Normed, dtype: torch.dtype) -> Tensor:
    """Return the normed rows [T, E] in `dtype`: what products of a `Normed` form by themselves."""
    rows, width = x.values.shape
    out = torch.empty((rows, width), dtype=dtype, device=x.values.device)
    squares = triton.next_power_of_2(x.squares.shape[1])
    _norm[(rows,)](
        x.values,
        x.squares,
        x.weight,
        out,
        width,
        x.eps,
        SQUARES=squares,
        WIDTH=triton.next_power_of_2(width),
        **EXACT,
    )
    return out


def gate(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return silu(left) * right [T, F] in `dtype` of float32 [T, F] each."""
    rows, width = left.shape
    out = torch.empty((rows, width), dtype=dtype, device=left.device)
    grid = (rows, -(-width // _PIECE))
    _gate[grid](left, right, out, width, left.stride(0), right.stride(0), BLOCK=_PIECE, **EXACT)
    return out


def mix(parts: Tensor, shares: Tensor) -> Tensor:
    """Return the sum [T, E] over ranks of shares [T, top_k] times parts [T * top_k, E], best first."""
    rows, top_k = shares.shape
    width = parts.shape[1]
    out = torch.empty((rows, width), dtype=torch.float32, device=parts.device)
    _mix[(rows, -(-width // _PIECE))](
        parts, shares, out, width, parts.stride(0), TOP_K=top_k, BLOCK=_PIECE, **EXACT
    )
    return out
