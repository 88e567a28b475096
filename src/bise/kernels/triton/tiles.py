"""Weights in the order in which the matrix kernel reads them.

A tile is 64 rows by 32 columns, stored in one piece: with 4-bit codes a kilobyte, so that one load of a
tile is one run of memory whatever the matrix, and rows of a matrix never share a memory sector half used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from bise.kernels.grouped import Grouped

TILE_ROWS = 64
TILE_COLUMNS = 32

_PROGRAMS = 256
"""Programs that keep a large GPU busy: about two for each of its processors."""
_SPLIT_COLUMNS = 512
"""Fewest columns that are worth a split of their own."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Matrices [X, N, K] of one shape and format (X is 1 but for experts); see `Grouped` for the values."""

    codes: Tensor
    """[X, N / 64, K / 32, 64, 32] of floats or 8-bit codes, or [..., 16] with two 4-bit codes in a byte."""
    scale: Tensor | None
    """[X, N / 64, K / group, 64]; None for floats."""
    minimum: Tensor | None
    bits: int
    """4 or 8; 0 for floats."""
    group: int
    zero: int
    codebook: bool
    num_rows: int
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of each matrix, without padding."""
        return self.num_rows, self.num_columns

    @property
    def count(self) -> int:
        """Number of matrices."""
        return self.codes.shape[0]

    @property
    def num_splits(self) -> int:
        """Ranges of columns that are summed apart and then added in order. Depends on the shape alone,
        never on the batch, so that a row has the same bits in any.
        """
        wanted = _PROGRAMS * TILE_ROWS // max(self.num_rows, 1)
        most = min(wanted, self.num_columns // _SPLIT_COLUMNS)
        return 1 << max(most, 1).bit_length() - 1

    def row_values(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values [R, K] of some rows [R] of the first matrix."""
        block, row = index // TILE_ROWS, index % TILE_ROWS
        codes = self.codes[0, block, :, row]
        if self.scale is None:
            return codes.flatten(1)[:, : self.num_columns].to(dtype)
        return Grouped(
            codes=codes.flatten(1),
            scale=self.scale[0, block, :, row],
            minimum=None if self.minimum is None else self.minimum[0, block, :, row],
            bits=self.bits,
            group=self.group,
            zero=self.zero,
            codebook=self.codebook,
            num_columns=self.num_columns,
        ).values(dtype)


def stacked(matrices: Sequence[Tiles]) -> Tiles:
    """Return matrices of one shape and format as one."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    scales = [each.scale for each in matrices if each.scale is not None]
    minimums = [each.minimum for each in matrices if each.minimum is not None]
    return replace(
        first,
        codes=torch.cat([each.codes for each in matrices]),
        scale=torch.cat(scales) if scales else None,
        minimum=torch.cat(minimums) if minimums else None,
    )


def tile(weight: Grouped | Tensor) -> Tiles:
    """Return a matrix in tiles; rows and columns are padded with zero values."""
    num_rows, num_columns = weight.shape
    if isinstance(weight, Tensor):
        padded = functional.pad(weight, (0, -num_columns % TILE_COLUMNS))
        codes = _tiles(padded, TILE_COLUMNS)[None]
        return Tiles(codes, None, None, 0, TILE_COLUMNS, 0, False, num_rows, num_columns)
    return Tiles(
        codes=_tiles(weight.codes, weight.bits * TILE_COLUMNS // 8)[None],
        scale=_scales(weight.scale)[None],
        minimum=None if weight.minimum is None else _scales(weight.minimum)[None],
        bits=weight.bits,
        group=weight.group,
        zero=weight.zero,
        codebook=weight.codebook,
        num_rows=num_rows,
        num_columns=num_columns,
    )


def _tiles(matrix: Tensor, width: int) -> Tensor:
    """Return [N, bytes or values] as [N / 64, K / 32, 64, width]."""
    matrix = functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % TILE_ROWS))
    return matrix.view(matrix.shape[0] // TILE_ROWS, TILE_ROWS, -1, width).transpose(1, 2).contiguous()


def _scales(scales: Tensor) -> Tensor:
    """Return [N, groups] as [N / 64, groups, 64]."""
    scales = functional.pad(scales, (0, 0, 0, -scales.shape[0] % TILE_ROWS))
    return scales.view(scales.shape[0] // TILE_ROWS, TILE_ROWS, -1).transpose(1, 2).contiguous()
