"""A fixed set of KV blocks of one window group: who owns which, and how often.

It knows block numbers and reference counts only: neither tokens, nor positions, nor the bytes behind a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class BlockPool:
    """Blocks 0 .. num_blocks - 1; each is free or held by one or more owners.

    Free blocks are handed out last-freed first: the same few pages stay warm, and memory that was never
    needed is never touched.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, num_blocks
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - len(self._free)

    def allocate(self) -> int:
        """Take one free block, with one owner; the caller has made sure that `num_free` >= 1."""
        block = self._free.pop()
        self._owners[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add one owner to a block that is held already."""
        assert self._owners[block] > 0, f"block {block} is free and cannot be shared"
        self._owners[block] += 1

    def free(self, block: int) -> None:
        """Give up one ownership of a block; the last one makes it free."""
        assert self._owners[block] > 0, f"block {block} is freed twice"
        self._owners[block] -= 1
        if not self._owners[block]:
            self._free.append(block)

    def num_owners(self, block: int) -> int:
        """Return how many owners hold `block`."""
        return self._owners[block]

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that the owners' blocks, listed once per ownership, and the free list make up the pool
        exactly.
        """
        owners = Counter(held)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        for block, count in enumerate(self._owners):
            assert owners[block] == count, (
                f"block {block}: {owners[block]} owners hold it, {count} are recorded"
            )
            assert (block in free) == (count == 0), f"block {block} is lost or both free and held"
        assert all(0 <= block < self.num_blocks for block in owners), "a block outside the pool is held"
