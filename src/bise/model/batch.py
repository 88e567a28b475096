"""The input of one forward pass. The model owns the type it consumes; the runner fills it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bise.kernels import AttentionMeta, Lora

IntArray = npt.NDArray[np.int32]


class AdaptedRows(NamedTuple):
    """Rows of a step that share one LoRA adapter."""

    loras: Mapping[str, Lora]
    """By the name of the weight they add to, such as `layers.0.wq`."""
    rows: npt.NDArray[np.intp]
    """[n] their numbers, ascending; no row has two adapters."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A ragged step: rows of several sequences laid end to end."""

    token_ids: IntArray
    """[T] token of each row."""
    positions: IntArray
    """[T] absolute position of each row."""
    attention: tuple[AttentionMeta, ...]
    """One per window group of the model, in the order of `ModelConfig.window_groups`."""
    logit_rows: IntArray
    """[R] rows whose logits are wanted, ascending."""
    adapted: tuple[AdaptedRows, ...] = ()
    """One per adapter in use; rows that are named in none go through the model as it is."""

    def with_adapters(self, adapted: tuple[AdaptedRows, ...]) -> Batch:
        """Return the same step with adapters on some of its rows."""
        return replace(self, adapted=adapted)


def training_batch(token_ids: npt.NDArray[np.int32], num_groups: int) -> Batch:
    """Return a batch of equal-length rows [S, L] for a pass without a cache; logits for every row.

    Example: [[5, 6, 7], [8, 9, 10]] gives token_ids [5, 6, 7, 8, 9, 10], positions [0, 1, 2, 0, 1, 2] and
    q_start [0, 3, 6].
    """
    num_sequences, length = int(token_ids.shape[0]), int(token_ids.shape[1])
    rows = num_sequences * length
    meta = AttentionMeta(
        q_start=np.arange(0, rows + 1, length, dtype=np.int32),
        q_pos=np.zeros(num_sequences, np.int32),
        block_table=np.zeros((num_sequences, 0), np.int32),
        slots=np.zeros(0, np.int32),
    )
    return Batch(
        token_ids=np.ascontiguousarray(token_ids, np.int32).reshape(-1),
        positions=np.tile(np.arange(length, dtype=np.int32), num_sequences),
        attention=(meta,) * num_groups,
        logit_rows=np.arange(rows, dtype=np.int32),
    )


def texts_batch(texts: Sequence[Sequence[int]], num_groups: int) -> Batch:
    """Return a batch of texts of any lengths laid end to end for a pass without a cache; logits for every
    row.

    Example: [[5, 6, 7], [8]] gives token_ids [5, 6, 7, 8], positions [0, 1, 2, 0] and q_start [0, 3, 4].
    """
    lengths = [len(text) for text in texts]
    rows = sum(lengths)
    meta = AttentionMeta(
        q_start=np.cumsum([0, *lengths], dtype=np.int32),
        q_pos=np.zeros(len(texts), np.int32),
        block_table=np.zeros((len(texts), 0), np.int32),
        slots=np.zeros(0, np.int32),
    )
    return Batch(
        token_ids=np.concatenate([np.asarray(text, np.int32) for text in texts]),
        positions=np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
        attention=(meta,) * num_groups,
        logit_rows=np.arange(rows, dtype=np.int32),
    )
