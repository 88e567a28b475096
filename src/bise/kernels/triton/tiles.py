"""Weights in the order in which the matrix kernel reads them.

A tile is 64 rows by 64 columns of floats or 8-bit codes, or by 256 columns of 4-bit codes, stored in one
piece, so that one load of a tile is one run of memory whatever the matrix. Matrices that are multiplied
together lie behind one another, and one launch takes them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from bise.kernels.grouped import Grouped
from bise.kernels.panels import BLOCK_COLUMNS, SUPER_COLUMNS, TILE_COLUMNS, TILE_ROWS
from bise.kernels.triton.four_bits import Scales

_PROGRAMS = 512
"""Programs that keep a large GPU busy with 4-bit weights: about four for each of its processors, six KiB in
flight each (docs/gpu.md)."""
_BLOCKS_AT_ONCE = 16
"""Blocks of 64 rows whose 4-bit codes are put in their new order at once."""
_SPLIT_COLUMNS = 512
"""Fewest columns that are worth a split of their own."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Matrices [X, N, K] of one shape and format (X is 1 but for experts); see `Grouped` for the values.

    A matrix may be several ones behind one another, each padded to whole tiles: `parts` are their rows.
    """

    codes: Tensor
    """[X, N / 64, K / 64, 64, 64] of floats; 8-bit codes [..., 64 / group, 64, group]; or eight 4-bit codes
    in an int32 [X, N / 64, K / 256, 64, 32]: the p-th code of the low half of word j is column 64 p + 2 j,
    that of the high half its neighbour."""
    scale: Tensor | None
    """[X, N / 64, K / group, 64]; of 4-bit codes int32 [X, N / 64, K / 256, 64, 4 or 8], as `scales` says;
    None for floats."""
    minimum: Tensor | None
    bits: int
    """4 or 8; 0 for floats."""
    group: int
    zero: int
    codebook: bool
    parts: tuple[int, ...]
    num_columns: int
    scales: Scales = Scales.NONE

    @property
    def has_minimum(self) -> bool:
        """True when values have a minimum besides a scale."""
        return self.minimum is not None or self.scales in (Scales.PAIRS, Scales.U7, Scales.U6)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of each matrix, without padding."""
        return sum(self.parts), self.num_columns

    @property
    def count(self) -> int:
        """Number of matrices."""
        return self.codes.shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks of 64 rows in each matrix."""
        return self.codes.shape[1]

    @property
    def steps(self) -> int:
        """Tiles behind one another in a row."""
        return self.codes.shape[2]

    @property
    def size_bytes(self) -> int:
        """Memory on the device."""
        tensors = (self.codes, self.scale, self.minimum)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def num_splits(self) -> int:
        """Ranges of columns that are summed apart and then added in order. Depends on the shape alone,
        never on the batch, so that a row has the same bits in any.
        """
        most = min(_PROGRAMS // max(self.num_blocks, 1), self.num_columns // _SPLIT_COLUMNS)
        return 1 << max(most, 1).bit_length() - 1

    def offsets(self) -> list[int]:
        """Return where each part begins in a row of results, and at last the width of all."""
        found = [0]
        for rows in self.parts:
            found.append(found[-1] + -(-rows // TILE_ROWS) * TILE_ROWS)
        return found

    def like(self, other: Tiles) -> bool:
        """Tell whether both can be multiplied by one launch."""
        mine, theirs = self._form(), other._form()
        return mine == theirs

    def _form(self) -> tuple[object, ...]:
        scales = tuple(None if t is None else t.dtype for t in (self.codes, self.scale, self.minimum))
        return (scales, self.scales, self.bits, self.group, self.zero, self.codebook, self.num_columns)


def stacked(matrices: Sequence[Tiles]) -> Tiles:
    """Return matrices of one shape and format as one, which holds them all: they become views of it."""
    return _joined(matrices, 0)


def chained(matrices: Sequence[Tiles]) -> Tiles:
    """Return single matrices of one format and width behind one another; they become views of the result."""
    joined = _joined(matrices, 1)
    return replace(joined, parts=tuple(rows for each in matrices for rows in each.parts))


def _joined(matrices: Sequence[Tiles], axis: int) -> Tiles:
    first = matrices[0]
    if len(matrices) == 1:
        return first
    assert all(first.like(each) for each in matrices[1:])
    columns = (
        [each.codes for each in matrices],
        [each.scale for each in matrices],
        [each.minimum for each in matrices],
    )
    codes, scale, minimum = (_adopted(each, axis) for each in columns)
    assert codes is not None
    return replace(first, codes=codes, scale=scale, minimum=minimum)


def _adopted(tensors: Sequence[Tensor | None], axis: int) -> Tensor | None:
    """Return tensors joined along an axis. They share its memory from then on: weights are there once."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    joined = torch.cat(present, axis)
    start = 0
    for tensor in present:
        size = tensor.shape[axis]
        tensor.data = joined.narrow(axis, start, size)
        start += size
    return joined


