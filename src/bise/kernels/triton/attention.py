"""Attention over pages: decode and prompts, full and windowed, with grouped query heads.

One family of kernels for all query lengths. A row's result depends on its own keys alone:

- keys are taken in steps of 32 positions (a page) inside of splits of 512 absolute positions;
- the sum of the weights of a step goes through `tl.dot` with ones, as the weighted values do, so that no
  reduction depends on how many rows share a program;
- a step whose keys a row must not see multiplies by one and adds zero, so neighbours that need it change
  nothing;
- splits are joined in ascending order by `_join`, here when rows are many, by `_join_splits` when one is
  enough.
"""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from bise.kernels import BLOCK_SIZE, SPLIT_SIZE, AttentionMeta
from bise.kernels.triton import EXACT
from bise.kernels.triton.matmul import TYPES

_LOG2_E = 1.4426950408889634
_TILE_ROWS = 64
"""Query rows x heads of one program of a prompt."""
_MIN_ROWS = 16


@triton.jit
def _join(top, weight, mixed, top2, weight2, mixed2):
    """Join two sets of keys: highest score, sum of weights, weighted values."""
    highest = tl.maximum(top, top2)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    left = tl.exp2(top - safe)
    right = tl.exp2(top2 - safe)
    return highest, weight * left + weight2 * right, mixed * left[:, None] + mixed2 * right[:, None]


@triton.jit
def _mean(mixed, weight):
    """Return the weighted values over their weights; rows that only fill a program up have none."""
    return mixed / tl.where(weight == 0.0, 1.0, weight)[:, None]


