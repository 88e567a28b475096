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
    """What a program may keep on chip."""
    least_rows: int = 8
    """Fewest rows of a product in 16 bits; see `least_rows_of`."""

    @property
    def is_large(self) -> bool:
        """True for data-centre cards (compute capability 8.0, 9.0, 10.0), which have 163 KiB and more;
        consumers' (8.6, 8.9, 12.0) have 99.
        """
        return self.shared_bytes >= 160 << 10

    @property
    def sorted_slots(self) -> int:
        """Most slots of an expert that a program computes."""
        return 64 if self.is_large else 32


def least_rows_of(major: int, triton_version: str) -> int:
    """Return how few rows of a product in 16 bits go through the tensor cores of a compute capability as many
    rows do.

    Where warps multiply together (9.0, 10.0) Triton before 3.9 gives eight rows to the instruction of older
    cards. That takes the columns of codes in another order, so that their sums would differ from those of 16;
    for floats it need not be shown that it rounds alike.
    """
    version = tuple(int(part) for part in triton_version.split(".")[:2])
    return 16 if major in (9, 10) and version < (3, 9) else 8


_ROOMY = 99 << 10
"""Turing and AMD's have 64 KiB."""
_FEW = 32
"""Most rows where there is less room, or where values take 32 bits and tensor cores take none of them."""

_LONG = 256
"""Rows of a program of floats where there are enough of them to keep the processors of a large card busy."""

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
    (128, 64, 8, 2, True),
    (1 << 62, 128, 8, 2, True),
)
"""4-bit codes: 256 columns a step, so that 128 rows and two stages take 148 KiB."""

_FOUR_BITS_OF_CONSUMERS = (*_FOUR_BITS[:4], (1 << 62, 32, 8, 2, True))
"""For more rows the assembler takes so many products at once there that their sums do not fit the registers;
32 rows keep tensor cores of an eighth of the rate as busy."""


def shape_of(num_slots: int, bits: int, card: Card, *, is_wide: bool = False) -> Launch:
    """Return rows, warps and stages for a number of slots and a width of codes (0: floats); `is_wide` for
    products in float32.
    """
    table = _FLOATS
    if bits == 4:
        table = _FOUR_BITS if card.is_large else _FOUR_BITS_OF_CONSUMERS
    if is_wide or card.shared_bytes < _ROOMY:
        num_slots = min(num_slots, _FEW)
    least = 1 if is_wide else card.least_rows
    _, rows, warps, stages, two = next(
        entry for entry in table if num_slots <= entry[0] and (entry[1] == 1 or entry[1] >= least)
    )
    return Launch(rows, warps, 2 if card.shared_bytes < _ROOMY else stages, apart=True, two_blocks=two)


def with_norm(launch: Launch, card: Card) -> Launch:
    """Return the launch for rows that the product norms. One row that stands in 16 columns takes so much room
    with its norm that at three stages two programs fit a processor, at two stages four or five.
    """
    return replace(launch, stages=2) if launch.rows == 1 and card.least_rows > 8 else launch


def launch_of(
    num_slots: int,
    weight: Tiles,
    card: Card,
    *,
    is_wide: bool,
    is_pair: bool,
    single: bool = False,
    rows: int | None = None,
) -> Launch:
    """Return the launch for a number of slots; with `single` each slot is a program, with `rows` a program
    has so many.
    """
    if single:
        return shape_of(1, weight.bits, card, is_wide=is_wide)
    # 64 slots of an expert are as good as 64 of many rows.
    like = num_slots if rows is None else rows if rows < 64 else 2 * rows
    shape = shape_of(like, weight.bits, card, is_wide=is_wide)
    if rows is not None:
        shape = replace(shape, rows=rows)
    parts = -(-num_slots // shape.rows)
    least = 2 * card.processors
    apart = num_slots <= _APART_ROWS and weight.num_blocks * parts < least
    if weight.bits == 4:
        # Eight warps have an own block each four: with one block they would take its codes apart twice.
        two = shape.two_blocks and not is_pair and weight.num_blocks > 1 and not apart
        return replace(shape, warps=shape.warps if two or is_pair else 4, apart=apart, two_blocks=two)
    pairs = weight.num_blocks if is_pair else weight.num_blocks // 2
    is_long = weight.bits == 0 and shape.rows == _LONG // 2 and card.is_large and rows is None
    if is_long and pairs * -(-num_slots // _LONG) >= least:
        # A third more products for each byte of the second cache, which else gives a large card too little.
        return Launch(_LONG, shape.warps, shape.stages, apart=False, two_blocks=not is_pair)
    two = shape.two_blocks and not is_pair and pairs * parts >= least
    # Sums that many rows leave for one another cost more than idle processors do.
    return replace(shape, apart=apart, two_blocks=two)
