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
# pyright: reportAssignmentType=false, reportInvalidTypeForm=false
from __future__ import annotations

import triton
import triton.language as tl

from bise.kernels.triton.fold import columns_of, fold, row_scale
from bise.kernels.triton.four_bits import add_step


@triton.jit
def _levels(codes, ZERO: tl.constexpr, TO: tl.constexpr):
    """Return what 8-bit codes stand for, before the scale: exact in TO."""
    # As the low bits of 2^23 an integer is a float at once; conversions take four times as long.
    wide = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return (wide - (8388608 + ZERO)).to(TO)


@triton.jit
def _add_tile(
    acc, x_row, row_scales, norm_weight, codes, scales, minimums, k0, num_columns,
    NORMED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, HAS_MIN: tl.constexpr,
    EVEN: tl.constexpr, H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Add the products of 64 columns of floats or 8-bit codes to acc [M, rows]; `codes`, `scales` and
    `minimums` [M] are where those of each output lie.
    """
    PIECES: tl.constexpr = 64 // GROUP
    for piece in tl.static_range(PIECES):
        k = k0 + piece * GROUP + tl.arange(0, GROUP)[:, None]
        inside = None if EVEN else k < num_columns
        x = columns_of(x_row, row_scales, norm_weight, k, inside, inside, NORMED, H, TO)
        raw = tl.load(codes[:, None] + (piece * 64 * GROUP + tl.arange(0, GROUP)[None, :]))
        if BITS == 0:
            acc = tl.dot(raw.to(TO), x, acc, input_precision="ieee")
        else:
            scale = tl.load(scales + piece * 64).to(tl.float32)[:, None]
            dots = tl.dot(_levels(raw, ZERO, TO), x, input_precision="ieee")
            acc = tl.fma(dots, tl.broadcast_to(scale, dots.shape), acc)
            if HAS_MIN:
                minimum = tl.load(minimums + piece * 64).to(tl.float32)[:, None]
                sums = tl.dot(tl.full(raw.shape, 1.0, TO), x, input_precision="ieee")
                acc = tl.fma(sums, tl.broadcast_to(-minimum, dots.shape), acc)
    return acc


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
    total, total2, block, part, slot, valid, out, parts, arrived, residual, squares_out, experts, shares,
    num_slots, num_rows, num_blocks, out_stride,
    NUM_SPLITS: tl.constexpr, AFTER: tl.constexpr, TWO: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Leave a range's sums in `parts`; who arrives last adds them all, in order, and finishes the block."""
    width = num_blocks * 64
    n = block * 64 + tl.arange(0, 64)[:, None]
    line = tl.where(valid, slot, 0).to(tl.int64)[None, :]
    plane = (tl.zeros((), tl.int64) + num_slots) * width  # one slot is a constant, which has no `to`
    at = parts + line * width + n
    split = tl.program_id(2)
    tl.store(at + split * plane, total, mask=valid[None, :])
    if TWO == 1:
        tl.store(at + (NUM_SPLITS + split) * plane, total2, mask=valid[None, :])
    tl.debug_barrier()
    owner = part // TOP_K if AFTER == 3 else part
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
    x_row, row_scales, norm_weight, codes, scales, minimums, level_table, valid, num_columns, steps,
    steps_per_split, low, high,
    NORMED: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, HAS_MIN: tl.constexpr,
    CODEBOOK: tl.constexpr, SCALES: tl.constexpr, EVEN: tl.constexpr, LEAST: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Return the sums [M, ROWS] of ranges `low` to `high` of columns, each summed apart, of the M outputs
    whose first codes lie at `codes`.
    """
    total = tl.zeros((codes.shape[0], ROWS), tl.float32)
    for split in range(low, high):
        acc = tl.zeros((codes.shape[0], ROWS), tl.float32)
        last = tl.minimum((split + 1) * steps_per_split, steps)
        # With a number of stages of its own a loop has all its loads under way, those of scales, too.
        for step in tl.range(split * steps_per_split, last, num_stages=STAGES):
            if BITS == 4:
                words: tl.constexpr = 512 if SCALES == 2 else 256
                acc = add_step(
                    acc, x_row, row_scales, norm_weight, codes + step * 2048, scales + step * words,
                    level_table, step * 256, valid, num_columns, ROWS, NORMED, SCALES, ZERO, CODEBOOK, EVEN,
                    LEAST, H, TO,
                )  # fmt: skip
            else:
                numbers = step * (4096 // GROUP)
                acc = _add_tile(
                    acc, x_row, row_scales, norm_weight, codes + step * 4096, scales + numbers,
                    minimums + numbers, step * 64, num_columns, NORMED, BITS, GROUP, ZERO, HAS_MIN, EVEN, H,
                    TO,
                )  # fmt: skip
        total += acc
    return total


@triton.jit
def _turn(blocks, parts, GROUPED: tl.constexpr):
    """Return which block and which part of the slots a program computes.

    GROUPED: eight parts take a block one after the other, so that a weight comes from memory once for them.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    if GROUPED:
        program = part * blocks + block
        first = program // (8 * blocks) * 8
        count = tl.minimum(parts - first, 8)
        inner = program - first * blocks
        block, part = inner // count, first + inner % count
    return block, part


@triton.jit
def _places(
    first, has_next, to_codes2, to_scale2, to_minimum2, steps,
    TWO: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Return where the codes, the scales and the minimums of each output of a program begin, which computes
    the block `first`, counted over all experts, and with TWO another one.
    """
    M: tl.constexpr = 128 if TWO else 64
    output = tl.arange(0, M)
    is_first = output < 64
    mine = tl.zeros((M,), tl.int64) + first
    if TWO == 2:
        mine = tl.where(is_first, first, tl.where(has_next, first + 1, first))
    inner = output % 64
    per_output: tl.constexpr = 32 if BITS == 4 else GROUP
    per_scale: tl.constexpr = 1 if BITS != 4 else (8 if SCALES == 2 else 4)
    at = mine * steps * (2048 if BITS == 4 else 4096) + inner * per_output
    at_scale = mine * steps * (64 * per_scale if BITS == 4 else 4096 // GROUP) + inner * per_scale
    at_minimum = at_scale
    if TWO == 1:
        at += tl.where(is_first, 0, to_codes2) * 16
        at_scale += tl.where(is_first, 0, to_scale2) * 16
        at_minimum += tl.where(is_first, 0, to_minimum2) * 16
    return at, at_scale, at_minimum


@triton.jit(do_not_specialize=["num_slots", "to_codes2", "to_scale2", "to_minimum2"])
def matmul(
    x, squares, norm_weight, codes, scale, minimum, to_codes2: tl.int64, to_scale2: tl.int64,
    to_minimum2: tl.int64, level_table, out, parts, arrived, residual, squares_out, slots, experts, shares,
    eps, num_slots, num_rows, num_columns, num_blocks, x_stride, out_stride, slots_per_row, steps,
    steps_per_split,
    NUM_SPLITS: tl.constexpr, APART: tl.constexpr, SLOTS: tl.constexpr, AFTER: tl.constexpr,
    NORMED: tl.constexpr, TWO: tl.constexpr, TOP_K: tl.constexpr, SQUARES: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, HAS_MIN: tl.constexpr, CODEBOOK: tl.constexpr,
    SCALES: tl.constexpr, EVEN: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    H: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Program (block of 64 outputs, part of the slots, range of columns): see the module, `Slots` and
    `After`.

    TWO: 1 for the same block of a second matrix, which lies `to_codes2` x 16 elements behind the first one,
    2 for the next block of the same one: 128 outputs then. EVEN: the columns fill their tiles. Numbers that
    change from step to step, or with where memory lies, make no kernels of their own.
    """
    turn, part = _turn(tl.num_programs(0), tl.num_programs(1), ROWS >= 64 and not APART)
    block = turn * 2 if TWO == 2 else turn
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
    at, at_scale, at_minimum = _places(
        first, block + 1 < num_blocks, to_codes2, to_scale2, to_minimum2, steps, TWO, BITS, GROUP, SCALES
    )
    low = tl.program_id(2) if APART else 0
    high = low + 1 if APART else tl.cdiv(steps, steps_per_split)
    total = _sum_ranges(
        x + row.to(tl.int64) * x_stride, row_scales, norm_weight, codes + at, scale + at_scale,
        minimum + at_minimum, level_table, valid, num_columns, steps, steps_per_split, low, high,
        NORMED, BITS, GROUP, ZERO, HAS_MIN, CODEBOOK, SCALES, EVEN, LEAST, ROWS, STAGES, H, TO,
    )  # fmt: skip
    total2 = total
    if TWO:
        total, total2 = tl.split(tl.permute(tl.reshape(total, (2, 64, ROWS)), (1, 2, 0)))
    if APART:
        _arrive(
            total, total2, block, part, slot, valid, out, parts, arrived, residual, squares_out, experts,
            shares, num_slots, num_rows, num_blocks, out_stride, NUM_SPLITS, AFTER, TWO, TOP_K, ROWS,
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
