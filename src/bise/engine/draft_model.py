"""A small model that guesses for a large one: same vocabulary, own weights, own keys and values.

It decodes a few tokens ahead of every sequence that asks for it, all of them together, and draws with the
number that the large model will draw with: where the two agree about the odds they agree about the token.
What it says decides about time alone, see `speculation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from bise.cache.pages import KVCache
from bise.cache.pool import BlockPool
from bise.cache.table import BlockTable
from bise.engine.runner import Logits, Model, Runner
from bise.engine.scheduler import Step, StepRow
from bise.engine.sequence import Sequence, Status
from bise.errors import BiseError, ConfigError
from bise.kernels import Ops
from bise.text.tokenizer import Tokenizer

STEP_TOKENS = 256
"""Tokens of prompts that are caught up with per step, all sequences together."""


class _Mirror:
    """A sequence of the large model as the small one knows it."""

    __slots__ = ("_drafted", "_known", "own", "target")

    def __init__(self, target: Sequence, tables: tuple[BlockTable, ...]) -> None:
        self.target = target
        self.own = Sequence(target.request, target.arrival, target.max_tokens)
        self.own.token_ids = target.token_ids  # the same list: it grows as the large model accepts
        self.own.tables = tables
        self._known = 0
        self._drafted: list[int] = []

    def rewind(self) -> None:
        """Forget keys and values of guesses that did not come true."""
        if self._drafted:
            came = self.own.token_ids[self._known : self._known + len(self._drafted)]
            right = next((at for at, token_id in enumerate(came) if token_id != self._drafted[at]), len(came))
            # The last guess was never an input, so it has no keys and values.
            self.own.num_computed = self._known + min(right, len(self._drafted) - 1)
            self._drafted = []
        for table in self.own.tables:
            table.release_before(self.own.num_computed)

    def keep(self, drafted: list[int]) -> None:
        """Remember what was guessed and computed behind all tokens known now."""
        self._known = self.own.num_computed = len(self.own.token_ids)
        self._drafted = drafted


class DraftModel:
    """Guesses tokens with a model of its own. Used by the engine's thread alone."""

    def __init__(
        self, model: Model, ops: Ops, *, num_blocks: SequenceOf[int], kv_format: str = "f16"
    ) -> None:
        """Allocate `num_blocks` KV blocks per window group of `model`."""
        self._windows = model.config.window_groups
        self._max_context = model.config.max_context
        self._pools = [BlockPool(count) for count in num_blocks]
        self._runner = Runner(model, KVCache(model.config, ops, num_blocks, kv_format))
        self._mirrors: dict[int, _Mirror] = {}

    def draft(self, sequences: SequenceOf[Sequence], count: int) -> list[list[int]]:
        """Return up to `count` guesses for each sequence; none while its prompt is still being caught up
        with, or where blocks or context do not suffice.
        """
        self._drop_finished()
        rows: list[StepRow] = []
        ready: list[tuple[int, _Mirror]] = []
        budget = STEP_TOKENS
        for index, sequence in enumerate(sequences):
            mirror = self._mirror(sequence)
            known, computed = len(sequence.token_ids), mirror.own.num_computed
            taken = min(known - computed, budget)
            is_ready = computed + taken == known
            if not taken or not self._grow(mirror, computed + taken + (count - 1 if is_ready else 0)):
                continue
            budget -= taken
            rows.append(StepRow(mirror.own, computed, taken, int(is_ready), 0, 0))
            if is_ready:
                ready.append((index, mirror))
        drafts: list[list[int]] = [[] for _ in sequences]
        if rows:
            logits = self._run(rows)
            for row in rows:
                row.sequence.num_computed = row.first + row.num_tokens
            self._go_on(ready, drafts, logits, count)
        return drafts

    def _go_on(
        self, ready: list[tuple[int, _Mirror]], drafts: list[list[int]], logits: Logits | None, count: int
    ) -> None:
        """Guess token after token for all that are ready, together."""
        going = ready
        for depth in range(count):
            if logits is None or not going:
                break
            left: list[tuple[int, _Mirror]] = []
            for (index, mirror), scores in zip(going, logits, strict=True):
                if _guess(mirror.target, scores, drafts[index]):
                    left.append((index, mirror))
            going = left
            if depth + 1 < count and going:
                rows = [
                    StepRow(mirror.own, len(mirror.own.token_ids) + depth, 1, 1, 0, 0, (drafts[index][-1],))
                    for index, mirror in going
                ]
                logits = self._run(rows)
        for index, mirror in ready:
            mirror.keep(drafts[index])

    def _run(self, rows: list[StepRow]) -> Logits | None:
        hidden, wanted = self._runner.forward(Step(tuple(rows), sum(row.num_tokens for row in rows)))
        return self._runner.logits(hidden, wanted) if len(wanted) else None

    def _mirror(self, sequence: Sequence) -> _Mirror:
        mirror = self._mirrors.get(id(sequence))
        if mirror is None:
            tables = tuple(
                BlockTable(pool, window) for pool, window in zip(self._pools, self._windows, strict=True)
            )
            mirror = self._mirrors[id(sequence)] = _Mirror(sequence, tables)
        mirror.rewind()
        return mirror

    def _grow(self, mirror: _Mirror, end: int) -> bool:
        """Allocate blocks for positions < `end`; False where that is impossible."""
        tables = mirror.own.tables
        if end > self._max_context or any(
            table.num_missing(end) > pool.num_free for table, pool in zip(tables, self._pools, strict=True)
        ):
            return False
        for table in tables:
            table.extend(end)
        return True

    def _drop_finished(self) -> None:
        """Take back the blocks of sequences that ended or lost their own."""
        for key, mirror in list(self._mirrors.items()):
            if mirror.target.status is not Status.RUNNING:
                for table in mirror.own.tables:
                    table.release_all()
                del self._mirrors[key]


def _guess(target: Sequence, scores: Logits, drafted: list[int]) -> bool:
    """Add the token that the large model would draw from `scores` [V]; False when nothing can follow it."""
    try:
        token_id = target.sampler.choose(
            scores, len(target.token_ids) + len(drafted), target.num_output + len(drafted)
        )
    except BiseError:  # the small model's own numbers are broken: its guesses end here, nothing else does
        return False
    drafted.append(token_id)
    return token_id not in target.stop_ids


def check_same_vocabulary(draft: Tokenizer, target: Tokenizer, name: str) -> None:
    """Raise ConfigError, naming the first difference, unless every token means the same in both."""
    parts: tuple[tuple[str, object, object], ...] = (
        ("its size", draft.vocab_size, target.vocab_size),
        ("the tokens that end a text", sorted(draft.stop_ids), sorted(target.stop_ids)),
        ("the token that begins a text", draft.bos_id, target.bos_id),
    )
    for part, here, there in parts:
        if here != there:
            _refuse(name, f"{part} is {here} there and {there} here".replace("text is [", "text are ["))
    for token_id in range(target.vocab_size):
        here, there = draft.token_bytes(token_id), target.token_bytes(token_id)
        if here != there:
            _refuse(name, f"token {token_id} is {here!r} there and {there!r} here")


def _refuse(name: str, reason: str) -> None:
    raise ConfigError(
        f"{name} cannot guess for this model, their vocabularies differ: {reason}; a draft model needs the "
        "same vocabulary",
        field="draft",
    )
