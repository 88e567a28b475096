"""Decides, step by step, who computes how many tokens. It knows tokens and blocks, but neither arrays nor
models.

Rules: sequences are served in the order of their turn (`fairness.py`). Every decoding sequence gets its token
in every step, what remains of the token budget goes to prefills in order, running or waiting. A waiting
sequence is admitted only when the blocks for all its tokens are there, and nobody overtakes the first one in
the queue. Where a place or a block is missing, the last one in the order may have to give way: it gives up
all of its blocks and is computed again later, as far as they did not stay in the prefix cache. It gives way
to a running sequence before it that must grow; to a waiting one of a better level; and to a waiting one of a
tenant that would still run no more sequences than its own tenant keeps. The eldest running sequence of the
best level never gives way, so everyone finishes. A step that brings somebody's first token is kept short:
what tenants with more sequences than theirs get in it takes a quarter of the time of the rest, whether they
bring prompts or decode. Nobody who decodes is left out of two steps in a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from bise.cache.pool import BlockPool
from bise.cache.prefix import Match, PrefixCache
from bise.engine.blocks import BlockBook, Swap
from bise.engine.fairness import FairQueue
from bise.engine.pace import PRICES, Prices
from bise.engine.sequence import Sequence, Status
from bise.errors import ConfigError

SPARE = 0.25
"""What those who ask for more may cost a step that brings a first token, of what it costs without them."""


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

    @property
    def num_decoded(self) -> int:
        """Tokens of the sequences that decode, guesses included."""
        return sum(row.num_tokens for row in self.rows if row.num_tokens == len(row.draft) + 1)


@dataclass(slots=True)
class _Round:
    """One step while it is planned."""

    order: list[Sequence]
    """Who runs, in the order of service; those before `index` had their turn."""
    eldest: Sequence | None
    budget: int
    num_decoding: int
    """Decoding sequences that still have their turn before them: a token is set aside for each."""
    prices: Prices
    may_hold: bool
    """Whether who decodes may be left out of this step."""
    index: int = 0
    rows: list[StepRow] = field(default_factory=list["StepRow"])
    is_open: bool = True
    """Whether a waiting sequence may still be admitted."""
    num_modest: int | None = None
    """Sequences of the tenant, the one with the fewest, for which this step brings a first token."""
    spare: float = 0.0
    """What tenants with more sequences may still cost beside it, in prompt tokens."""
    head: Sequence | None = None
    """The first in the queue while `num_waiting` wait: whoever comes in or gives way changes their number."""
    num_waiting: int = -1


class Scheduler:
    """Owns the queue, the running sequences and their blocks."""

    def __init__(
        self,
        pools: SequenceOf[BlockPool],
        windows: SequenceOf[int | None],
        *,
        max_step_tokens: int,
        max_sequences: int,
        prefix: PrefixCache | None = None,
        swap: Swap | None = None,
    ) -> None:
        """Serve from `pools`, one per window group; at most `max_sequences` run at once.

        Raises ConfigError when a step could not hold a token of every running sequence.
        """
        if not 1 <= max_sequences <= max_step_tokens:
            raise ConfigError(
                f"max_sequences must be from 1 to max_step_tokens ({max_step_tokens}), got {max_sequences}",
                field="max_sequences",
            )
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._book = BlockBook(pools, windows, max_step_tokens, prefix, swap)
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._held_back = False
        """Whether the last step left out somebody who decodes."""

    @property
    def num_sequences(self) -> int:
        """Sequences that wait or run."""
        return len(self.running) + len(self.waiting)

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.running or self.waiting)

    def check_fits(self, num_tokens: int) -> None:
        """Raise MemoryPlanError when a sequence of `num_tokens` could never run, even alone."""
        self._book.check_fits(num_tokens)

    def longest(self, max_context: int) -> int:
        """Return the most tokens, up to `max_context`, of one sequence that can run alone."""
        return self._book.longest(max_context)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; the caller has checked that it fits."""
        self.waiting.enter(sequence)
        self._queue(sequence)

    def finish(self, sequence: Sequence, *, is_sound: bool = True) -> None:
        """Take a sequence out, wherever it is, and free its blocks; unless `is_sound` their content is served
        to nobody else.
        """
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is Status.WAITING:
            self.waiting.pop(sequence)
        self._book.finish(sequence, is_sound=is_sound)
        self.waiting.leave(sequence)
        sequence.status = Status.FINISHED

    def plan(self, budget: int | None = None, prices: Prices = PRICES) -> Step | None:
        """Return the next step of up to `budget` tokens (without one: `max_step_tokens`), None when nothing
        waits or runs. Allocates the blocks that the step writes.

        A budget below the number of running sequences is raised to it: decoding ones skip a step only for
        the first token of a tenant that asks for less, where `prices` say that they would make it long.
        """
        limit = self._max_step_tokens
        if budget is not None:
            limit = min(limit, max(budget, len(self.running) + 1))
        turn = self.waiting.turn
        plan = _Round(
            order=sorted(self.running, key=turn),
            eldest=min(self.running, key=self._age, default=None),
            budget=limit,
            num_decoding=sum(sequence.num_pending == 1 for sequence in self.running),
            prices=prices,
            may_hold=not self._held_back,
        )
        self._held_back = False
        while True:
            sequence = plan.order[plan.index] if plan.index < len(plan.order) else None
            head = self._first_waiting(plan) if plan.is_open and plan.budget > plan.num_decoding else None
            if head is not None and (sequence is None or turn(head) < turn(sequence)):
                plan.is_open = self._admit(head, plan)
            elif sequence is not None:
                self._serve(sequence, plan)
            else:
                break
        if not plan.rows:
            assert not self.has_work, "sequences wait although every block is free"
            return None
        return Step(tuple(plan.rows), sum(row.num_tokens for row in plan.rows))

    def add_drafts(self, step: Step, drafts: SequenceOf[tuple[int, ...]]) -> Step:
        """Return `step` with the guessed tokens `drafts[i]` behind row i, as far as token budget and free
        blocks go; nobody is preempted for a guess.
        """
        budget = self._max_step_tokens - step.num_tokens
        rows: list[StepRow] = []
        for row, draft in zip(step.rows, drafts, strict=True):
            sequence = row.sequence
            room = min(budget, self._book.num_fitting(sequence) - row.num_tokens) if draft else 0
            if room <= 0:
                rows.append(row)
                continue
            taken = draft[:room]
            budget -= len(taken)
            self._book.grow(sequence, row.first + row.num_tokens + len(taken))
            rows.append(
                row._replace(
                    num_tokens=row.num_tokens + len(taken),
                    num_samples=row.num_samples + len(taken),
                    draft=taken,
                )
            )
        return Step(tuple(rows), sum(row.num_tokens for row in rows))

    def complete(self, step: Step) -> None:
        """Record that a step was computed, its guesses excepted, remember its full blocks and free those that
        slid out of each window.
        """
        for row in step.rows:
            sequence = row.sequence
            sequence.num_scored = max(sequence.num_scored, row.score_stop)
            self._advance(sequence, row.first + row.num_tokens - len(row.draft))

    def give_up(self, step: Step) -> None:
        """Record that a step was broken off: nothing of it was computed."""
        for row in step.rows:
            if row.draft:
                self.keep_drafted(row.sequence, 0)

    def keep_drafted(self, sequence: Sequence, count: int) -> None:
        """Record that the first `count` guessed tokens came true, and free the blocks of those that did
        not.
        """
        self._advance(sequence, sequence.num_computed + count)
        for table in sequence.tables:
            table.shrink(sequence.num_computed)

    def check_integrity(self) -> None:
        """Assert that every block is blank, cached, or held by exactly the sequences that run."""
        self._book.check_integrity(self.running)
        assert all(not sequence.tables for sequence in self.waiting), "a waiting sequence holds blocks"

    def _advance(self, sequence: Sequence, end: int) -> None:
        self._book.advance(sequence, end)
        self.waiting.charge(sequence)

    def _queue(self, sequence: Sequence) -> None:
        sequence.status = Status.WAITING
        self.waiting.push(sequence)

    def _first_waiting(self, plan: _Round) -> Sequence | None:
        """Return the first in the queue; looked for among all tenants when somebody left or joined it."""
        if plan.num_waiting != len(self.waiting):
            plan.num_waiting, plan.head = len(self.waiting), self.waiting.head()
        return plan.head

    def _serve(self, sequence: Sequence, plan: _Round) -> None:
        """Give a running sequence its share of the step."""
        plan.index += 1
        pending = sequence.num_pending
        is_decoding = pending == 1
        if is_decoding:
            plan.num_decoding -= 1
        room = plan.budget - plan.num_decoding
        price = plan.prices.row if is_decoding else 1.0
        is_guest = plan.num_modest is not None and self._num_present(sequence) > plan.num_modest
        if is_guest and (plan.may_hold or not is_decoding):
            room = min(room, int(plan.spare / price))
            self._held_back |= is_decoding and not room
        count = self._secure(sequence, min(pending, room), plan)
        if not count:
            return
        row = _row(sequence, count)
        plan.rows.append(row)
        plan.budget -= count
        if is_guest:
            plan.spare -= count * price
        elif row.num_samples and not sequence.num_output:
            # Its first token comes when the step is over: those who ask for much do not make it long.
            known, present = plan.num_modest, self._num_present(sequence)
            plan.spare += SPARE * (count + (plan.prices.step if known is None else 0.0))
            plan.num_modest = present if known is None else min(known, present)

    def _num_present(self, sequence: Sequence) -> int:
        return self.waiting.num_present(sequence.request.tenant)

    def _secure(self, sequence: Sequence, count: int, plan: _Round) -> int:
        """Allocate blocks for up to `count` more tokens and return for how many; makes others give way if it
        must.
        """
        while count > 0:
            fitting = min(count, self._book.num_fitting(sequence))
            if fitting > 0:
                self._book.grow(sequence, sequence.num_computed + fitting)
                return fitting
            victim = next(self._victims(sequence, plan), None)
            if victim is None:
                return 0
            self._preempt(victim, plan)
        return 0

    def _victims(self, sequence: Sequence, plan: _Round) -> Iterator[Sequence]:
        """Yield who gives way to a running sequence: those behind it, from the end; to the eldest everyone
        who has no tokens in this step yet.
        """
        served = {id(row.sequence) for row in plan.rows}
        for other in reversed(plan.order):
            if other is sequence:
                if sequence is not plan.eldest:
                    return
            elif other is not plan.eldest and id(other) not in served:
                yield other

    def _admit(self, head: Sequence, plan: _Round) -> bool:
        """Let the first in the queue run, next in the order of this step, if there is a place; returns
        whether more may follow.
        """
        match: Match | None = None
        leaving: list[Sequence] = []
        for victim in chain(self._yielding(head, plan), (None,)):
            if len(self.running) - len(leaving) < self._max_sequences:
                # A walk over all of its tokens: not while it finds no place anyhow.
                match = self._book.match(head) if match is None else match
                if self._book.has_room(head, match, self.running, leaving):
                    break
            if victim is None:
                return False
            leaving.append(victim)
        assert match is not None
        for victim in leaving:
            self._preempt(victim, plan)
        self.waiting.pop(head)
        head.status = Status.RUNNING
        self.running.append(head)
        self._book.seat(head, match)
        plan.order.insert(plan.index, head)
        plan.num_decoding += head.num_pending == 1
        # Whoever gave way now waits: nobody else comes in before the others had their turn.
        return not leaving

    def _yielding(self, head: Sequence, plan: _Round) -> Iterator[Sequence]:
        """Yield the running sequences that give way to a waiting one, from the end of the order: those of a
        worse level, and those of a tenant that keeps at least as many as the waiting one's tenant would have.
        """
        level = self.waiting.level(head)
        counts = Counter(other.request.tenant for other in self.running)
        wanted = counts[head.request.tenant] + 1
        for other in reversed(plan.order[plan.index :]):
            tenant = other.request.tenant
            fair = tenant != head.request.tenant and counts[tenant] > wanted
            if other is not plan.eldest and (
                self.waiting.level(other) > level or (self.waiting.level(other) == level and fair)
            ):
                counts[tenant] -= 1
                yield other

    def _preempt(self, victim: Sequence, plan: _Round) -> None:
        index = plan.order.index(victim)
        del plan.order[index]
        if index < plan.index:
            plan.index -= 1
        elif victim.num_pending == 1:
            plan.num_decoding -= 1
        plan.is_open = False
        self._book.preempt(victim)
        self.running.remove(victim)
        self.num_preemptions += 1
        self._queue(victim)

    def _age(self, sequence: Sequence) -> tuple[int, int]:
        return (self.waiting.level(sequence), sequence.arrival)


def _row(sequence: Sequence, num_tokens: int) -> StepRow:
    first = sequence.num_computed
    end = first + num_tokens
    samples = int(end == len(sequence.token_ids) and sequence.max_tokens > 0)
    start, stop = max(first, sequence.num_scored), min(end, sequence.num_prompt - 1)
    if not sequence.request.prompt_logprobs or start >= stop:
        start = stop = 0
    return StepRow(sequence, first, num_tokens, samples, start, stop)