def tile(weight: Grouped | Tensor) -> Tiles:
    """Return a matrix in tiles; rows and columns are padded with zero values."""
    num_rows, num_columns = weight.shape
    if isinstance(weight, Tensor):
        codes = _tiles(functional.pad(weight, (0, -num_columns % TILE_COLUMNS)), TILE_COLUMNS)
        return Tiles(codes[None], None, None, 0, TILE_COLUMNS, 0, False, (num_rows,), num_columns)
    if weight.bits == 4:
        scale, scales = _words(weight)
        return Tiles(
            codes=_packed_codes(weight.codes)[None],
            scale=_tiles(scale, scale.shape[1] // -(-num_columns // SUPER_COLUMNS))[None],
            minimum=None,
            bits=4,
            group=weight.group,
            zero=weight.zero,
            codebook=weight.codebook,
            parts=(num_rows,),
            num_columns=num_columns,
            scales=scales,
        )
    extra = -weight.scale.shape[1] % (TILE_COLUMNS // weight.group)
    tiles = _tiles(functional.pad(weight.codes, (0, extra * weight.group)), TILE_COLUMNS)
    # A group of columns of 64 rows is one run of memory: a product reads one group after the other.
    pieces = tiles.view(*tiles.shape[:3], TILE_COLUMNS // weight.group, weight.group)
    minimum = None if weight.minimum is None else _scales(weight.minimum, extra)[None]
    return Tiles(
        codes=pieces.transpose(2, 3).contiguous()[None],
        scale=_scales(weight.scale, extra)[None],
        minimum=minimum,
        bits=weight.bits,
        group=weight.group,
        zero=weight.zero,
        codebook=weight.codebook,
        parts=(num_rows,),
        num_columns=num_columns,
    )


def _words(weight: Grouped) -> tuple[Tensor, Scales]:
    """Return the scales of 4-bit codes as int32 words [N, words of 256 columns x K / 256]."""
    if weight.nested:
        words = _regrouped(weight.scale) if weight.nested == "u7" else weight.scale
        return words, Scales[weight.nested.upper()]
    extra = -weight.scale.shape[1] % (SUPER_COLUMNS // BLOCK_COLUMNS)
    scale = functional.pad(weight.scale, (0, extra))
    assert scale.dtype == torch.float16
    if weight.minimum is None:
        return scale.view(torch.int32), Scales.HALVES
    minimum = functional.pad(weight.minimum, (0, extra))
    return torch.stack((scale, minimum), 2).view(torch.int32).flatten(1), Scales.PAIRS


def _regrouped(words: Tensor) -> Tensor:
    """Return words of `u7` as `Scales.U7` has them: a group's fields in a half of a word, so that one
    operation takes those of two.
    """
    four = words.view(len(words), -1, 4)
    place = 4 * torch.arange(4, dtype=torch.int32, device=words.device)
    top = ((four >> 28 & 15) << place).sum(2, dtype=torch.int32)[..., None]
    halves: list[Tensor] = []
    for odd in (0, 1):
        scale, zero = (four >> 14 * odd + shift & 127 for shift in (0, 7))
        halves.append(zero | scale << 7 | (top >> 8 * odd + place // 2 & 3) << 14)
    return (halves[0] | halves[1] << 16).flatten(1)


def _packed_codes(codes: Tensor) -> Tensor:
    """Return pairs of codes [N, K / 2] of columns j and 16 + j in 32 as tiles of words; see `Tiles.codes`."""
    half = BLOCK_COLUMNS // 2
    supers = -(-codes.shape[1] // (SUPER_COLUMNS // 2))
    blocks = -(-len(codes) // TILE_ROWS)
    shape = (blocks, supers, TILE_ROWS, TILE_COLUMNS // 2)
    found = torch.zeros(shape, dtype=torch.int32, device=codes.device)
    for start in range(0, blocks, _BLOCKS_AT_ONCE):  # codes take a byte each on the way
        rows = codes[start * TILE_ROWS : (start + _BLOCKS_AT_ONCE) * TILE_ROWS]
        wide = functional.pad(
            rows, (0, supers * SUPER_COLUMNS // 2 - rows.shape[1], 0, -len(rows) % TILE_ROWS)
        )
        pairs = wide.view(len(wide), supers, -1, half)
        single = torch.cat((pairs & 15, pairs >> 4), 3)  # [N, S, 8 blocks, 32 columns]
        single = single.view(
            len(wide), supers, 2, 2, TILE_COLUMNS // 2, 2
        )  # [N, S, p / 2, p % 2, word, half]
        joined = single[:, :, :, 0] | single[:, :, :, 1] << 4
        words = joined.permute(0, 1, 3, 4, 2).flatten(3).contiguous().view(torch.int32)[..., 0]
        found[start : start + _BLOCKS_AT_ONCE] = words.view(-1, TILE_ROWS, *words.shape[1:]).transpose(1, 2)
    return found


def _tiles(matrix: Tensor, width: int) -> Tensor:
    """Return [N, bytes or values] as [N / 64, K / 64, 64, width]."""
    matrix = functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % TILE_ROWS))
    return matrix.view(matrix.shape[0] // TILE_ROWS, TILE_ROWS, -1, width).transpose(1, 2).contiguous()


def _scales(scales: Tensor, extra: int) -> Tensor:
    """Return [N, groups] as [N / 64, groups + extra, 64]; what is padded has the value 0."""
    scales = functional.pad(scales, (0, extra, 0, -scales.shape[0] % TILE_ROWS))
    return scales.view(scales.shape[0] // TILE_ROWS, TILE_ROWS, -1).transpose(1, 2).contiguous()
