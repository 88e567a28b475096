"""The kernel behind `matmul.py`: a matrix product, and what a layer does right before and after it.

One kernel for one row, for a prompt and for experts. Before: the norm of the rows. After: the sum with the
residual stream, the gate of the feed-forward part, or the choice of experts.

The same bits for a row whatever the other rows are (docs/gpu.md):

- levels of codes are exact in the compute type, products of a group of columns go through `tl.dot`, and the
  scale is applied once per group in float32: weights are never rounded (4-bit codes: `four_bits.py`);
- the columns are summed in steps of 64 (4-bit codes: 256), ascending, inside of `num_splits` ranges that
  depend on the shape alone; the ranges are added in order, by one program that computes all of them, or by
  the one of several that arrives last.
"""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl

from bise.kernels.triton.fold import columns_of, fold, row_scale
from bise.kernels.triton.four_bits import add_row_step, add_rows_step


@triton.jit
def _levels(codes, ZERO: tl.constexpr, TO: tl.constexpr):
    """Return what 8-bit codes stand for, before the scale: exact in TO."""
    # As the low bits of 2^23 an integer is a float at once; conversions take four times as long.
    wide = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return (wide - (8388608 + ZERO)).to(TO)


@triton.jit
def _add_piece(acc, w, x, scale, minimum, at, BITS: tl.constexpr, HAS_MIN: tl.constexpr):
    """Add the products of a group of columns, levels w [64, W] and x [W, rows], to acc [64, rows]."""
    if BITS == 0:
        return tl.dot(w, x, acc, input_precision="ieee")
    acc += tl.dot(w, x, input_precision="ieee") * tl.load(scale + at).to(tl.float32)[:, None]
    if HAS_MIN:
        ones = tl.full(w.shape, 1.0, w.dtype)
        acc -= tl.dot(ones, x, input_precision="ieee") * tl.load(minimum + at).to(tl.float32)[:, None]
    return acc


