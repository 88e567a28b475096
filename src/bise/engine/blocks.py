"""The blocks of all sequences: who fits, who holds what, what is remembered for others. No arrays.

It knows pools, tables and the prefix cache; who is served when is the scheduler's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from bise.cache.pool import BlockPool
from bise.cache.prefix import NO_MATCH, Match, PrefixCache
from bise.cache.table import BlockTable, blocks_needed
from bise.engine.sequence import Sequence
from bise.errors import MemoryPlanError
from bise.kernels import BLOCK_SIZE


class Swap(Protocol):
    """Where preempted sequences may leave what they hold; see `swap.SwapSpace`."""

    def save(self, sequence: Sequence) -> bool:
        """Copy what a running sequence holds; False when that is not worth it."""
        ...

    def num_computed(self, sequence: Sequence) -> int:
        """Return how many tokens of a waiting sequence are stored; 0 for none."""
        ...

    def restore(self, sequence: Sequence) -> None:
        """Put what is stored into the new, empty tables of its sequence."""
        ...

    def drop(self, sequence: Sequence) -> None:
        """Forget what is stored of a sequence, if anything."""
        ...


class BlockBook:
    """Gives blocks to sequences and takes them back, one pool per window group."""

    def __init__(
        self,
        pools: SequenceOf[BlockPool],
        windows: SequenceOf[int | None],
        max_step_tokens: int,
        prefix: PrefixCache | None = None,
        swap: Swap | None = None,
    ) -> None:
        """Without `prefix` nothing is remembered once nobody holds it, without `swap` preempted sequences are
        computed again.
        """
        self.pools = tuple(pools)
        self._windows = tuple(windows)
        self._max_step_tokens = max_step_tokens
        self.prefix = prefix
        self._swap = swap

    def check_fits(self, num_tokens: int) -> None:
        """Raise MemoryPlanError when a sequence of `num_tokens` could never run, even alone."""
        for pool, window in zip(self.pools, self._windows, strict=True):
            needed = blocks_needed(num_tokens, window)
            if needed > pool.num_blocks:
                raise MemoryPlanError(
                    f"{num_tokens} tokens need {needed} KV blocks of {BLOCK_SIZE} tokens, but the cache "
                    f"holds {pool.num_blocks}; ask for fewer tokens or grant the KV cache more memory",
                    field="max_tokens",
                )

    def longest(self, max_context: int) -> int:
        """Return the most tokens, up to `max_context`, of one sequence that can run alone."""
        tight = [
            pool.num_blocks
            for pool, window in zip(self.pools, self._windows, strict=True)
            if window is None or not _holds(pool, window)
        ]
        return min([max_context, *(count * BLOCK_SIZE for count in tight)])

    def match(self, sequence: Sequence) -> Match:
        """Return the longest prefix of a waiting sequence that is there and need not be computed.

        The last token is always computed, since its logits choose the next one; so is every prompt position
        whose log-probs or hidden state are still wanted.
        """
        if self.prefix is None or sequence.salt is None:
            return NO_MATCH
        if self._swap is not None and self._swap.num_computed(sequence):
            return NO_MATCH  # all of it is there
        limit = len(sequence.token_ids) - 1
        request = sequence.request
        if request.prompt_logprobs and sequence.num_scored < sequence.num_prompt - 1:
            limit = min(limit, sequence.num_scored)
        if request.pooling == "mean":
            limit = 0
        return self.prefix.match(sequence.salt, sequence.token_ids, limit)

    def has_room(
        self, sequence: Sequence, match: Match, running: Collection[Sequence], leaving: Collection[Sequence]
    ) -> bool:
        """True when every pool can take the whole sequence besides what running ones still need to catch up,
        once those that are `leaving` have given their blocks back.

        One block per running sequence stays spare, so that a newcomer is not preempted at their next block.
        """
        for group, (pool, window) in enumerate(zip(self.pools, self._windows, strict=True)):
            given = Counter(block for other in leaving for block in other.tables[group].held)
            spare = pool.num_free + sum(pool.num_owners(block) == count for block, count in given.items())
            for other in running:
                if other in leaving:
                    continue
                catching_up = other.num_pending > 1
                missing = self._num_blocks(other, window) - other.tables[group].num_held if catching_up else 1
                spare -= max(1, missing)
            needed = self._num_blocks(sequence, window)
            if self.prefix is not None and window is None:
                needed -= self.prefix.num_shared(match, group, given)
            # A window's chunks may shrink to what an empty pool holds; nobody would ever be admitted
            # otherwise.
            if spare < min(needed, pool.num_blocks):
                return False
        return True

    def seat(self, sequence: Sequence, match: Match) -> None:
        """Give a sequence its tables, the blocks of `match` already in them."""
        sequence.tables = tuple(
            BlockTable(pool, window) for pool, window in zip(self.pools, self._windows, strict=True)
        )
        if self._swap is not None and self._swap.num_computed(sequence):
            self._swap.restore(sequence)
        if self.prefix is None or sequence.salt is None:
            return
        sequence.tail = self.prefix.adopt(match, sequence.salt, sequence.tables)
        sequence.num_computed = max(sequence.num_computed, match.num_tokens)
        sequence.num_kept = match.num_tokens // BLOCK_SIZE
        sequence.num_charged = max(sequence.num_charged, match.num_tokens)
        if sequence.num_cached is None:
            sequence.num_cached = min(match.num_tokens, sequence.num_prompt)

    def num_fitting(self, sequence: Sequence) -> int:
        """Return how many more tokens the sequence's own and the free blocks can take."""
        return (
            min(
                (len(table.blocks) + pool.num_free) * BLOCK_SIZE
                for table, pool in zip(sequence.tables, self.pools, strict=True)
            )
            - sequence.num_computed
        )

    def grow(self, sequence: Sequence, end: int) -> None:
        """Allocate blocks until positions < `end` can be stored; the caller has checked that they fit."""
        for table in sequence.tables:
            table.extend(end)

    def advance(self, sequence: Sequence, end: int) -> None:
        """Record that positions < `end` are computed: remember the blocks that are full now, and give back
        those that slid out of each window.
        """
        sequence.num_computed = end
        self._remember(sequence)
        for table in sequence.tables:
            if table.window is not None:
                table.release_before(end)

    def preempt(self, sequence: Sequence) -> None:
        """Take all blocks back from a sequence that will run again, from where it was or from the start."""
        if self._swap is None or not self._swap.save(sequence):
            sequence.num_computed = 0
        self.release(sequence)

    def finish(self, sequence: Sequence, *, is_sound: bool) -> None:
        """Take all blocks back from a sequence that is over; unless `is_sound` nobody else is served them."""
        if not is_sound and self.prefix is not None:
            self.prefix.disown(sequence.tables)
        self.release(sequence)
        if self._swap is not None:
            self._swap.drop(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take all blocks back; full ones stay cached."""
        for table in sequence.tables:
            table.release_all()
        sequence.tables = ()
        if sequence.tail is not None:
            assert self.prefix is not None
            self.prefix.release(sequence.tail)
            sequence.tail = None

    def check_integrity(self, running: Collection[Sequence]) -> None:
        """Assert that every block is blank, cached, or held by exactly the sequences that run."""
        for group, pool in enumerate(self.pools):
            pool.check_integrity(block for sequence in running for block in sequence.tables[group].held)
        if self.prefix is not None:
            self.prefix.check_integrity(sequence.tail for sequence in running if sequence.tail is not None)

    def _remember(self, sequence: Sequence) -> None:
        # A guessed token that came true may not be written down yet: its block waits for the next step.
        known = min(sequence.num_computed, len(sequence.token_ids)) // BLOCK_SIZE
        while sequence.tail is not None and sequence.num_kept < known:
            assert self.prefix is not None
            index = sequence.num_kept
            tokens = sequence.token_ids[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
            blocks = [table.blocks[index] for table in sequence.tables]
            sequence.tail = self.prefix.extend(sequence.tail, tokens, blocks)
            sequence.num_kept += 1

    def _num_blocks(self, sequence: Sequence, window: int | None) -> int:
        return blocks_needed(len(sequence.token_ids) + 1, window, self._max_step_tokens)


def _holds(pool: BlockPool, window: int) -> bool:
    """True when a pool holds a whole window wherever it starts, so that a sequence may grow without end."""
    return pool.num_blocks >= blocks_needed(1 << 30, window)
