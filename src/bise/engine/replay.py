"""Decode steps that are told once and done again in one native call.

Between two operations of a small model Python takes as long as they do. Steps in which few sequences bring
one row each are recorded when they first come, one recording per number of rows, over arrays that never move;
later steps copy their rows there. Everything else, prompts and guesses and adapters, runs as it is. The
kernels are the same ones, so the bits are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bise.config import ModelConfig
from bise.kernels import BLOCK_SIZE, Array, AttentionMeta, Weight
from bise.kernels.cpu import CpuOps, Floats, RecordingOps
from bise.model.batch import Batch
from bise.model.transformer import LayerPages, Transformer

MAX_ROWS = 8
"""Rows of recorded steps at most: with more, the kernels take most of the time."""

STEP_BYTES = 2 << 20
"""Memory of a recorded step at most: each operation keeps its own results. In a model that needs more the
kernels take most of the time with one row, too.
"""


class _Step:
    """A recorded step of so many sequences, and where it finds its rows."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        ops: CpuOps,
        cache: LayerPages,
        num_rows: int,
        width: int,
    ) -> None:
        """Record it for block tables of up to `width` blocks."""
        self._ids = np.zeros(num_rows, np.int32)
        self._positions = np.zeros(num_rows, np.int32)
        starts = np.arange(num_rows + 1, dtype=np.int32)
        self._metas = tuple(
            AttentionMeta(
                q_start=starts,
                q_pos=self._positions,
                block_table=np.full((num_rows, width), -1, np.int32),
                slots=np.zeros(num_rows, np.int32),
            )
            for _ in config.window_groups
        )
        rows: npt.NDArray[np.int32] = np.arange(num_rows, dtype=np.int32)
        batch = Batch(self._ids, self._positions, self._metas, rows)
        self._ops = RecordingOps(ops)
        self._transformer = Transformer(config, weights, self._ops)  # its weights and banks must stay alive
        self.hidden: Floats = self._transformer.forward(batch, cache)
        self.logits: Floats = self._transformer.logits(self.hidden)

    def run(self, batch: Batch) -> Floats:
        """Compute a step of as many rows; returns hidden states that are valid until the next one."""
        self._ids[:] = batch.token_ids
        self._positions[:] = batch.positions
        for own, given in zip(self._metas, batch.attention, strict=True):
            own.slots[:] = given.slots
            own.block_table[:, : given.block_table.shape[1]] = given.block_table
        self._ops.replay()
        return self.hidden


def row_bytes(config: ModelConfig) -> int:
    """Return the bytes of the results of a step's operations, per row."""
    layer = 2 * config.q_dim + 2 * config.kv_dim + 4 * config.dim
    return 4 * (config.num_layers * layer + config.vocab_size)


class ReplayedModel:
    """A model on the processor whose decode steps are recorded; see `engine.runner.Model`."""

    def __init__(
        self, model: Transformer, weights: Mapping[str, Weight | Array], ops: CpuOps, *, max_context: int
    ) -> None:
        """Record steps of texts of up to `max_context` tokens; `weights` are those of `model`."""
        self.config: ModelConfig = model.config
        self._model = model
        self._weights = weights
        self._ops = ops
        self._width = -(-max_context // BLOCK_SIZE)
        self._max_rows = min(MAX_ROWS, STEP_BYTES // row_bytes(model.config))
        self._cache: LayerPages | None = None
        self._steps: dict[int, _Step] = {}

    def prepare(self, cache: LayerPages) -> None:
        """Record steps over the pages of `cache` from now on."""
        self._cache = cache
        self._steps.clear()

    def forward(self, batch: Batch, cache: LayerPages | None = None) -> Array:
        """See `Model.forward`."""
        num_rows = len(batch.token_ids)
        if num_rows > self._max_rows or cache is None or cache is not self._cache or batch.adapted:
            return self._model.forward(batch, cache)
        for meta in batch.attention:
            if len(meta.q_pos) != num_rows or meta.block_table.shape[1] > self._width:
                return self._model.forward(batch, cache)
        step = self._steps.get(num_rows)
        if step is None:
            step = _Step(self.config, self._weights, self._ops, cache, num_rows, self._width)
            self._steps[num_rows] = step
        return step.run(batch)

    def logits(self, hidden: Array) -> Array:
        """See `Model.logits`."""
        for step in self._steps.values():
            if hidden is step.hidden:
                return step.logits
        return self._model.logits(hidden)
