"""Blocks of every stored weight format, taken apart into codes and scales, and turned into float32.

There is one description per format: `decompose` splits rows into a `Blocks` value, and `dequantize` is the
float32 arithmetic over it. The order of operations is that of the published formats, so the result is equal
bit for bit to the `gguf` package's (a NaN's payload aside): first the sub-block's scale in float32, which is
the superblock's scale times an integer; then scale times code; then minus the minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bise.formats import FORMATS

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_LOW = np.uint8(0x0F)
_FOUR = np.uint8(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Quantised rows [n, K] taken apart: value = scale * (code - zero) - min, or scale * codebook[code].

    Sub-blocks of `sub` values share a scale, superblocks of `super_length` the stored float16 numbers.
    The integer parts are exact: scale == float32(super_scale) * sub_scale, rounded once to float32.
    """

    codes: Bytes
    """[n, K] unsigned codes as stored."""
    zero: int
    """Subtracted from a code before scaling; 0 where there is a codebook."""
    codebook: npt.NDArray[np.int8] | None
    """[16] values of the codes (IQ4), None where the code itself is the value."""
    sub: int
    """Values that share a scale: 16 or 32."""
    scale: Floats
    """[n, K / sub] effective scale."""
    min: Floats | None
    """[n, K / sub] effective minimum, subtracted; None where the format has none."""
    super_length: int
    """Values that share a stored float16 scale: 32 or 256."""
    super_scale: Halves
    """[n, K / super_length] stored scale."""
    sub_scale: npt.NDArray[np.int8] | None
    """[n, K / sub] integer part of the scale; None where the stored scale is the sub-block's own."""
    super_min: Halves | None = None
    """[n, K / super_length] stored minimum, with the sign that makes it subtracted."""
    sub_min: npt.NDArray[np.int8] | None = None
    """[n, K / sub] integer part of the minimum."""


