"""How many rows, warps and stages a matrix product gets: a table, not a search at start.

Nothing here changes a result: columns are summed in the order that the weight's shape gives. The numbers come
from arithmetic on bytes in flight, registers and instructions (docs/gpu.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bise.kernels.triton.tiles import Tiles

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


@dataclass(frozen=True, slots=True)
class Card:
    """What of a GPU decides how a product is launched; that of an H200 unless told otherwise."""

    processors: int = 132
    shared_bytes: int = 227 << 10
    """What the programs of a processor may keep on chip, one program at most."""

    @property
    def is_large(self) -> bool:
        """True for data-centre cards (compute capability 8.0, 9.0, 10.0: 163 KiB and more); consumers' (8.6,
        8.9, 12.0) have 99 KiB.
        """
        return self.shared_bytes >= 160 << 10


_FLOATS = (
    # most slots, rows, warps, stages, two blocks
    (8, 8, 4, 4, False),
    (16, 16, 4, 4, False),
    (32, 32, 4, 4, False),
    (64, 64, 4, 3, False),
    (256, 64, 4, 3, True),
    (1 << 62, 128, 8, 3, True),
)
"""Floats and 8-bit codes: 64 columns a step."""

_FOUR_BITS = (
    (1, 1, 4, 3, False),
    (8, 8, 4, 4, False),
    (16, 16, 4, 3, False),
    (32, 32, 4, 3, False),
    (64, 64, 4, 2, False),
    (128, 64, 8, 2, True),
    (1 << 62, 128, 8, 2, True),
)
"""4-bit codes: 256 columns a step, so that 128 rows and two stages take 148 KiB: too much for a consumer's
card, which computes 64 rows."""

_SMALL_CARD_ROWS = 64


def shape_of(num_slots: int, bits: int, card: Card) -> Launch:
    """Return rows, warps and stages for a number of slots and a width of codes (0: floats)."""
    table = _FOUR_BITS if bits == 4 else _FLOATS
    if bits == 4 and not card.is_large:
        table = tuple(entry for entry in table if entry[1] <= _SMALL_CARD_ROWS)
        num_slots = min(num_slots, table[-1][0])
    _, rows, warps, stages, two = next(entry for entry in table if num_slots <= entry[0])
    return Launch(rows, warps, stages, apart=True, two_blocks=two)


def launch_of(
    num_slots: int, weight: Tiles, card: Card, *, is_pair: bool, single: bool = False, rows: int | None = None
) -> Launch:
    """Return the launch for a number of slots; with `single` each slot is a program, with `rows` a program
    has so many.
    """
    if single:
        return shape_of(1, weight.bits, card)
    # 64 slots of an expert are as good as 64 of many rows.
    shape = shape_of(num_slots if rows is None else rows if rows < 64 else 2 * rows, weight.bits, card)
    if rows is not None:
        shape = replace(shape, rows=rows)
    parts = -(-num_slots // shape.rows)
    least = 2 * card.processors
    apart = num_slots <= _APART_ROWS and weight.num_blocks * parts < least
    if weight.bits == 4:
        # Eight warps have an own block each four: with one block they would take its codes apart twice.
        two = shape.two_blocks and not is_pair and weight.num_blocks > 1 and not apart
        return replace(shape, warps=shape.warps if two or is_pair else 4, apart=apart, two_blocks=two)
    two = shape.two_blocks and not is_pair and weight.num_blocks // 2 * parts >= least
    # Sums that many rows leave for one another cost more than idle processors do.
    return replace(shape, apart=apart, two_blocks=two)
