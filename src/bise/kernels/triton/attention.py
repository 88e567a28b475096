"""Attention over pages: decode and prompts, full and windowed, with grouped query heads.

Two kernels that share what they do with a page. A row's result depends on its own keys alone:

- keys are taken in steps of 32 positions (a page) inside of splits of 512 absolute positions;
- the sum of the weights of a step goes through `tl.dot` with ones, as the weighted values do, so that no
  reduction depends on how many rows share a program;
- a step whose keys a row must not see multiplies by one and adds zero, so neighbours that need it change
  nothing;
- splits are joined in ascending order by `_join`: by a prompt's program, which goes through all of them, or
  by
  the one of a decoded row's programs that arrives last.
"""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bise.kernels import BLOCK_SIZE, SPLIT_SIZE
from bise.kernels.triton import EXACT
from bise.kernels.triton.matmul import TYPES
from bise.kernels.triton.paging import Placed, TritonPages

_LOG2_E = 1.4426950408889634
_TILE_ROWS = 64
"""Query rows x heads of one program of a prompt."""
_CODED_TILE_ROWS = 32
"""The same over 8-bit keys and values. From 64 on Hopper multiplies by another instruction, which takes 16
neighbouring columns at once; that of a decoded row takes them as four bytes at a time lie in memory.
"""
_MIN_ROWS = 16
_PROGRAMS = 512
"""Programs of a decode step, about: what keeps a large GPU busy."""
_ARRIVALS = 1 << 16
_PLACES = ("positions", "owners", "slots", "block_table", "q_start", "q_pos", "tile_sequence", "tile_row")
"""What a step brings in one piece of memory: how its parts are aligned depends on the number of rows, and
must not make kernels of their own.
"""


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
def _add_page(
    left_q, right_q, k_pages, v_pages, k_scales, v_scales, block, page, kv_head, num_kv_heads, head_dim,
    position, top_position, window, score_scale, top, weight, mixed,
    HALF: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, CODED: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Add the keys of a page to what a split has found; keys that a row must not see change nothing."""
    half = head_dim // 2
    key_position = page * PAGE + tl.arange(0, PAGE)
    present = key_position <= tl.where(block >= 0, top_position, -1)
    slot = tl.where(present, block * PAGE + tl.arange(0, PAGE), 0).to(tl.int64)
    line = slot * num_kv_heads + kv_head
    i = tl.arange(0, HALF)[None, :]
    column = tl.arange(0, WIDTH)[None, :]
    inside = present[:, None] & (i < half)
    left_k = tl.load(k_pages + line[:, None] * head_dim + i, mask=inside, other=0.0).to(TO)
    right_k = tl.load(k_pages + line[:, None] * head_dim + half + i, mask=inside, other=0.0).to(TO)
    v_inside = present[:, None] & (column < head_dim)
    values = tl.load(v_pages + line[:, None] * head_dim + column, mask=v_inside, other=0.0).to(TO)
    scores = tl.dot(left_q, tl.trans(left_k), input_precision="ieee")
    scores = tl.dot(right_q, tl.trans(right_k), scores, input_precision="ieee") * score_scale
    if CODED:
        scores = scores * tl.load(k_scales + line, mask=present, other=0.0)[None, :]
    seen = present[None, :] & (key_position[None, :] <= position[:, None])
    seen = seen & (key_position[None, :] > position[:, None] - window)
    scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    shares = tl.exp2(scores - safe[:, None])
    ones = tl.full((PAGE, 16), 1.0, TO)
    added = tl.max(tl.dot(shares.to(TO), ones, input_precision="ieee"), 1)
    if CODED:
        shares = shares * tl.load(v_scales + line, mask=present, other=0.0)[None, :]
    shrink = tl.exp2(top - safe)
    mixed = mixed * shrink[:, None] + tl.dot(shares.to(TO), values, input_precision="ieee")
    return highest, weight * shrink + added, mixed


@triton.jit
def _add_split(
    left_q, right_q, k_pages, v_pages, k_scales, v_scales, table, split, lowest, kv_head, num_kv_heads,
    head_dim, position, top_position, window, score_scale,
    ROWS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr,
    CODED: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Return highest score, sum of weights and weighted values of the keys of a split."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    page_low = tl.maximum(split * SPLIT, lowest) // PAGE
    page_high = tl.minimum((split + 1) * SPLIT, top_position + 1 + PAGE - 1) // PAGE
    for page in range(page_low, page_high):
        top, weight, mixed = _add_page(
            left_q, right_q, k_pages, v_pages, k_scales, v_scales, tl.load(table + page), page, kv_head,
            num_kv_heads, head_dim, position, top_position, window, score_scale, top, weight, mixed,
            HALF, WIDTH, PAGE, CODED, TO,
        )  # fmt: skip
    return top, weight, mixed


@triton.jit
def _turned(x, at, cos, sin, angle, half, inside, i):
    """Return the halves of a head [.., HALF], rotated by the angles of a position."""
    left = tl.load(x + at + i, mask=inside, other=0.0)
    right = tl.load(x + at + half + i, mask=inside, other=0.0)
    c = tl.load(cos + angle * half + i, mask=inside, other=0.0)
    s = tl.load(sin + angle * half + i, mask=inside, other=0.0)
    return left * c - right * s, right * c + left * s


@triton.jit
def _coded(value, unit):
    """Return codes of values: the nearest integers to value x unit, ties to even."""
    return ((value * unit + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def _store_kv(
    k, v, k_at, v_at, cos, sin, angle, slot, kv_head, num_kv_heads, head_dim, k_pages, v_pages, k_scales,
    v_scales,
    HALF: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """Rotate one head of k and store it with its v in the pages; a negative slot stores nothing.

    CODED: a code of 127 stands for the largest magnitude of a head, as on the processor.
    """
    half = head_dim // 2
    i = tl.arange(0, HALF)
    inside = i < tl.where(slot >= 0, half, 0)
    left, right = _turned(k, k_at, cos, sin, angle, half, inside, i)
    v_left = tl.load(v + v_at + i, mask=inside, other=0.0)
    v_right = tl.load(v + v_at + half + i, mask=inside, other=0.0)
    line = slot.to(tl.int64) * num_kv_heads + kv_head
    to = line * head_dim + i
    if CODED:
        top = tl.maximum(tl.max(tl.abs(left), 0), tl.max(tl.abs(right), 0))
        v_top = tl.maximum(tl.max(tl.abs(v_left), 0), tl.max(tl.abs(v_right), 0))
        unit = tl.where(top > 1e-36, tl.div_rn(127.0, tl.maximum(top, 1e-36)), 0.0)
        v_unit = tl.where(v_top > 1e-36, tl.div_rn(127.0, tl.maximum(v_top, 1e-36)), 0.0)
        # What is not finite must not vanish in a maximum: the scale becomes NaN.
        scale = tl.where(top > 1e-36, tl.div_rn(top, 127.0), 0.0) + tl.sum((left + right) * 0.0, 0)
        v_scale = tl.where(v_top > 1e-36, tl.div_rn(v_top, 127.0), 0.0) + tl.sum((v_left + v_right) * 0.0, 0)
        tl.store(k_scales + line, scale, mask=slot >= 0)
        tl.store(v_scales + line, v_scale, mask=slot >= 0)
        left, right = _coded(left, unit), _coded(right, unit)
        v_left, v_right = _coded(v_left, v_unit), _coded(v_right, v_unit)
    tl.store(k_pages + to, left.to(k_pages.dtype.element_ty), mask=inside)
    tl.store(k_pages + to + half, right.to(k_pages.dtype.element_ty), mask=inside)
    tl.store(v_pages + to, v_left.to(v_pages.dtype.element_ty), mask=inside)
    tl.store(v_pages + to + half, v_right.to(v_pages.dtype.element_ty), mask=inside)


@triton.jit
def _decode_splits(
    left_q, right_q, k_pages, v_pages, k_scales, v_scales, table, parts, part_tops, part_weights, ticket,
    line, valid, wide, kv_head, num_kv_heads, head_dim, at, lowest, window, score_scale, most_splits, lane,
    first_split, last_split,
    ROWS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, PAGE: tl.constexpr,
    CODED: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Add the splits of one lane. Return all splits of the row joined in order, and whether that is so: a
    lane that has the row to itself joins its own, the one of several that arrives last joins what all have
    left.
    """
    column = tl.arange(0, WIDTH)
    position = tl.zeros((ROWS,), tl.int32) + at
    count = last_split - first_split + 1
    lanes = tl.minimum(count, tl.num_programs(2))
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for split in range(first_split + lane, last_split + 1, tl.num_programs(2)):
        top2, weight2, mixed2 = _add_split(
            left_q, right_q, k_pages, v_pages, k_scales, v_scales, table, split, lowest, kv_head,
            num_kv_heads, head_dim, position, at, window, score_scale, ROWS, HALF, WIDTH, SPLIT, PAGE, CODED,
            TO,
        )  # fmt: skip
        if lanes == 1:
            top, weight, mixed = _join(top, weight, mixed, top2, weight2, mixed2)
        else:
            place = line * most_splits + split - first_split
            tl.store(part_tops + place, top2, mask=valid)
            tl.store(part_weights + place, weight2, mask=valid)
            tl.store(parts + place[:, None] * head_dim + column[None, :], mixed2, mask=wide)
    is_last = lanes == 1
    if lanes > 1:
        tl.debug_barrier()
        if tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == lanes - 1:
            tl.store(ticket, 0)  # for the next launch
            is_last = lanes > 1
            for each in range(count):
                place = line * most_splits + each
                top2 = tl.load(part_tops + place, mask=valid, other=float("-inf"), cache_modifier=".cg")
                weight2 = tl.load(part_weights + place, mask=valid, other=0.0, cache_modifier=".cg")
                from_part = parts + place[:, None] * head_dim + column[None, :]
                mixed2 = tl.load(from_part, mask=wide, other=0.0, cache_modifier=".cg")
                top, weight, mixed = _join(top, weight, mixed, top2, weight2, mixed2)
    return top, weight, mixed, is_last


@triton.jit(do_not_specialize=[*_PLACES, "table_width", "most_splits"])
def _decode(
    q, k, v, cos, sin, positions, owners, slots, block_table, k_pages, v_pages, k_scales, v_scales, parts,
    part_tops, part_weights, arrived, out, q_stride, kv_stride, table_width, num_heads, num_kv_heads,
    head_dim, window, score_scale, most_splits,
    HEADS_PER_KV: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, STORES: tl.constexpr, CODED: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Program (row, kv head, lane): of a row's splits one in as many as there are lanes, all query heads of
    one kv head.

    Rotates the queries; the lane of the last split rotates and stores the row's key and value before it reads
    them (STORES; else they are there). A row at position -1 gives zeros and stores no key.
    """
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    lane = tl.program_id(2)
    at = tl.load(positions + row)
    lowest = tl.maximum(at - window + 1, 0)
    first_split = lowest // SPLIT
    last_split = tl.maximum(at, 0) // SPLIT
    count = last_split - first_split + 1
    lanes = tl.minimum(count, tl.num_programs(2))
    half = head_dim // 2
    r = tl.arange(0, ROWS)
    valid = r < HEADS_PER_KV
    head = kv_head * HEADS_PER_KV + tl.where(valid, r, 0)
    i = tl.arange(0, HALF)
    column = tl.arange(0, WIDTH)
    line = row * num_heads + head
    wide = valid[:, None] & (column < head_dim)[None, :]
    to = out + line[:, None] * head_dim + column[None, :]
    if at < 0:
        if lane == 0:
            tl.store(to, tl.zeros((ROWS, WIDTH), tl.float32).to(out.dtype.element_ty), mask=wide)
    elif lane < lanes:
        inside = valid[:, None] & (i < half)[None, :]
        q_at = row * q_stride + head[:, None] * head_dim
        left, right = _turned(q, q_at, cos, sin, at, half, inside, i[None, :])
        left_q, right_q = left.to(TO), right.to(TO)
        if STORES:
            if (last_split - first_split) % tl.num_programs(2) == lane:
                kv_at = row * kv_stride + kv_head * head_dim
                _store_kv(
                    k, v, kv_at, kv_at, cos, sin, at, tl.load(slots + row), kv_head, num_kv_heads, head_dim,
                    k_pages, v_pages, k_scales, v_scales, HALF, CODED,
                )  # fmt: skip
            tl.debug_barrier()  # what some threads stored, others read
        table = block_table + tl.load(owners + row) * table_width
        _top, weight, mixed, is_last = _decode_splits(
            left_q, right_q, k_pages, v_pages, k_scales, v_scales, table, parts, part_tops, part_weights,
            arrived + row * num_kv_heads + kv_head, line, valid, wide, kv_head, num_kv_heads, head_dim, at,
            lowest, window, score_scale, most_splits, lane, first_split, last_split, ROWS, HALF, WIDTH, SPLIT,
            PAGE, CODED, TO,
        )  # fmt: skip
        if is_last:
            tl.store(to, _mean(mixed, weight).to(out.dtype.element_ty), mask=wide)


@triton.jit(do_not_specialize=[*_PLACES, "table_width"])
def _attend(
    q, k_pages, v_pages, k_scales, v_scales, out, q_start, q_pos, block_table, tile_sequence, tile_row,
    table_width, num_heads, num_kv_heads, head_dim, window, score_scale,
    HEADS_PER_KV: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    SPLIT: tl.constexpr, PAGE: tl.constexpr, CODED: tl.constexpr, TO: tl.constexpr,
):  # fmt: skip
    """Program (tile, kv head): rows `tile_row`... of a sequence, all query heads of one kv head."""
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
    half = head_dim // 2
    i = tl.arange(0, HALF)[None, :]
    column = tl.arange(0, WIDTH)[None, :]
    q_at = q + row.to(tl.int64)[:, None] * num_heads * head_dim + head[:, None] * head_dim + i
    inside = valid[:, None] & (i < half)
    left_q = tl.load(q_at, mask=inside, other=0.0).to(TO)
    right_q = tl.load(q_at + half, mask=inside, other=0.0).to(TO)
    top_position = tl.max(tl.where(valid, position, 0), 0)
    lowest = tl.maximum(tl.min(tl.where(valid, position, 0x7FFFFFFF), 0) - window + 1, 0)

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    for split in range(lowest // SPLIT, top_position // SPLIT + 1):
        top2, weight2, mixed2 = _add_split(
            left_q, right_q, k_pages, v_pages, k_scales, v_scales, block_table + sequence * table_width,
            split, lowest, kv_head, num_kv_heads, head_dim, position, top_position, window, score_scale, ROWS,
            HALF, WIDTH, SPLIT, PAGE, CODED, TO,
        )  # fmt: skip
        top, weight, mixed = _join(top, weight, mixed, top2, weight2, mixed2)
    line = (row * num_heads + head).to(tl.int64)
    to = out + line[:, None] * head_dim + column
    tl.store(to, _mean(mixed, weight).to(out.dtype.element_ty), mask=valid[:, None] & (column < head_dim))


@triton.jit(do_not_specialize=_PLACES)
def _rotate_store(
    q, k, v, cos, sin, positions, slots, q_out, k_pages, v_pages, k_scales, v_scales, q_stride, kv_stride,
    num_heads, num_kv_heads, head_dim,
    HALF: tl.constexpr, CODED: tl.constexpr,
):  # fmt: skip
    """Program (row, head): rotate one head of q, or of k and store it with its v in the pages."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half = head_dim // 2
    i = tl.arange(0, HALF)
    inside = i < half
    angle = tl.load(positions + row)
    if head < num_heads:
        left, right = _turned(q, row * q_stride + head * head_dim, cos, sin, angle, half, inside, i)
        to = q_out + (row * num_heads + head) * head_dim + i
        tl.store(to, left.to(q_out.dtype.element_ty), mask=inside)
        tl.store(to + half, right.to(q_out.dtype.element_ty), mask=inside)
    else:
        kv_head = head - num_heads
        at = row * kv_stride + kv_head * head_dim
        _store_kv(
            k, v, at, at, cos, sin, angle, tl.load(slots + row), kv_head, num_kv_heads, head_dim, k_pages,
            v_pages, k_scales, v_scales, HALF, CODED,
        )  # fmt: skip


class Attention:
    """Launches the kernels for one compute type on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        # Zero between launches: whoever arrives last puts back what it counted.
        self._arrived = torch.zeros(_ARRIVALS, dtype=torch.int32, device=device)

    def __call__(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        placed: Placed,
        pages: TritonPages,
        window: int | None,
    ) -> Tensor:
        """Rotate q and k, store k and v, and return attention [T, H*D] in the compute type.

        q, k and v are float32 [T, heads * D], k and v with one row stride; `rope` are cos and sin by
        position.
        """
        if placed.is_decode:
            return self._decode(qkv, rope, placed, pages, window, stores=True)
        turned = self._rotate(qkv, rope, placed, pages)
        if placed.is_short:
            return self._decode(qkv, rope, placed, pages, window, stores=False)
        return self._prompts(turned, placed, pages, window)

    def _rotate(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        placed: Placed,
        pages: TritonPages,
    ) -> Tensor:
        q, k, v = qkv
        num_kv_heads, head_dim = pages.k.shape[1:]
        num_heads = q.shape[1] // head_dim
        out = torch.empty(q.shape, dtype=self._dtype, device=q.device)
        _rotate_store[(len(q), num_heads + num_kv_heads)](
            q, k, v, *rope, placed.positions, placed.slots, out, *pages.arrays(), q.stride(0), k.stride(0),
            num_heads, num_kv_heads, head_dim, HALF=_half(head_dim), CODED=pages.is_coded, **EXACT,
        )  # fmt: skip
        return out

    def _decode(
        self,
        qkv: tuple[Tensor, Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        placed: Placed,
        pages: TritonPages,
        window: int | None,
        *,
        stores: bool,
    ) -> Tensor:
        q, k, v = qkv
        num_kv_heads, head_dim = pages.k.shape[1:]
        rows, num_heads = len(q), q.shape[1] // head_dim
        most = _most_splits(placed.table.shape[1], window)
        wanted = max(_PROGRAMS // (rows * num_kv_heads), 1)
        lanes = min(1 << wanted.bit_length() - 1, triton.next_power_of_2(most))
        assert rows * num_kv_heads <= _ARRIVALS
        scratch = rows * num_heads * most if lanes > 1 else 4  # of one alignment
        parts = torch.empty(scratch * head_dim, dtype=torch.float32, device=q.device)
        tops, weights = torch.empty((2, scratch), dtype=torch.float32, device=q.device)
        out = torch.empty((rows, num_heads * head_dim), dtype=self._dtype, device=q.device)
        share = num_heads // num_kv_heads
        _decode[(rows, num_kv_heads, lanes)](
            q, k, v, *rope, placed.positions, placed.owners, placed.slots, placed.table, *pages.arrays(),
            parts, tops, weights, self._arrived, out, q.stride(0), k.stride(0), placed.table.shape[1],
            num_heads, num_kv_heads, head_dim, window or 1 << 30, head_dim**-0.5 * _LOG2_E, most,
            HEADS_PER_KV=share, ROWS=triton.next_power_of_2(max(share, _MIN_ROWS)), HALF=_half(head_dim),
            WIDTH=max(triton.next_power_of_2(head_dim), 16), SPLIT=SPLIT_SIZE, PAGE=BLOCK_SIZE, STORES=stores,
            CODED=pages.is_coded, TO=TYPES[self._dtype], **EXACT,
        )  # fmt: skip
        return out

    def _prompts(self, q: Tensor, placed: Placed, pages: TritonPages, window: int | None) -> Tensor:
        num_kv_heads, head_dim = pages.k.shape[1:]
        num_heads = q.shape[1] // head_dim
        share = num_heads // num_kv_heads
        most = _CODED_TILE_ROWS if pages.is_coded else _TILE_ROWS
        rows = triton.next_power_of_2(max(share * max(most // share, 1), _MIN_ROWS))
        sequences, firsts = placed.tiles(rows // share)
        out = torch.empty(q.shape, dtype=self._dtype, device=q.device)
        _attend[(len(sequences), num_kv_heads)](
            q, *pages.arrays(), out, placed.q_start, placed.q_pos, placed.table, sequences, firsts,
            placed.table.shape[1], num_heads, num_kv_heads, head_dim, window or 1 << 30,
            head_dim**-0.5 * _LOG2_E,
            HEADS_PER_KV=share, ROWS=rows, HALF=_half(head_dim), WIDTH=max(triton.next_power_of_2(head_dim),
            16), SPLIT=SPLIT_SIZE, PAGE=BLOCK_SIZE, CODED=pages.is_coded, TO=TYPES[self._dtype], **EXACT,
        )  # fmt: skip
        return out


def _half(head_dim: int) -> int:
    """Return the columns of half a head in a program: products take at least 16."""
    return max(1 << (head_dim // 2 - 1).bit_length(), 16)


def _most_splits(table_width: int, window: int | None) -> int:
    """Return how many splits of its sequence a row can see at most."""
    whole = -(-table_width * BLOCK_SIZE // SPLIT_SIZE)
    return whole if window is None else min(whole, (window - 2) // SPLIT_SIZE + 2)
