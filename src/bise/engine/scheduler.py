"""Decides, step by step, who computes how many tokens. It knows tokens and blocks, but neither arrays nor
models.

Rules: sequences are served in the order of (priority, arrival). Every decoding sequence gets its token in
every step, what remains of the token budget goes to prefills in order. A waiting sequence is admitted only
when the blocks for all its tokens are there, and nobody overtakes the first one in the queue. When a block is
missing, the last sequence in the order gives up all of its blocks and is computed again later. The first
sequence therefore always advances, so everyone finishes.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import NamedTuple

from bise.cache.pool import BlockPool
from bise.cache.table import BlockTable, blocks_needed
from bise.engine.sequence import Sequence, Status
from bise.errors import ConfigError, MemoryPlanError
from bise.kernels import BLOCK_SIZE


class StepRow(NamedTuple):
    """One sequence's share of a step: its tokens [first, first + num_tokens), the last ones guessed."""

    sequence: Sequence
    first: int
    """Absolute position of the first token."""
    num_tokens: int
    num_samples: int
    """Rows at the end whose logits choose new tokens: 1 when the sequence is caught up after this step, one
    more per guessed token, else 0.
    """
    score_start: int
    """Positions [score_start, score_stop) are prompt tokens whose successor's log-prob is wanted."""
    score_stop: int
    draft: tuple[int, ...] = ()
    """Guessed tokens at the end of the row; they count only once `Scheduler.keep_drafted` was told so."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes, in row order.

    Example: budget 8, A decodes its 10th token, B brings a prompt of 12: rows (A, 9, 1), (B, 0, 7); the next
    step has (A, 10, 1), (B, 7, 5) and B's last row chooses its first token.
    """

    rows: tuple[StepRow, ...]
    num_tokens: int


