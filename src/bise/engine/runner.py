"""Runs a step: `Step` to `Batch`, the model's forward pass, rows of logits as numpy float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bise.cache.pages import KVCache
from bise.config import ModelConfig
from bise.engine.candidates import Candidates, Chooses, choose_there, on_host
from bise.engine.scheduler import Step, StepRow
from bise.kernels import BLOCK_SIZE, Array, AttentionMeta, Ops, Pages
from bise.model.batch import AdaptedRows, Batch
from bise.model.lora import Adapter
from bise.model.transformer import LayerPages

Logits = npt.NDArray[np.float32]

SCORE_ROWS = 64
"""Rows of prompt log-probs computed at once: 64 x 128k float32 logits are 32 MiB."""


class Model(Protocol):
    """What the engine needs of a model; `Transformer` is one."""

    config: ModelConfig

    def forward(self, batch: Batch, cache: LayerPages | None = None) -> Array:
        """Return hidden states [T, E]."""
        ...

    def logits(self, hidden: Array) -> Array:
        """Return scores [R, V] of hidden rows [R, E]."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """A model that gets ready for the pages that it is going to write to."""

    def prepare(self, cache: LayerPages) -> None:
        """Get ready."""
        ...


def build_batch(step: Step, num_groups: int) -> Batch:
    """Lay the rows of a step end to end.

    Example (one window group, blocks of 32): A decodes position 40, token 7, its table is [5, 2]; B brings
    its first three tokens 1, 8, 9, its table is [0]:

        token_ids   = [7, 1, 8, 9]        positions = [40, 0, 1, 2]
        q_start     = [0, 1, 4]           q_pos     = [40, 0]
        block_table = [[5, 2], [0, -1]]   slots     = [2 * 32 + 8, 0, 1, 2]
        logit_rows  = [0, 3]              A's only row and, when B is caught up after it, B's last
    """
    num_rows = len(step.rows)
    token_ids = np.empty(step.num_tokens, np.int32)
    positions = np.empty(step.num_tokens, np.int32)
    q_start = np.empty(num_rows + 1, np.int32)
    q_pos = np.empty(num_rows, np.int32)
    logit_rows: list[int] = []
    start = 0
    for index, row in enumerate(step.rows):
        q_start[index] = start
        q_pos[index] = row.first
        stop = start + row.num_tokens
        if row.num_tokens == 1 and not row.draft:
            token_ids[start] = row.sequence.token_ids[row.first]
            positions[start] = row.first
        else:
            known = row.sequence.token_ids[row.first : row.first + row.num_tokens - len(row.draft)]
            token_ids[start:stop] = (*known, *row.draft)
            positions[start:stop] = np.arange(row.first, row.first + row.num_tokens, dtype=np.int32)
        start = stop
        logit_rows.extend(range(stop - row.num_samples, stop))
    q_start[num_rows] = start
    return Batch(
        token_ids=token_ids,
        positions=positions,
        attention=tuple(_attention_meta(step, group, q_start, q_pos) for group in range(num_groups)),
        logit_rows=np.array(logit_rows, np.int32),
        adapted=_adapted_rows(step),
    )


def _adapted_rows(step: Step) -> tuple[AdaptedRows, ...]:
    """Return the rows of each adapter in use, adapters in the order of their first row."""
    rows: dict[str, tuple[Adapter, list[int]]] = {}
    start = 0
    for row in step.rows:
        adapter = row.sequence.adapter
        if adapter is not None:
            _, numbers = rows.setdefault(adapter.sha256, (adapter, []))
            numbers.extend(range(start, start + row.num_tokens))
        start += row.num_tokens
    return tuple(AdaptedRows(adapter.loras, np.array(numbers, np.intp)) for adapter, numbers in rows.values())


def _attention_meta(
    step: Step, group: int, q_start: npt.NDArray[np.int32], q_pos: npt.NDArray[np.int32]
) -> AttentionMeta:
    width = max(len(row.sequence.tables[group].blocks) for row in step.rows)
    block_table = np.full((len(step.rows), width), -1, np.int32)
    slots = np.empty(step.num_tokens, np.int32)
    start = 0
    for index, row in enumerate(step.rows):
        table = row.sequence.tables[group]
        # The view must not outlive this line: an exported array cannot grow.
        block_table[index, : len(table.blocks)] = np.frombuffer(table.blocks, np.int32)
        if row.num_tokens == 1:
            slots[start] = table.slot(row.first)
        else:
            positions = np.arange(row.first, row.first + row.num_tokens, dtype=np.int32)
            blocks = block_table[index, positions // BLOCK_SIZE]
            slots[start : start + row.num_tokens] = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        start += row.num_tokens
    return AttentionMeta(q_start=q_start, q_pos=q_pos, block_table=block_table, slots=slots)


class WatchedPages:
    """The pages of a KV cache, with a call before each layer that takes its pages; the call may raise."""

    def __init__(self, pages: LayerPages, watch: Callable[[], None]) -> None:
        """Call `watch` before each layer of `pages`."""
        self._pages = pages
        self._watch = watch

    def layer(self, index: int) -> Pages:
        """Return the pages of a layer."""
        self._watch()
        return self._pages.layer(index)


class Runner:
    """Owns the model and its KV pages."""

    def __init__(self, model: Model, cache: KVCache, ops: Ops | None = None) -> None:
        """Run `model` over `cache`; with `ops` that can choose tokens, logits need not leave the device."""
        self._model = model
        self._cache = cache
        self._chooser = ops if isinstance(ops, Chooses) else None
        # A device has a step queued as a whole: it would be computed all the same.
        self._can_break_off = ops is not None and ops.name == "cpu"
        self._num_groups = len(model.config.window_groups)
        if isinstance(model, Prepares):
            model.prepare(cache)

    def forward(
        self, step: Step, watch: Callable[[], None] | None = None
    ) -> tuple[Array, npt.NDArray[np.int32]]:
        """Compute a step; returns (hidden states [T, E], rows whose logits choose tokens [R]). On the
        processor `watch` is called before each layer, and breaks the step off where it raises.
        """
        batch = build_batch(step, self._num_groups)
        pages: LayerPages = self._cache
        if watch is not None and self._can_break_off:
            pages = WatchedPages(self._cache, watch)
        return self._model.forward(batch, pages), batch.logit_rows

    def logits(self, hidden: Array, rows: npt.NDArray[np.int32]) -> Logits:
        """Return the logits [R, V] of `rows` of hidden states [T, E]."""
        return on_host(self._scores(hidden, rows))

    def candidates(self, step: Step, hidden: Array, rows: npt.NDArray[np.int32]) -> Candidates:
        """Return, for the rows of a step that choose tokens, logits [V] or the token chosen from them."""
        if self._chooser is None:
            return self.logits(hidden, rows)
        return choose_there(step, self._scores(hidden, rows), self._chooser)

    def _scores(self, hidden: Array, rows: npt.NDArray[np.int32]) -> Array:
        return self._model.logits(hidden if len(rows) == len(hidden) else hidden[rows])


def score_rows(row: StepRow, start: int) -> list[npt.NDArray[np.int32]]:
    """Return the step's row numbers to score for one sequence whose rows begin at `start`, in slices of
    64.
    """
    first = start + row.score_start - row.first
    last = start + row.score_stop - row.first
    return [
        np.arange(low, min(low + SCORE_ROWS, last), dtype=np.int32) for low in range(first, last, SCORE_ROWS)
    ]