def dequantize(format_name: str, raw: Bytes) -> Floats:
    """Return rows `raw` [n, row bytes] of a format as float32 [n, K].

    A NaN or infinite scale gives NaN or infinite values, never an error here: who runs the model sees them.
    """
    raw = np.ascontiguousarray(raw)
    if format_name == "F32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if format_name == "F16":
        return raw.view("<f2").astype(np.float32)
    if format_name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if not len(raw):
        entry = FORMATS[format_name]
        return np.empty((0, raw.shape[1] // entry.block_bytes * entry.block_length), np.float32)
    return recompose(decompose(format_name, raw))


def recompose(blocks: Blocks) -> Floats:
    """Return the float32 values [n, K] of rows taken apart by `decompose`."""
    rows, length = blocks.codes.shape
    if blocks.codebook is None:
        values = blocks.codes.astype(np.float32)
        if blocks.zero:
            values -= np.float32(blocks.zero)
    else:
        values = blocks.codebook.astype(np.float32)[blocks.codes]
    values = values.reshape(rows, length // blocks.sub, blocks.sub)
    with np.errstate(all="ignore"):
        values *= blocks.scale[:, :, None]
        if blocks.min is not None:
            values -= blocks.min[:, :, None]
    return values.reshape(rows, length)


def decompose(format_name: str, raw: Bytes) -> Blocks:
    """Return rows `raw` [n, row bytes] of a quantised format as codes and scales; n is at least 1."""
    splitter = _SPLITTERS.get(format_name)
    if splitter is None:
        raise ValueError(f"{format_name} is not a quantised format; known: {', '.join(_SPLITTERS)}")
    entry = FORMATS[format_name]
    rows, row_bytes = raw.shape
    if row_bytes % entry.block_bytes:
        raise ValueError(
            f"{row_bytes} bytes are not a whole number of {format_name} blocks of {entry.block_bytes}"
        )
    blocks = np.ascontiguousarray(raw).reshape(rows * (row_bytes // entry.block_bytes), entry.block_bytes)
    return splitter(blocks, rows)


def _half(columns: Bytes, rows: int) -> Halves:
    """Return two-byte columns [blocks, 2] as float16 [rows, blocks per row]."""
    return np.ascontiguousarray(columns).view("<f2").astype(np.float16, copy=False).reshape(rows, -1)


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """Return the codes of packed bytes [blocks, n]: per `run` bytes all low halves, then all high halves."""
    return _fields(packed, run, 4)


def _fields(packed: Bytes, run: int, bits: int) -> Bytes:
    """Return the fields of `bits` bits of packed bytes [blocks, n]: per `run` bytes, lowest fields first."""
    grouped = packed.reshape(len(packed), -1, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    mask = np.uint8((1 << bits) - 1)
    return ((grouped >> shifts) & mask).reshape(len(packed), -1)


def _high_bits(packed: Bytes) -> Bytes:
    """Return the 32 bits of four bytes [blocks, 4], lowest first, as [blocks, 32] of 0 or 1."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _flat(
    codes: Bytes, zero: int, rows: int, d: Halves, m: Halves | None = None, *, iq4: bool = False
) -> Blocks:
    """Return blocks of 32 with one float16 scale each (and maybe an added float16 offset `m`)."""
    scale = d.astype(np.float32)
    return Blocks(
        codes=codes.reshape(rows, -1),
        zero=zero,
        codebook=np.array(IQ4_VALUES, np.int8) if iq4 else None,
        sub=32,
        scale=scale,
        min=None if m is None else -m.astype(np.float32),
        super_length=32,
        super_scale=d,
        sub_scale=None,
        super_min=None if m is None else -m,
    )


def _nested(
    codes: Bytes,
    zero: int,
    rows: int,
    scales: tuple[Halves, npt.NDArray[np.int8]],
    mins: tuple[Halves, npt.NDArray[np.int8]] | None = None,
    *,
    iq4: bool = False,
) -> Blocks:
    """Return superblocks of 256 whose sub-blocks have integer scales (and maybe integer minima)."""
    codes = codes.reshape(rows, -1)
    d, sub_scale = scales[0], scales[1].reshape(rows, -1)
    m, sub_min = (None, None) if mins is None else (mins[0], mins[1].reshape(rows, -1))
    return Blocks(
        codes=codes,
        zero=zero,
        codebook=np.array(IQ4_VALUES, np.int8) if iq4 else None,
        sub=codes.shape[1] // sub_scale.shape[1],
        scale=_product(d, sub_scale),
        min=None if m is None or sub_min is None else _product(m, sub_min),
        super_length=256,
        super_scale=d,
        sub_scale=sub_scale,
        super_min=m,
        sub_min=sub_min,
    )


def _product(halves: Halves, integers: npt.NDArray[np.int8]) -> Floats:
    """Return float32(halves) * integers, each half spread over its share of the integers."""
    per_super = integers.reshape(*halves.shape, -1).astype(np.float32)
    with np.errstate(all="ignore"):
        return (halves.astype(np.float32)[:, :, None] * per_super).reshape(integers.shape)


def _q4_0(b: Bytes, rows: int) -> Blocks:
    return _flat(_nibbles(b[:, 2:], 16), 8, rows, _half(b[:, :2], rows))


def _q4_1(b: Bytes, rows: int) -> Blocks:
    return _flat(_nibbles(b[:, 4:], 16), 0, rows, _half(b[:, :2], rows), _half(b[:, 2:4], rows))


def _q5_0(b: Bytes, rows: int) -> Blocks:
    codes = _nibbles(b[:, 6:], 16) | (_high_bits(b[:, 2:6]) << _FOUR)
    return _flat(codes, 16, rows, _half(b[:, :2], rows))


def _q5_1(b: Bytes, rows: int) -> Blocks:
    codes = _nibbles(b[:, 8:], 16) | (_high_bits(b[:, 4:8]) << _FOUR)
    return _flat(codes, 0, rows, _half(b[:, :2], rows), _half(b[:, 2:4], rows))


def _q8_0(b: Bytes, rows: int) -> Blocks:
    return _flat(b[:, 2:] ^ np.uint8(0x80), 128, rows, _half(b[:, :2], rows))


def _iq4_nl(b: Bytes, rows: int) -> Blocks:
    return _flat(_nibbles(b[:, 2:], 16), 0, rows, _half(b[:, :2], rows), iq4=True)


def _q2_k(b: Bytes, rows: int) -> Blocks:
    low, high = (b[:, :16] & _LOW).view(np.int8), (b[:, :16] >> _FOUR).view(np.int8)
    d, m = _half(b[:, 80:82], rows), _half(b[:, 82:84], rows)
    return _nested(_fields(b[:, 16:80], 32, 2), 0, rows, (d, low), (m, high))


def _q3_k(b: Bytes, rows: int) -> Blocks:
    # 32 bytes of third bits (set: nothing to subtract), 64 of two-bit codes, 12 of six-bit scales, d.
    codes = _fields(b[:, 32:96], 32, 2) | (_fields(b[:, :32], 32, 1) << np.uint8(2))
    scales = _nibbles(b[:, 96:104], 8) | (_fields(b[:, 104:108], 4, 2) << _FOUR)
    return _nested(codes, 4, rows, (_half(b[:, 108:110], rows), scales.view(np.int8) - np.int8(32)))


def _k4_scales(packed: Bytes) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """Return (scales, minima) [blocks, 8] of Q4_K and Q5_K from their 12 bytes of six-bit fields."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    six, top = np.uint8(0x3F), np.uint8(6)
    scales = np.concatenate((first & six, (third & _LOW) | ((first >> top) << _FOUR)), axis=1)
    minima = np.concatenate((second & six, (third >> _FOUR) | ((second >> top) << _FOUR)), axis=1)
    return scales.view(np.int8), minima.view(np.int8)


def _q4_k(b: Bytes, rows: int) -> Blocks:
    scales, minima = _k4_scales(b[:, 4:16])
    d, m = _half(b[:, :2], rows), _half(b[:, 2:4], rows)
    return _nested(_nibbles(b[:, 16:], 32), 0, rows, (d, scales), (m, minima))


def _q5_k(b: Bytes, rows: int) -> Blocks:
    scales, minima = _k4_scales(b[:, 4:16])
    d, m = _half(b[:, :2], rows), _half(b[:, 2:4], rows)
    codes = _nibbles(b[:, 48:], 32) | (_fields(b[:, 16:48], 32, 1) << _FOUR)
    return _nested(codes, 0, rows, (d, scales), (m, minima))


def _q6_k(b: Bytes, rows: int) -> Blocks:
    codes = _nibbles(b[:, :128], 64) | (_fields(b[:, 128:192], 32, 2) << _FOUR)
    scales = np.ascontiguousarray(b[:, 192:208]).view(np.int8)
    return _nested(codes, 32, rows, (_half(b[:, 208:210], rows), scales))


def _iq4_xs(b: Bytes, rows: int) -> Blocks:
    high = _fields(b[:, 2:4], 1, 2)
    low = _fields(b[:, 4:8], 1, 4)
    scales = (low | (high << _FOUR)).view(np.int8) - np.int8(32)
    return _nested(_nibbles(b[:, 8:], 16), 0, rows, (_half(b[:, :2], rows), scales), iq4=True)


_SPLITTERS: dict[str, Callable[[Bytes, int], Blocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
