"""Matrix products with weights of 4, 8, 16 or 32 bits: one kernel for one row, for a prompt and for experts.

The same bits for a row whatever the other rows are (docs/gpu.md):

- codes minus their zero point are exact in the compute type, products of 16 columns go through `tl.dot`,
  and the scale is applied once per group in float32: weights are never rounded;
- the columns are summed in 32-column steps, ascending, inside of `num_splits` ranges that depend on the
  shape alone; the ranges are added in order, by this kernel when rows are many, by `_add_splits` when they
  are few.
"""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bise.kernels.dequant import IQ4_VALUES
from bise.kernels.triton import EXACT
from bise.kernels.triton.tiles import Tiles

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
"""Triton's name of each compute type."""

FEW_ROWS = 16
"""Up to this many rows, splits run side by side: the weights are read once and there is little else to do."""
_MANY_ROWS = 64
"""Rows of one program otherwise."""


@triton.jit
def _pieces(
    codes, tile, level_table, BITS: tl.constexpr, ZERO: tl.constexpr, CODEBOOK: tl.constexpr, TO: tl.constexpr
):
    """Return the levels of columns 0..15 and 16..31 of a tile, [64, 16] each."""
    row = tl.arange(0, 64)[:, None]
    column = tl.arange(0, 16)[None, :]
    if BITS == 4:
        pairs = tl.load(codes + tile * 1024 + row * 16 + column)
        low = (pairs & 15).to(tl.int32)
        high = (pairs >> 4).to(tl.int32)
    else:
        at = codes + tile * 2048 + row * 32 + column
        low = tl.load(at)
        high = tl.load(at + 16)
        if BITS == 8:
            low = low.to(tl.int32)
            high = high.to(tl.int32)
    if CODEBOOK:
        return tl.load(level_table + low).to(TO), tl.load(level_table + high).to(TO)
    if BITS:
        return (low - ZERO).to(TO), (high - ZERO).to(TO)
    return low.to(TO), high.to(TO)


@triton.jit
def _add_tile(
    acc, w0, w1, x0, x1, scale, minimum, tile, BITS: tl.constexpr, GROUP: tl.constexpr, HAS_MIN: tl.constexpr
):
    """Add the products of a tile's levels, columns 0..15 and 16..31, to acc [64, rows]."""
    row = tl.arange(0, 64)
    if BITS == 0:
        acc = tl.dot(w0, x0, acc, input_precision="ieee")
        return tl.dot(w1, x1, acc, input_precision="ieee")
    ones = tl.full((64, 16), 1.0, w0.dtype)
    if GROUP == 32:
        inner = tl.dot(w0, x0, input_precision="ieee")
        inner = tl.dot(w1, x1, inner, input_precision="ieee")
        acc += inner * tl.load(scale + tile * 64 + row).to(tl.float32)[:, None]
        if HAS_MIN:
            sums = tl.dot(ones, x0, input_precision="ieee")
            sums = tl.dot(ones, x1, sums, input_precision="ieee")
            acc -= sums * tl.load(minimum + tile * 64 + row).to(tl.float32)[:, None]
        return acc
    at = scale + tile * 128 + row
    acc += tl.dot(w0, x0, input_precision="ieee") * tl.load(at).to(tl.float32)[:, None]
    acc += tl.dot(w1, x1, input_precision="ieee") * tl.load(at + 64).to(tl.float32)[:, None]
    if HAS_MIN:
        at = minimum + tile * 128 + row
        acc -= tl.dot(ones, x0, input_precision="ieee") * tl.load(at).to(tl.float32)[:, None]
        acc -= tl.dot(ones, x1, input_precision="ieee") * tl.load(at + 64).to(tl.float32)[:, None]
    return acc


