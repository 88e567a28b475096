"""A fixed set of KV blocks of one window group: who owns which, how often, and which are worth keeping.

It knows block numbers and reference counts only: neither tokens, nor positions, nor the bytes behind a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable


class BlockPool:
    """Blocks 0 .. num_blocks - 1; each is blank, or held by one or more owners, or cached: held by nobody,
    its content kept until the room is needed.

    Blank blocks are handed out first, last-freed first: the same few pages stay warm, and memory that was
    never needed is never touched. Then cached ones, the least recently used first.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, num_blocks
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners = [0] * num_blocks
        self._is_kept = bytearray(num_blocks)
        self._cached: dict[int, None] = {}
        """Kept blocks without owner, least recently used first."""
        self._evicted: Callable[[int], None] | None = None

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included: all of them can be allocated."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content is kept."""
        return len(self._cached)

    @property
    def cached(self) -> list[int]:
        """Blocks that nobody holds and whose content is kept, least recently used first."""
        return list(self._cached)

    def on_evict(self, evicted: Callable[[int], None]) -> None:
        """Call `evicted` with each cached block whose content is given up for a new owner."""
        self._evicted = evicted

    def allocate(self) -> int:
        """Take one block, with one owner; the caller has made sure that `num_free` >= 1."""
        if not self._free:
            self.evict_oldest()
        block = self._free.pop()
        self._owners[block] = 1
        return block

    def evict_oldest(self) -> None:
        """Make the least recently used cached block blank; the caller has made sure that there is one."""
        block = next(iter(self._cached))
        if self._evicted is not None:
            self._evicted(block)
        self.forget(block)

    def share(self, block: int) -> None:
        """Add one owner to a block that is held or cached already."""
        assert self._owners[block] > 0 or block in self._cached, f"block {block} is free and cannot be shared"
        self._cached.pop(block, None)
        self._owners[block] += 1

    def free(self, block: int) -> None:
        """Give up one ownership of a block; the last one makes it cached when it is kept, else blank."""
        assert self._owners[block] > 0, f"block {block} is freed twice"
        self._owners[block] -= 1
        if self._owners[block]:
            return
        if self._is_kept[block]:
            self._cached[block] = None
        else:
            self._free.append(block)

    def keep(self, block: int) -> None:
        """Mark the content of a held block as worth keeping after its last owner."""
        assert self._owners[block] > 0, f"block {block} is free and cannot be kept"
        self._is_kept[block] = 1

    def forget(self, block: int) -> None:
        """Take `keep` back; a cached block becomes blank at once."""
        self._is_kept[block] = 0
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def num_owners(self, block: int) -> int:
        """Return how many owners hold `block`."""
        return self._owners[block]

    def check_integrity(self, held: Iterable[int]) -> None:
        """Assert that the owners' blocks, listed once per ownership, the cached and the blank ones make up
        the pool exactly.
        """
        owners = Counter(held)
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        for block, count in enumerate(self._owners):
            assert owners[block] == count, (
                f"block {block}: {owners[block]} owners hold it, {count} are recorded"
            )
            places = (count > 0) + (block in free) + (block in self._cached)
            assert places == 1, f"block {block} is lost or both free and held"
            assert self._is_kept[block] or block not in self._cached, f"block {block} is cached, not kept"
            assert not (self._is_kept[block] and block in free), f"block {block} is kept, but blank"
        assert all(0 <= block < self.num_blocks for block in owners), "a block outside the pool is held"