@triton.jit
def _add_page(queries, keys, values, seen, score_scale, top, weight, mixed):
    """Add the keys of a page to what a split has found; keys not `seen` change nothing."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * score_scale
    scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    shares = tl.exp2(scores - safe[:, None]).to(values.dtype)
    shrink = tl.exp2(top - safe)
    ones = tl.full((values.shape[0], 16), 1.0, values.dtype)
    added = tl.max(tl.dot(shares, ones, input_precision="ieee"), 1)
    mixed = mixed * shrink[:, None] + tl.dot(shares, values, input_precision="ieee")
    return highest, weight * shrink + added, mixed


@triton.jit
def _attend(
    q, k_pages, v_pages, out, part_tops, part_weights, q_start, q_pos, block_table, tile_sequence, tile_row,
    table_width, num_heads, num_kv_heads, head_dim, window, score_scale, num_splits,
    HEADS_PER_KV: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr,
    PAGE: tl.constexpr, APART: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head, split): rows `tile_row`... of a sequence, all query heads of one kv head."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tile_sequence + tile)
    last_row = tl.load(q_start + sequence + 1)
    start_row = tl.load(q_start + sequence)
    r = tl.arange(0, ROWS)
    row = tl.load(tile_row + tile) + r // HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + r % HEADS_PER_KV
    valid = (row < last_row) & (r < ROWS // HEADS_PER_KV * HEADS_PER_KV)
    position = tl.load(q_pos + sequence) + row - start_row
    column = tl.arange(0, WIDTH)
    q_at = q + row.to(tl.int64)[:, None] * num_heads * head_dim + head[:, None] * head_dim + column[None, :]
    queries = tl.load(q_at, mask=valid[:, None] & (column < head_dim)[None, :], other=0.0).to(TO)
    top_position = tl.max(tl.where(valid, position, 0), 0)
    lowest = tl.maximum(tl.min(tl.where(valid, position, 0x7FFFFFFF), 0) - window + 1, 0)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    split_low = tl.program_id(2) if APART else lowest // SPLIT
    split_high = split_low + 1 if APART else top_position // SPLIT + 1
    for split in range(split_low, split_high):
        split_top = tl.full((ROWS,), float("-inf"), tl.float32)
        split_weight = tl.zeros((ROWS,), tl.float32)
        split_mixed = tl.zeros((ROWS, WIDTH), tl.float32)
        page_low = tl.maximum(split * SPLIT, lowest) // PAGE
        page_high = tl.minimum((split + 1) * SPLIT, top_position + 1 + PAGE - 1) // PAGE
        for page in range(page_low, page_high):
            block = tl.load(block_table + sequence * table_width + page)
            key_position = page * PAGE + tl.arange(0, PAGE)
            present = key_position <= tl.where(block >= 0, top_position, -1)
            slot = tl.where(present, block * PAGE + tl.arange(0, PAGE), 0).to(tl.int64)
            at = (slot * num_kv_heads + kv_head)[:, None] * head_dim + column[None, :]
            inside = present[:, None] & (column < head_dim)[None, :]
            keys = tl.load(k_pages + at, mask=inside, other=0.0).to(TO)
            values = tl.load(v_pages + at, mask=inside, other=0.0).to(TO)
            seen = present[None, :] & (key_position[None, :] <= position[:, None])
            seen = seen & (key_position[None, :] > position[:, None] - window)
            split_top, split_weight, split_mixed = _add_page(
                queries, keys, values, seen, score_scale, split_top, split_weight, split_mixed
            )
        top, weight, mixed = _join(top, weight, mixed, split_top, split_weight, split_mixed)

    line = row * num_heads + head
    inside = valid[:, None] & (column < head_dim)[None, :]
    if APART:
        line = line.to(tl.int64) * num_splits + split_low
        tl.store(part_tops + line, top, mask=valid)
        tl.store(part_weights + line, weight, mask=valid)
        tl.store(out + line[:, None] * head_dim + column[None, :], mixed, mask=inside)
    else:
        to = out + line.to(tl.int64)[:, None] * head_dim + column[None, :]
        tl.store(to, _mean(mixed, weight), mask=inside)


@triton.jit
def _join_splits(
    parts,
    part_tops,
    part_weights,
    out,
    num_lines,
    head_dim,
    num_splits,
    LINES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Join the splits of each (row, head) in ascending order."""
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, WIDTH)
    valid = line < num_lines
    inside = valid[:, None] & (column < head_dim)[None, :]
    top = tl.full((LINES,), float("-inf"), tl.float32)
    weight = tl.zeros((LINES,), tl.float32)
    mixed = tl.zeros((LINES, WIDTH), tl.float32)
    for split in range(num_splits):
        at = line.to(tl.int64) * num_splits + split
        top2 = tl.load(part_tops + at, mask=valid, other=float("-inf"))
        weight2 = tl.load(part_weights + at, mask=valid, other=0.0)
        mixed2 = tl.load(parts + at[:, None] * head_dim + column[None, :], mask=inside, other=0.0)
        top, weight, mixed = _join(top, weight, mixed, top2, weight2, mixed2)
    tl.store(out + line[:, None] * head_dim + column[None, :], _mean(mixed, weight), mask=inside)