@triton.jit
def _matmul(
    x, codes, scale, minimum, level_table, out, slots, experts, num_slots, num_rows, num_columns, x_stride,
    slots_per_row, tiles_per_split,
    NUM_SPLITS: tl.constexpr, SPLIT_APART: tl.constexpr, SORTED: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, HAS_MIN: tl.constexpr, CODEBOOK: tl.constexpr,
    ROWS: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """out[split, slot, n] = sum over columns of x[slot / slots_per_row, k] x weight[expert, n, k]."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    inside = part * ROWS + tl.arange(0, ROWS)
    if SORTED:
        slot = tl.load(slots + inside)
        expert = tl.load(experts + part)
        valid = slot >= 0
    else:
        slot = inside
        expert = 0
        valid = slot < num_slots
    x_row = x + (tl.where(valid, slot, 0) // slots_per_row).to(tl.int64) * x_stride
    num_tiles = (num_columns + 31) // 32
    blocks = (num_rows + 63) // 64
    first_tile = (expert.to(tl.int64) if SORTED else tl.zeros((), tl.int64)) * blocks + block
    first_tile = first_tile * num_tiles
    column = tl.arange(0, 16)[:, None]
    total = tl.zeros((64, ROWS), tl.float32)
    split_low = tl.program_id(2) if SPLIT_APART else 0
    split_high = split_low + 1 if SPLIT_APART else NUM_SPLITS
    for split in range(split_low, split_high):
        acc = tl.zeros((64, ROWS), tl.float32)
        for index in range(split * tiles_per_split, min((split + 1) * tiles_per_split, num_tiles)):
            tile = first_tile + index
            k = index * 32 + column
            x0 = tl.load(x_row[None, :] + k, mask=valid[None, :] & (k < num_columns), other=0.0).to(TO)
            more = valid[None, :] & (k + 16 < num_columns)
            x1 = tl.load(x_row[None, :] + k + 16, mask=more, other=0.0).to(TO)
            w0, w1 = _pieces(codes, tile, level_table, BITS, ZERO, CODEBOOK, TO)
            acc = _add_tile(acc, w0, w1, x0, x1, scale, minimum, tile, BITS, GROUP, HAS_MIN)
        total += acc
    n = block * 64 + tl.arange(0, 64)[:, None]
    to = out + tl.where(valid, slot, 0).to(tl.int64)[None, :] * num_rows + n
    if SPLIT_APART:
        to += split_low.to(tl.int64) * num_slots * num_rows
    tl.store(to, total, mask=valid[None, :] & (n < num_rows))


@triton.jit
def _add_splits(parts, out, size, NUM_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i] = parts[0, i] + parts[1, i] + ..., in that order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(NUM_SPLITS):
        total += tl.load(parts + split * size + at, mask=at < size, other=0.0)
    tl.store(out + at, total, mask=at < size)


class Matmul:
    """Launches the kernel for one compute type on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._to = TYPES[dtype]
        self._levels = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device)

    def __call__(
        self,
        x: Tensor,
        weight: Tiles,
        num_slots: int,
        *,
        slots_per_row: int = 1,
        slots: Tensor | None = None,
        experts: Tensor | None = None,
        rows: int | None = None,
    ) -> Tensor:
        """Return products [num_slots, N] in float32; slot s takes row s / slots_per_row of x [T, K].

        With `slots` [P x rows] and `experts` [P] program p computes the slots slots[p x rows ...] (-1: none)
        with the matrix of expert experts[p].
        """
        num_rows, num_columns = weight.shape
        splits = weight.num_splits
        rows = rows or (FEW_ROWS if num_slots <= FEW_ROWS else _MANY_ROWS)
        parts = -(-num_slots // rows) if experts is None else len(experts)
        apart = splits > 1 and rows == FEW_ROWS
        out = torch.empty((splits if apart else 1, num_slots, num_rows), dtype=torch.float32, device=x.device)
        assert x.stride(1) == 1
        # A float32 weight (the router) is multiplied in float32 whatever the compute type.
        to = tl.float32 if weight.codes.dtype == torch.float32 else self._to
        dummy = self._levels
        grid = (-(-num_rows // 64), parts, splits if apart else 1)
        _matmul[grid](
            x,
            weight.codes,
            dummy if weight.scale is None else weight.scale,
            dummy if weight.minimum is None else weight.minimum,
            self._levels,
            out,
            dummy if slots is None else slots,
            dummy if experts is None else experts,
            num_slots,
            num_rows,
            num_columns,
            x.stride(0),
            slots_per_row,
            triton.cdiv(triton.cdiv(num_columns, 32), splits),
            NUM_SPLITS=splits,
            SPLIT_APART=apart,
            SORTED=experts is not None,
            BITS=weight.bits,
            GROUP=weight.group,
            ZERO=weight.zero,
            HAS_MIN=weight.minimum is not None,
            CODEBOOK=weight.codebook,
            ROWS=rows,
            TO=to,
            **EXACT,
        )
        if not apart:
            return out[0]
        total = torch.empty_like(out[0])
        block = 1024
        _add_splits[(-(-total.numel() // block),)](
            out, total, total.numel(), NUM_SPLITS=splits, BLOCK=block, **EXACT
        )
        return total