@triton.jit
def _add_tile(
    acc, acc2, x_row, row_scales, norm_weight, codes, scale, minimum, codes2, scale2, minimum2, tile, tile2,
    k0, valid, num_columns,
    TWO: tl.constexpr, NORMED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    HAS_MIN: tl.constexpr, H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Add a tile's products, 64 columns, to acc [64, rows]; with TWO those of a second tile to acc2."""
    PIECES: tl.constexpr = 64 // GROUP
    row = tl.arange(0, 64)[:, None]
    for piece in tl.static_range(PIECES):
        k = k0 + piece * GROUP + tl.arange(0, GROUP)[:, None]
        inside = k < num_columns
        x = columns_of(x_row, row_scales, norm_weight, k, valid[None, :] & inside, inside, NORMED, H, TO)
        at = piece * 64 * GROUP + row * GROUP + tl.arange(0, GROUP)[None, :]
        raw = tl.load(codes + tile * 4096 + at)
        w = _levels(raw, ZERO, TO) if BITS else raw.to(TO)
        scales = (tile * PIECES + piece) * 64 + tl.arange(0, 64)
        acc = _add_piece(acc, w, x, scale, minimum, scales, BITS, HAS_MIN)
        if TWO:
            raw2 = tl.load(codes2 + tile2 * 4096 + at)
            w2 = _levels(raw2, ZERO, TO) if BITS else raw2.to(TO)
            scales2 = (tile2 * PIECES + piece) * 64 + tl.arange(0, 64)
            acc2 = _add_piece(acc2, w2, x, scale2, minimum2, scales2, BITS, HAS_MIN)
    return acc, acc2


@triton.jit
def _add_step(
    acc, acc2, x_row, row_scales, norm_weight, codes, words, codes2, words2, level_table, tile, tile2, k0,
    valid, num_columns,
    TWO: tl.constexpr, NORMED: tl.constexpr, ZERO: tl.constexpr, CODEBOOK: tl.constexpr,
    SCALES: tl.constexpr, ROWS: tl.constexpr, H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """As `_add_tile` with tiles of 256 columns of 4-bit codes."""
    STRIDE: tl.constexpr = 512 if SCALES == 2 else 256
    if ROWS == 1:
        return add_row_step(
            acc, acc2, x_row, row_scales, norm_weight, codes + tile * 2048, words + tile * STRIDE,
            codes2 + tile2 * 2048, words2 + tile2 * STRIDE, level_table, k0, valid, num_columns,
            TWO, NORMED, SCALES, ZERO, CODEBOOK, H, TO,
        )  # fmt: skip
    return add_rows_step(
        acc, acc2, x_row, row_scales, norm_weight, codes + tile * 2048, words + tile * STRIDE,
        codes2 + tile2 * 2048, words2 + tile2 * STRIDE, level_table, k0, valid, num_columns,
        TWO, NORMED, SCALES, ZERO, CODEBOOK, H, TO,
    )  # fmt: skip


@triton.jit
def _route(total, experts_out, shares_out, slot, valid, num_rows, TOP_K: tl.constexpr):
    """Store the best experts of rows of scores [64, rows], ties to the lower one, and their softmax."""
    n = tl.arange(0, 64)[:, None]
    scores = tl.where(n < num_rows, total, float("-inf"))
    best = tl.max(scores, 0)
    weight = tl.zeros(best.shape, tl.float32)
    left = scores
    for _ in tl.static_range(TOP_K):
        highest = tl.max(left, 0)
        weight += tl.exp(highest - best)
        chosen = tl.min(tl.where(left == highest[None, :], n, 64), 0)
        left = tl.where(n == chosen[None, :], float("-inf"), left)
    left = scores
    for rank in tl.static_range(TOP_K):
        highest = tl.max(left, 0)
        chosen = tl.min(tl.where(left == highest[None, :], n, 64), 0)
        left = tl.where(n == chosen[None, :], float("-inf"), left)
        # A row of NaN has no best expert; the engine refuses what becomes of it.
        tl.store(experts_out + slot * TOP_K + rank, tl.minimum(chosen, num_rows - 1), mask=valid)
        tl.store(shares_out + slot * TOP_K + rank, tl.exp(highest - best) / weight, mask=valid)


@triton.jit
def _finish(
    total, total2, block, slot, valid, out, out_stride, residual, squares_out, num_blocks, num_rows,
    experts_out, shares_out,
    AFTER: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Do with the product of a block [64, rows] what comes after it."""
    n = block * 64 + tl.arange(0, 64)[:, None]
    line = tl.where(valid, slot, 0).to(tl.int64)[None, :]
    if AFTER == 4:
        _route(total, experts_out, shares_out, tl.where(valid, slot, 0), valid, num_rows, TOP_K)
    elif AFTER == 2 or AFTER == 3:
        inside = valid[None, :] & (n < num_rows)
        at = residual + line * num_rows + n
        value = tl.load(at, mask=inside, other=0.0) + total
        tl.store(at, value, mask=inside)
        squares = fold(tl.trans(tl.where(inside, value * value, 0.0)), ROWS, 64)
        tl.store(squares_out + tl.where(valid, slot, 0) * num_blocks + block, squares, mask=valid)
    else:
        if AFTER == 1:
            total = total / (1.0 + tl.exp(-total)) * total2
        tl.store(out + line * out_stride + n, total.to(out.dtype.element_ty), mask=valid[None, :])


@triton.jit
def _arrive(
    total, total2, block, slot, valid, out, parts, arrived, residual, squares_out, experts, shares,
    num_slots, num_rows, num_blocks, out_stride,
    NUM_SPLITS: tl.constexpr, AFTER: tl.constexpr, TWO: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Leave a range's sums in `parts`; who arrives last adds them all, in order, and finishes the block."""
    width = num_blocks * 64
    n = block * 64 + tl.arange(0, 64)[:, None]
    line = tl.where(valid, slot, 0).to(tl.int64)[None, :]
    plane = num_slots.to(tl.int64) * width
    at = parts + line * width + n
    split = tl.program_id(2)
    tl.store(at + split * plane, total, mask=valid[None, :])
    if TWO == 1:
        tl.store(at + (NUM_SPLITS + split) * plane, total2, mask=valid[None, :])
    tl.debug_barrier()
    owner = tl.program_id(1) // TOP_K if AFTER == 3 else tl.program_id(1)
    lanes: tl.constexpr = NUM_SPLITS * TOP_K if AFTER == 3 else NUM_SPLITS
    ticket = arrived + owner * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == lanes - 1:
        tl.store(ticket, 0)  # for the next launch
        total = tl.zeros((64, ROWS), tl.float32)
        total2 = tl.zeros((64, ROWS), tl.float32)
        if AFTER == 3:
            for rank in range(TOP_K):
                mine = owner * TOP_K + rank
                from_rank = parts + (line * 0 + mine) * width + n
                sums = tl.zeros((64, ROWS), tl.float32)
                for each in range(NUM_SPLITS):
                    sums += tl.load(
                        from_rank + each * plane, mask=valid[None, :], other=0.0, cache_modifier=".cg"
                    )
                total += tl.load(shares + mine) * sums
            slot = owner + tl.arange(0, ROWS)
        else:
            for each in range(NUM_SPLITS):
                total += tl.load(at + each * plane, mask=valid[None, :], other=0.0, cache_modifier=".cg")
                if TWO == 1:
                    beyond = at + (NUM_SPLITS + each) * plane
                    total2 += tl.load(beyond, mask=valid[None, :], other=0.0, cache_modifier=".cg")
        _finish(
            total, total2, block, slot, valid, out, out_stride, residual, squares_out, num_blocks, num_rows,
            experts, shares, AFTER, TOP_K, ROWS,
        )  # fmt: skip


@triton.jit
def _sum_ranges(
    x_row, row_scales, norm_weight, codes, scale, minimum, codes2, scale2, minimum2, level_table, first,
    other, valid, num_columns, steps, steps_per_split, low, high,
    TWO: tl.constexpr, NORMED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    HAS_MIN: tl.constexpr, CODEBOOK: tl.constexpr, SCALES: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Return the sums of ranges `low` to `high` of columns, each summed apart, of one block and another."""
    total = tl.zeros((64, ROWS), tl.float32)
    total2 = tl.zeros((64, ROWS), tl.float32)
    for split in range(low, high):
        acc = tl.zeros((64, ROWS), tl.float32)
        acc2 = tl.zeros((64, ROWS), tl.float32)
        last = tl.minimum((split + 1) * steps_per_split, steps)
        # With a number of stages of its own a loop has all its loads under way, those of scales, too.
        for step in tl.range(split * steps_per_split, last, num_stages=STAGES):
            if BITS == 4:
                acc, acc2 = _add_step(
                    acc, acc2, x_row, row_scales, norm_weight, codes, scale, codes2, scale2, level_table,
                    first * steps + step, other * steps + step, step * 256, valid, num_columns,
                    TWO, NORMED, ZERO, CODEBOOK, SCALES, ROWS, H, TO,
                )  # fmt: skip
            else:
                acc, acc2 = _add_tile(
                    acc, acc2, x_row, row_scales, norm_weight, codes, scale, minimum, codes2, scale2,
                    minimum2, first * steps + step, other * steps + step, step * 64, valid, num_columns,
                    TWO, NORMED, BITS, GROUP, ZERO, HAS_MIN, H, TO,
                )  # fmt: skip
        total += acc
        total2 += acc2
    return total, total2


@triton.jit
def matmul(
    x, squares, norm_weight, codes, scale, minimum, codes2, scale2, minimum2, level_table, out, parts,
    arrived, residual, squares_out, slots, experts, shares, eps, num_slots, num_rows, num_columns, num_blocks,
    x_stride, out_stride, slots_per_row, steps, steps_per_split,
    NUM_SPLITS: tl.constexpr, APART: tl.constexpr, SLOTS: tl.constexpr, AFTER: tl.constexpr,
    NORMED: tl.constexpr, TWO: tl.constexpr, TOP_K: tl.constexpr, SQUARES: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, HAS_MIN: tl.constexpr, CODEBOOK: tl.constexpr,
    SCALES: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Program (block of 64 outputs, part of the slots, range of columns): see the module, `Slots` and
    `After`.

    TWO: 1 for the same block of a second matrix, 2 for the next block of the same one.
    """
    block = tl.program_id(0) * 2 if TWO == 2 else tl.program_id(0)
    part = tl.program_id(1)
    lane = tl.arange(0, ROWS)
    slot = part * ROWS + lane
    valid = slot < num_slots
    expert = 0
    if SLOTS == 1:
        slot = part + lane
        valid = lane == 0
        expert = tl.load(experts + part)
    if SLOTS == 2:
        slot = tl.load(slots + part * ROWS + lane)
        valid = slot >= 0
        expert = tl.load(experts + part)
    row = tl.where(valid, slot, 0) // slots_per_row
    row_scales = tl.zeros((ROWS,), tl.float32)
    if NORMED:
        row_scales = row_scale(squares, row, num_columns, eps, ROWS, SQUARES)
    first = (tl.zeros((), tl.int64) + expert) * num_blocks + block
    other = first
    if TWO == 2:
        other = tl.where(block + 1 < num_blocks, first + 1, first)
    low = tl.program_id(2) if APART else 0
    total, total2 = _sum_ranges(
        x + row.to(tl.int64) * x_stride, row_scales, norm_weight, codes, scale, minimum, codes2, scale2,
        minimum2, level_table, first, other, valid, num_columns, steps, steps_per_split, low,
        low + 1 if APART else NUM_SPLITS,
        TWO > 0, NORMED, BITS, GROUP, ZERO, HAS_MIN, CODEBOOK, SCALES, ROWS, STAGES, H, TO,
    )  # fmt: skip
    if APART:
        _arrive(
            total, total2, block, slot, valid, out, parts, arrived, residual, squares_out, experts, shares,
            num_slots, num_rows, num_blocks, out_stride, NUM_SPLITS, AFTER, TWO, TOP_K, ROWS,
        )  # fmt: skip
    else:
        _finish(
            total, total2, block, slot, valid, out, out_stride, residual, squares_out, num_blocks, num_rows,
            experts, shares, AFTER, TOP_K, ROWS,
        )  # fmt: skip
        if TWO == 2 and block + 1 < num_blocks:
            _finish(
                total2, total2, block + 1, slot, valid, out, out_stride, residual, squares_out, num_blocks,
                num_rows, experts, shares, AFTER, TOP_K, ROWS,
            )  # fmt: skip
