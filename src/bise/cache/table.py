"""One sequence's block table for one window group: logical block -> physical block, position -> slot.

Logical block b holds positions [32 b, 32 b + 32). In a windowed group blocks that slid out are given back at
once and their entries become -1, so that the table keeps its absolute numbering whatever was freed.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from bise.cache.pool import BlockPool
from bise.kernels import BLOCK_SIZE

ABSENT = -1
"""Table entry of a block that slid out of the window."""


def blocks_spanned(num_tokens: int) -> int:
    """Return how many blocks `num_tokens` consecutive positions touch at most, wherever they start.

    Example: 1 token touches 1 block, 2 tokens up to 2, 33 tokens up to 2, 34 tokens up to 3, 4096 tokens up
    to 129.
    """
    return (num_tokens + 2 * BLOCK_SIZE - 2) // BLOCK_SIZE


def blocks_needed(num_tokens: int, window: int | None, chunk: int = 1) -> int:
    """Return the blocks that one sequence needs at most while it grows to `num_tokens` in steps of `chunk`
    tokens.
    """
    whole = -(-num_tokens // BLOCK_SIZE)
    return whole if window is None else min(whole, blocks_spanned(window - 1 + chunk))


def first_visible(next_position: int, window: int | None) -> int:
    """Return the first logical block that the query at `next_position`, or any later one, can see."""
    return 0 if window is None else max(0, next_position - window + 1) // BLOCK_SIZE


class BlockTable:
    """Blocks of one sequence; owns what it holds until `release_before` or `release_all`."""

    __slots__ = ("_first", "_pool", "blocks", "window")

    def __init__(self, pool: BlockPool, window: int | None) -> None:
        self._pool = pool
        self._first = 0
        self.window = window
        self.blocks = array("i")
        """Physical block of each logical block, or -1; int32, so that the runner can view it as an array."""

    @property
    def first(self) -> int:
        """The first logical block that is held, if any is."""
        return self._first

    @property
    def num_held(self) -> int:
        """Blocks held now."""
        return len(self.blocks) - self._first

    @property
    def held(self) -> list[int]:
        """Physical blocks held now, in logical order."""
        return self.blocks[self._first :].tolist()

    def num_missing(self, end: int) -> int:
        """Return how many blocks must be allocated before positions < `end` can be stored."""
        return -(-end // BLOCK_SIZE) - len(self.blocks)

    def extend(self, end: int) -> None:
        """Allocate blocks until positions < `end` can be stored; the caller has checked that they are
        free.
        """
        for _ in range(self.num_missing(end)):
            self.blocks.append(self._pool.allocate())

    def shrink(self, end: int) -> None:
        """Free the blocks at the end that hold no position < `end`; `extend` allocates them again."""
        kept = max(-(-end // BLOCK_SIZE), self._first)
        for block in reversed(self.blocks[kept:]):
            self._pool.free(block)
        del self.blocks[kept:]

    def adopt(self, first: int, blocks: Sequence[int]) -> None:
        """Become a further owner of `blocks`, which hold the logical blocks from `first` on; the table is
        empty.
        """
        assert not self.blocks, "only an empty table adopts blocks"
        for block in blocks:
            self._pool.share(block)
        self.blocks = array("i", [ABSENT] * first)
        self.blocks.extend(blocks)
        self._first = first

    def resume(self, first: int, count: int) -> None:
        """Allocate `count` blocks for the logical blocks from `first` on; the table is empty."""
        assert not self.blocks, "only an empty table resumes"
        self.blocks = array("i", [ABSENT] * first)
        self._first = first
        for _ in range(count):
            self.blocks.append(self._pool.allocate())

    def slot(self, position: int) -> int:
        """Return the physical slot (block * 32 + offset) of a position that is stored."""
        block = self.blocks[position // BLOCK_SIZE]
        assert block != ABSENT, f"position {position} slid out of the window"
        return block * BLOCK_SIZE + position % BLOCK_SIZE

    def release_before(self, next_position: int) -> None:
        """Free the blocks that the query at `next_position` and all later ones cannot see.

        Example: window 48, next query at 100: it sees 53 .. 100, so block 0 (0..31) goes and block 1 (32..63)
        stays.
        """
        first = min(first_visible(next_position, self.window), len(self.blocks))
        while self._first < first:
            self._pool.free(self.blocks[self._first])
            self.blocks[self._first] = ABSENT
            self._first += 1

    def release_all(self) -> None:
        """Free everything and start again from position 0."""
        # The end first: of a cached prefix the beginning serves most, so it is to be evicted last.
        for block in reversed(self.held):
            self._pool.free(block)
        self.blocks = array("i")
        self._first = 0
