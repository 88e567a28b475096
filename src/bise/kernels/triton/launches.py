"""How many rows, warps and stages a matrix product gets: a table, not a search at start.

Nothing here changes a result: columns are summed in the order that the weight's shape gives. The numbers come
from arithmetic on bytes in flight, registers and instructions (docs/gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bise.kernels.triton.tiles import Tiles

_PROCESSORS = 132
"""Multiprocessors of a large GPU; fewer only means that programs queue."""

_APART_ROWS = 256
"""Up to this many slots ranges of columns go apart."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Shape of a program of the matrix kernel."""

    rows: int
    """Rows (or slots) of a program."""
    warps: int
    stages: int
    """Steps whose loads are under way at once."""
    apart: bool
    """Ranges of columns go side by side, each to its own program."""
    two_blocks: bool
    """A program computes 128 outputs instead of 64."""


_TABLE = (
    # most slots, rows, warps, stages, stages with 4-bit codes (of four times the columns), two blocks
    (8, 8, 4, 4, 4, False),
    (16, 16, 4, 4, 3, False),
    (32, 32, 4, 4, 3, False),
    (64, 64, 4, 3, 2, False),
    (256, 64, 4, 3, 2, True),
    (1 << 62, 128, 8, 3, 2, True),
)
"""What a program keeps in the memory that a processor's programs share stays below the 99 KiB of a consumer's
card (Hopper, where more is kept: 227 KiB); `compile_kernels.py` reads it from machine code."""

_ONE_ROW = Launch(1, 4, 3, apart=True, two_blocks=False)
"""One row times 4-bit codes: nine KiB a stage."""


def shape_of(num_slots: int, bits: int) -> Launch:
    """Return rows, warps and stages for a number of slots and a width of codes (0: floats)."""
    if bits == 4 and num_slots == 1:
        return _ONE_ROW
    _, rows, warps, plain, four, two = next(entry for entry in _TABLE if num_slots <= entry[0])
    if (
        bits == 4
    ):  # two blocks of 256 columns at once do not fit a thread's registers: 2 KB of each went to memory
        return Launch(rows, warps, four, apart=True, two_blocks=False)
    return Launch(rows, warps, plain, apart=True, two_blocks=two)


def launch_of(num_slots: int, weight: Tiles, *, is_pair: bool, single: bool = False) -> Launch:
    """Return the launch for a number of slots; with `single` each slot is a program."""
    shape = shape_of(1 if single else num_slots, weight.bits)
    if single:
        return shape
    parts = -(-num_slots // shape.rows)
    two = shape.two_blocks and not is_pair and weight.num_blocks // 2 * parts >= 2 * _PROCESSORS
    # Sums that many rows leave for one another cost more than idle processors do.
    apart = num_slots <= _APART_ROWS and weight.num_blocks * parts < 2 * _PROCESSORS
    return replace(shape, apart=apart, two_blocks=two)
