"""Slots of rows, by expert: each program of a product then has one expert."""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bise.kernels.triton import EXACT
from bise.kernels.triton.matmul import Chosen

_FEW_SLOTS = 16
"""Slots for each expert, on average, up to which a program computes 16 slots at most."""
_BLOCK = 1024
"""Slots that a program looks at together."""


@triton.jit(do_not_specialize=["num_slots"])
def _sort(
    chosen,
    slots,
    experts,
    num_slots,
    num_experts,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (expert): list its slots in ascending order from the place on that lower experts leave."""
    expert = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for low in range(0, num_slots, BLOCK):
        at = low + tl.arange(0, BLOCK)
        mine = tl.load(chosen + at, mask=at < num_slots, other=-1)
        counts += tl.sum((mine[:, None] == ids[None, :]).to(tl.int32), 0)
    needed = (counts + ROWS - 1) // ROWS
    first = tl.sum(tl.where(ids < expert, needed, 0), 0)
    own = tl.sum(tl.where(ids == expert, needed, 0), 0)
    for program in range(first, first + own):
        tl.store(experts + program, expert)
    seen = tl.zeros((), tl.int32)
    for low in range(0, num_slots, BLOCK):
        at = low + tl.arange(0, BLOCK)
        is_mine = (tl.load(chosen + at, mask=at < num_slots, other=-1) == expert).to(tl.int32)
        place = first * ROWS + seen + tl.cumsum(is_mine, 0) - 1
        tl.store(slots + place, at, mask=is_mine == 1)
        seen += tl.sum(is_mine, 0)


def sorted_slots(chosen: Tensor, num_experts: int, most: int = 64) -> Chosen:
    """Return the slots of experts `chosen` (int32 [T, top_k]) by expert, at most `most` for a program.

    There are as many programs as any choice can need, so nothing is read back: some have no slot.
    """
    num_slots = chosen.numel()
    rows = 16 if num_slots <= _FEW_SLOTS * num_experts else most
    programs = min(num_slots, -(-num_slots // rows) + num_experts)
    slots = torch.full((programs * rows,), -1, dtype=torch.int32, device=chosen.device)
    experts = torch.zeros(programs, dtype=torch.int32, device=chosen.device)
    _sort[(num_experts,)](
        chosen, slots, experts, num_slots, num_experts, ROWS=rows,
        EXPERTS=triton.next_power_of_2(num_experts), BLOCK=_BLOCK, **EXACT,
    )  # fmt: skip
    return Chosen(experts, slots, rows)