@triton.jit
def _rotate_store(
    q,
    k,
    v,
    cos,
    sin,
    slots,
    q_out,
    k_pages,
    v_pages,
    num_heads,
    num_kv_heads,
    head_dim,
    HALF: tl.constexpr,
):
    """Program (row, head): rotate one head of q, or of k and store it with its v in the pages."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = head_dim // 2
    i = tl.arange(0, HALF)
    inside = i < half
    c = tl.load(cos + row * half + i, mask=inside, other=0.0)
    s = tl.load(sin + row * half + i, mask=inside, other=0.0)
    if head < num_heads:
        at = (row * num_heads + head) * head_dim + i
        left = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(q + at + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(q_out + at, (left * c - right * s).to(q_out.dtype.element_ty), mask=inside)
        tl.store(q_out + at + half, (right * c + left * s).to(q_out.dtype.element_ty), mask=inside)
    else:
        kv_head = head - num_heads
        at = (row * num_kv_heads + kv_head) * head_dim + i
        to = (tl.load(slots + row).to(tl.int64) * num_kv_heads + kv_head) * head_dim + i
        left = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(k + at + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(k_pages + to, (left * c - right * s).to(k_pages.dtype.element_ty), mask=inside)
        tl.store(k_pages + to + half, (right * c + left * s).to(k_pages.dtype.element_ty), mask=inside)
        tl.store(v_pages + to, tl.load(v + at, mask=inside).to(v_pages.dtype.element_ty), mask=inside)
        value = tl.load(v + at + half, mask=inside)
        tl.store(v_pages + to + half, value.to(v_pages.dtype.element_ty), mask=inside)


def query_tiles(
    meta: AttentionMeta, rows_per_tile: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return sequence and first row [tiles] of every tile of at most `rows_per_tile` rows of one sequence."""
    lengths = np.diff(meta.q_start)
    counts = -(-lengths // rows_per_tile)
    sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    first = meta.q_start[sequences] + inside * rows_per_tile
    return sequences, first.astype(np.int32)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: tuple[Tensor, Tensor],
    slots: Tensor,
    pages: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Store rotated k and v in the pages ([slots, G, D] each); return the rotated q [T, H*D] in `dtype`."""
    num_kv_heads, head_dim = pages[0].shape[1:]
    num_heads = q.shape[1] // head_dim
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    _rotate_store[(len(q), num_heads + num_kv_heads)](
        q,
        k,
        v,
        rope[0],
        rope[1],
        slots,
        out,
        pages[0],
        pages[1],
        num_heads,
        num_kv_heads,
        head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        **EXACT,
    )
    return out


def attend(
    q: Tensor,
    pages: tuple[Tensor, Tensor],
    meta: AttentionMeta,
    tensors: tuple[Tensor, Tensor, Tensor],
    window: int | None,
    *,
    rows_per_tile: int | None = None,
) -> Tensor:
    """Return attention [T, H*D] in float32 of rotated q [T, H*D] over pages [slots, G, D].

    `tensors` are q_start, q_pos and block_table of `meta` on the device. Steps in which every sequence has
    one row run their splits side by side.
    """
    num_kv_heads, head_dim = pages[0].shape[1:]
    num_heads = q.shape[1] // head_dim
    share = num_heads // num_kv_heads
    apart = len(q) == len(meta.q_pos) if rows_per_tile is None else rows_per_tile == 1
    rows = triton.next_power_of_2(max(share * (1 if apart else max(_TILE_ROWS // share, 1)), _MIN_ROWS))
    per_tile = rows_per_tile or (1 if apart else rows // share)
    sequences, firsts = (torch.from_numpy(each).to(q.device) for each in query_tiles(meta, per_tile))
    last = meta.q_pos + np.diff(meta.q_start)
    splits = int(-(-int(last.max()) // SPLIT_SIZE)) if apart else 1
    lines = len(q) * num_heads
    out = torch.empty(lines * splits, head_dim, dtype=torch.float32, device=q.device)
    tops = torch.empty(lines * splits if apart else 1, dtype=torch.float32, device=q.device)
    weights = torch.empty_like(tops)
    width = triton.next_power_of_2(head_dim)
    _attend[(len(sequences), num_kv_heads, splits)](
        q,
        pages[0],
        pages[1],
        out,
        tops,
        weights,
        *tensors,
        sequences,
        firsts,
        tensors[2].shape[1],
        num_heads,
        num_kv_heads,
        head_dim,
        window or 1 << 30,
        head_dim**-0.5 * _LOG2_E,
        splits,
        HEADS_PER_KV=share,
        ROWS=rows,
        WIDTH=width,
        SPLIT=SPLIT_SIZE,
        PAGE=BLOCK_SIZE,
        APART=apart,
        TO=TYPES[q.dtype],
        **EXACT,
    )
    if not apart:
        return out.view(len(q), -1)
    joined = torch.empty(lines, head_dim, dtype=torch.float32, device=q.device)
    _join_splits[(-(-lines // 16),)](
        out, tops, weights, joined, lines, head_dim, splits, LINES=16, WIDTH=width, **EXACT
    )
    return joined.view(len(q), -1)
