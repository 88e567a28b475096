"""Where the rows of a step stand and where their keys live, on the device; the pages themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bise.kernels import BLOCK_SIZE, AttentionMeta
from bise.kernels.grouped import FLOATS
from bise.kernels.torch import TorchPages

KV_FORMATS = ("f32", "f16", "bf16", "q8")
"""What pages on a GPU hold."""

_SHORT_ROWS = 64
"""Up to this many rows a step of a few rows for each sequence (guesses) is computed row by row."""


class TritonPages(TorchPages):
    """K and V of one layer, [slots, G, D] each: floats, or 8-bit codes with a scale per slot and head."""

    def __init__(self, slots: int, heads: int, width: int, kv_format: str, device: torch.device) -> None:
        """Allocate pages of zeros in one of `KV_FORMATS`."""
        self.is_coded = kv_format == "q8"
        super().__init__(slots, heads, width, torch.int8 if self.is_coded else FLOATS[kv_format], device)
        shape = (slots, heads) if self.is_coded else (1, 1)
        self.k_scale = torch.zeros(shape, dtype=torch.float32, device=device)
        self.v_scale = torch.zeros_like(self.k_scale)

    def arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return keys, values, and their scales."""
        return self.k, self.v, self.k_scale, self.v_scale

    def block(self, index: int) -> list[Tensor]:
        """See `TorchPages.block`."""
        rows = slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
        scales = [self.k_scale[rows].view(-1), self.v_scale[rows].view(-1)] if self.is_coded else []
        return super().block(index) + scales


@dataclass(frozen=True, slots=True)
class Placed:
    """The metadata of a step (`AttentionMeta`) on the device, row by row."""

    positions: Tensor
    """int32 [T] position of each row; -1 for one that only fills the step up."""
    owners: Tensor
    """int32 [T] line of `table` of each row."""
    slots: Tensor
    """int32 [T]; -1 stores nothing."""
    table: Tensor
    """int32 [S, N]."""
    is_decode: bool
    """Every sequence has one row."""
    is_short: bool = False
    """Few rows in all: each is computed as if it were decoded."""
    q_start: Tensor | None = None
    q_pos: Tensor | None = None
    meta: AttentionMeta | None = None
    _tiles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])

    def tiles(self, rows_per_tile: int) -> tuple[Tensor, Tensor]:
        """Return sequence and first row [tiles] of every tile of at most `rows_per_tile` rows of one
        sequence, on the device.
        """
        found = self._tiles.get(rows_per_tile)
        if found is None:
            assert self.meta is not None, "a step that was captured has no tiles"
            sequences, firsts = (
                _sent(each, self.positions.device) for each in query_tiles(self.meta, rows_per_tile)
            )
            found = self._tiles[rows_per_tile] = (sequences, firsts)
        return found


def place(meta: AttentionMeta, device: torch.device) -> Placed:
    """Copy the metadata of a step to the device."""
    lengths = np.diff(meta.q_start)
    owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    rows = int(meta.q_start[-1])
    positions = meta.q_pos[owners] + np.arange(rows, dtype=np.int32) - meta.q_start[owners]
    is_decode = rows == len(lengths)
    is_short = not is_decode and rows <= _SHORT_ROWS and int(lengths.max()) <= _SHORT_ROWS // 4
    parts = [
        positions.astype(np.int32),
        owners,
        meta.slots,
        meta.q_start,
        meta.q_pos,
        meta.block_table.reshape(-1),
    ]
    sent: Sequence[Tensor] = torch.split(_sent(np.concatenate(parts), device), [len(part) for part in parts])
    table = sent[5].view(meta.block_table.shape)
    return Placed(sent[0], sent[1], sent[2], table, is_decode, is_short, sent[3], sent[4], meta)


def query_tiles(
    meta: AttentionMeta, rows_per_tile: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return sequence and first row [tiles] of every tile of at most `rows_per_tile` rows of one sequence."""
    lengths = np.diff(meta.q_start)
    counts = -(-lengths // rows_per_tile)
    sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), counts)
    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    first = meta.q_start[sequences] + inside * rows_per_tile
    return sequences, first.astype(np.int32)


def _sent(array: npt.NDArray[np.int32], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)  # pyright: ignore[reportUnknownMemberType]
