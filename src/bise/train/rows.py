"""The torch backend for training rows: what a sliding window hides is not computed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bise.config import ModelConfig
from bise.kernels.torch import TorchOps
from bise.model.rope import rope_frequencies

LEAST_CHUNK = 64
"""Queries that are computed at once, however narrow the window is."""


class RowOps(TorchOps):
    """TorchOps whose attention over rows without a cache goes by chunks of about a window."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """See `TorchOps`."""
        super().__init__(dtype, device)
        self._tables: tuple[Tensor, Tensor] | None = None

    def fix_rows(self, config: ModelConfig, num_rows: int, row_tokens: int) -> None:
        """Make the rotary tables of `num_rows` rows of `row_tokens` tokens once: every batch from now on has
        these positions, and nothing of a step is left to numpy (torch.compile needs that).
        """
        frequencies, factor = rope_frequencies(config)
        positions = np.tile(np.arange(row_tokens, dtype=np.int32), num_rows)
        self._tables = super().rope(frequencies, positions, factor)

    def rope(
        self, inv_freq: npt.NDArray[np.float64], positions: npt.NDArray[np.int32], factor: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.rope`; the tables of `fix_rows`, if it was called."""
        return self._tables or super().rope(inv_freq, positions, factor)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor, num_sequences: int, window: int | None) -> Tensor:
        """Return attention [T, H*D] of q [T, H, D] over k and v [T, G, D].

        Queries [c, c + C) see only keys (c - W, c + C), so much of a long row is never computed. Plain matrix
        products in bf16 beat the fused attention of torch: 6.3 against 5.2 to 5.9 thousand tokens a second
        for the whole step (2 cores of Zen 4, 21 Nov 2026). Scores and softmax are float32 at least.
        """
        rows, length = num_sequences, q.shape[0] // num_sequences
        if window is None or window >= length:
            return super()._attend_rows(q, k, v, num_sequences, window)
        chunk = max(window, LEAST_CHUNK)
        heads, groups, width = q.shape[1], k.shape[1], q.shape[2]
        q = q.view(rows, length, heads, width).transpose(1, 2)
        keys = k.view(rows, length, groups, width).repeat_interleave(heads // groups, 2).transpose(1, 2)
        values = v.view(rows, length, groups, width).repeat_interleave(heads // groups, 2).transpose(1, 2)
        position = torch.arange(length, device=q.device)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        outputs: list[Tensor] = []
        for start in range(0, length, chunk):
            low, end = max(0, start - window), min(start + chunk, length)
            distance = position[start:end, None] - position[None, low:end]
            scores = (q[:, :, start:end] @ keys[:, :, low:end].transpose(-1, -2)).to(wide) / math.sqrt(width)
            scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
            outputs.append(scores.softmax(-1).to(q.dtype) @ values[:, :, low:end])
        return torch.cat(outputs, 2).transpose(1, 2).reshape(rows * length, heads * width)