class Scheduler:
    """Owns the queue, the running sequences and their blocks."""

    def __init__(
        self,
        pools: SequenceOf[BlockPool],
        windows: SequenceOf[int | None],
        *,
        max_step_tokens: int,
        max_sequences: int,
    ) -> None:
        """Serve from `pools`, one per window group; at most `max_sequences` run at once.

        Raises ConfigError when a step could not hold a token of every running sequence.
        """
        if not 1 <= max_sequences <= max_step_tokens:
            raise ConfigError(
                f"max_sequences must be from 1 to max_step_tokens ({max_step_tokens}), got {max_sequences}",
                field="max_sequences",
            )
        self.waiting: list[Sequence] = []
        """In order of service."""
        self.running: list[Sequence] = []
        """In order of service."""
        self.num_preemptions = 0
        self._pools = tuple(pools)
        self._windows = tuple(windows)
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.running or self.waiting)

    def check_fits(self, num_tokens: int) -> None:
        """Raise MemoryPlanError when a sequence of `num_tokens` could never run, even alone."""
        for pool, window in zip(self._pools, self._windows, strict=True):
            needed = blocks_needed(num_tokens, window)
            if needed > pool.num_blocks:
                raise MemoryPlanError(
                    f"{num_tokens} tokens need {needed} KV blocks of {BLOCK_SIZE} tokens, but the cache "
                    f"holds {pool.num_blocks}; ask for fewer tokens or grant the KV cache more memory",
                    field="max_tokens",
                )

    def longest(self, max_context: int) -> int:
        """Return the most tokens, up to `max_context`, of one sequence that can run alone."""
        held = [pool.num_blocks for pool, window in self._capacities() if window is None]
        tight = [
            pool.num_blocks for pool, window in self._capacities() if window and not _holds(pool, window)
        ]
        return min([max_context, *(count * BLOCK_SIZE for count in held + tight)])

    def _capacities(self) -> list[tuple[BlockPool, int | None]]:
        return list(zip(self._pools, self._windows, strict=True))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the caller has checked that it fits."""
        sequence.status = Status.WAITING
        insort(self.waiting, sequence, key=_rank)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.status = Status.FINISHED

    def plan(self) -> Step | None:
        """Return the next step, None when nothing waits or runs. Allocates the blocks that the step
        writes.
        """
        rows: list[StepRow] = []
        budget = self._max_step_tokens
        running = self.running
        num_decoding = sum(sequence.num_pending == 1 for sequence in running)
        num_before = self.num_preemptions
        index = 0
        while index < len(running):
            sequence = running[index]
            index += 1
            pending = sequence.num_pending
            if pending == 1:
                num_decoding -= 1
            # Decoding sequences further down keep their tokens; those that get preempted leave theirs unused.
            count = self._secure(sequence, min(pending, budget - num_decoding))
            if count:
                rows.append(_row(sequence, count))
                budget -= count
        if self.waiting and budget and self.num_preemptions == num_before:
            self._admit(rows, budget)
        if not rows:
            assert not self.has_work, "sequences wait although every block is free"
            return None
        return Step(tuple(rows), sum(row.num_tokens for row in rows))

    def add_drafts(self, step: Step, drafts: SequenceOf[tuple[int, ...]]) -> Step:
        """Return `step` with the guessed tokens `drafts[i]` behind row i, as far as token budget and free
        blocks go; nobody is preempted for a guess.
        """
        budget = self._max_step_tokens - step.num_tokens
        rows: list[StepRow] = []
        for row, draft in zip(step.rows, drafts, strict=True):
            sequence = row.sequence
            room = min(budget, self._num_fitting(sequence) - row.num_tokens) if draft else 0
            if room <= 0:
                rows.append(row)
                continue
            taken = draft[:room]
            budget -= len(taken)
            for table in sequence.tables:
                table.extend(row.first + row.num_tokens + len(taken))
            rows.append(
                row._replace(
                    num_tokens=row.num_tokens + len(taken),
                    num_samples=row.num_samples + len(taken),
                    draft=taken,
                )
            )
        return Step(tuple(rows), sum(row.num_tokens for row in rows))

    def complete(self, step: Step) -> None:
        """Record that a step was computed, its guesses excepted, and free the blocks that slid out of each
        window.
        """
        for row in step.rows:
            sequence = row.sequence
            sequence.num_scored = max(sequence.num_scored, row.score_stop)
            self._advance(sequence, row.first + row.num_tokens - len(row.draft))

    def keep_drafted(self, sequence: Sequence, count: int) -> None:
        """Record that the first `count` guessed tokens came true, and free the blocks of those that did
        not.
        """
        self._advance(sequence, sequence.num_computed + count)
        for table in sequence.tables:
            table.shrink(sequence.num_computed)

    def _advance(self, sequence: Sequence, end: int) -> None:
        sequence.num_computed = end
        for table in sequence.tables:
            if table.window is not None:
                table.release_before(end)

    def check_integrity(self) -> None:
        """Assert that every block is free or held by exactly the sequences that run."""
        for group, pool in enumerate(self._pools):
            pool.check_integrity(block for sequence in self.running for block in sequence.tables[group].held)
        assert all(not sequence.tables for sequence in self.waiting), "a waiting sequence holds blocks"

    def _secure(self, sequence: Sequence, count: int) -> int:
        """Allocate blocks for up to `count` more tokens and return for how many; preempts those behind if it
        must.
        """
        while count > 0:
            fitting = min(count, self._num_fitting(sequence))
            if fitting > 0:
                end = sequence.num_computed + fitting
                for table in sequence.tables:
                    table.extend(end)
                return fitting
            if self.running[-1] is sequence:
                return 0
            self._preempt(self.running[-1])
        return 0

    def _num_fitting(self, sequence: Sequence) -> int:
        """Return how many more tokens the sequence's own and the free blocks can take."""
        return (
            min(
                (len(table.blocks) + pool.num_free) * BLOCK_SIZE
                for table, pool in zip(sequence.tables, self._pools, strict=True)
            )
            - sequence.num_computed
        )

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._release(victim)
        victim.num_computed = 0
        self.num_preemptions += 1
        self.add(victim)

    def _release(self, sequence: Sequence) -> None:
        for table in sequence.tables:
            table.release_all()
        sequence.tables = ()

    def _admit(self, rows: list[StepRow], budget: int) -> None:
        while self.waiting and budget and len(self.running) < self._max_sequences:
            sequence = self.waiting[0]
            if not self._has_room(sequence):
                return
            del self.waiting[0]
            sequence.tables = tuple(
                BlockTable(pool, window) for pool, window in zip(self._pools, self._windows, strict=True)
            )
            sequence.status = Status.RUNNING
            insort(self.running, sequence, key=_rank)
            count = min(sequence.num_pending, budget, self._num_fitting(sequence))
            for table in sequence.tables:
                table.extend(count)
            rows.append(_row(sequence, count))
            budget -= count

    def _has_room(self, sequence: Sequence) -> bool:
        """True when every pool can take the whole sequence besides what running ones still need to catch up.

        One block per running sequence stays spare, so that a newcomer is not preempted at their next block.
        """
        for group, (pool, window) in enumerate(zip(self._pools, self._windows, strict=True)):
            spare = pool.num_free
            for other in self.running:
                catching_up = other.num_pending > 1
                missing = self._num_blocks(other, window) - other.tables[group].num_held if catching_up else 1
                spare -= max(1, missing)
            # A window's chunks may shrink to what an empty pool holds; nobody would ever be admitted
            # otherwise.
            if spare < min(self._num_blocks(sequence, window), pool.num_blocks):
                return False
        return True

    def _num_blocks(self, sequence: Sequence, window: int | None) -> int:
        return blocks_needed(len(sequence.token_ids) + 1, window, self._max_step_tokens)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _holds(pool: BlockPool, window: int) -> bool:
    """True when a pool holds a whole window wherever it starts, so that a sequence may grow without end."""
    return pool.num_blocks >= blocks_needed(1 << 30, window)


def _row(sequence: Sequence, num_tokens: int) -> StepRow:
    first = sequence.num_computed
    end = first + num_tokens
    samples = int(end == len(sequence.token_ids) and sequence.max_tokens > 0)
    start, stop = max(first, sequence.num_scored), min(end, sequence.num_prompt - 1)
    if not sequence.request.prompt_logprobs or start >= stop:
        start = stop = 0
    return StepRow(sequence, first, num_tokens, samples, start, stop)
