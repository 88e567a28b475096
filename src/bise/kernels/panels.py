"""Packed panels in figures: how each format lies in memory, and what it takes on a device.

The facts behind `grouped.py`, apart from it so that a plan for a device needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

PANEL_ROWS = 16
BLOCK_COLUMNS = 32
SUPER_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class PanelFormat:
    """Layout of one packed format of native/formats.h, in its own words."""

    low_bits: int
    high_bits: int = 0
    zero: int = 0
    """Subtracted from a code."""
    has_min: bool = False
    sub: str = ""
    """What a 32-column block holds below a header of scales per 256 columns: nothing (the format is flat),
    `s8` (a signed byte), `s8 x2` (one per 16 columns), `u4 x2` (scale and minimum in the halves of a byte,
    one per 16 columns); or, all in the header, `u6 in header` (six bits of scale and of minimum per block)
    and `u7 in header` (seven of scale and of zero point)."""
    codebook: bool = False

    @property
    def stored_bits(self) -> int:
        """Bits per code on a device."""
        return 4 if self.low_bits == 4 and not self.high_bits else 8

    @property
    def group(self) -> int:
        """Columns under one scale."""
        return 16 if self.sub.endswith("x2") else BLOCK_COLUMNS

    @property
    def nested(self) -> str:
        """How scales lie on a device: `u7`, `u6` or `s8` where 4-bit codes have scales below scales, which
        stay as narrow as they are packed (`Grouped.nested`); empty: one number per group.
        """
        if self.stored_bits != 4 or not self.sub:
            return ""
        return self.sub[:2]

    @property
    def header_bytes(self) -> int:
        """Bytes of scales per panel and 256 columns."""
        if self.sub.endswith("in header"):
            return PANEL_ROWS * (2 + 2 + 12)
        return (2 * PANEL_ROWS if self.sub else 0) * (2 if self.has_min else 1)

    @property
    def block_bytes(self) -> int:
        """Bytes per panel and 32 columns."""
        codes = 64 * (self.low_bits + self.high_bits)
        if not self.sub:
            return codes + 2 * PANEL_ROWS * (2 if self.has_min else 1)
        if self.sub.endswith("in header"):
            return codes
        return codes + PANEL_ROWS * (1 if self.sub == "s8" else 2)


PANEL_FORMATS: dict[str, PanelFormat] = {
    "q8": PanelFormat(8, zero=128),
    "q4": PanelFormat(4, zero=8),
    "q4_1": PanelFormat(4, has_min=True),
    "q5": PanelFormat(4, 1, zero=16),
    "q5_1": PanelFormat(4, 1, has_min=True),
    "n4": PanelFormat(4, codebook=True),
    "n4k": PanelFormat(4, sub="s8", codebook=True),
    "q4k": PanelFormat(4, has_min=True, sub="u6 in header"),
    "q5k": PanelFormat(4, 1, has_min=True, sub="u6 in header"),
    "q6k": PanelFormat(4, 2, zero=32, sub="s8 x2"),
    "q3k": PanelFormat(2, 1, zero=4, sub="s8 x2"),
    "z4": PanelFormat(4, has_min=True, sub="u7 in header"),
    "q2k": PanelFormat(2, has_min=True, sub="u4 x2"),
}

TILE_ROWS = TILE_COLUMNS = 64
"""Sides of the tiles of `kernels/triton/tiles.py`; the last tiles of a matrix are padded."""
WORDS = 4
"""32-bit words that hold the nested scales of a row and 256 columns: two groups of columns each."""
FLOAT_FORMATS = ("f32", "f16", "bf16")


def device_bytes(
    packed_format: str, num_rows: int, num_columns: int, *, float_bytes: int, is_tiled: bool
) -> int:
    """Return the bytes that a packed matrix takes on a device; see `device_parts`."""
    return sum(device_parts(packed_format, num_rows, num_columns, float_bytes=float_bytes, is_tiled=is_tiled))


def device_parts(
    packed_format: str, num_rows: int, num_columns: int, *, float_bytes: int, is_tiled: bool
) -> tuple[int, ...]:
    """Return the bytes of each array of a packed matrix on a device, as whole tiles if it `is_tiled`: codes,
    then scales and minimums where it has them apart.

    Floats take `float_bytes` each; in tiles those of f32 stay as they are.
    """
    layout = PANEL_FORMATS.get(packed_format)
    columns = _rounded(num_columns, BLOCK_COLUMNS)
    if is_tiled:
        num_rows, columns = _rounded(num_rows, TILE_ROWS), _rounded(num_columns, tile_columns(layout))
    if layout is None:
        width = 4 if packed_format == "f32" and is_tiled else float_bytes
        return (num_rows * (columns if is_tiled else num_columns) * width,)
    codes = num_rows * columns * layout.stored_bits // 8
    scale = num_rows * (columns // layout.group) * (4 if layout.sub else 2)
    if layout.nested:
        return codes, num_rows * 4 * WORDS * -(-columns // SUPER_COLUMNS)
    if not layout.has_min:
        return codes, scale
    return (codes, 2 * scale) if is_tiled and layout.stored_bits == 4 else (codes, scale, scale)


def tile_columns(layout: PanelFormat | None) -> int:
    """Return the columns of a tile: of floats and of 8-bit codes 64, of 4-bit ones 256."""
    return SUPER_COLUMNS if layout is not None and layout.stored_bits == 4 else TILE_COLUMNS


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
