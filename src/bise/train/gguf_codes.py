"""float32 rows to the stored formats of GGUF files: F16, Q8_0, Q4_K; `kernels.dequant` reads them back."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bise.train.safetensors_writer import narrowed
from bise.train.whole import Floats

Bytes = npt.NDArray[np.uint8]

_LEVELS = np.arange(13.5, 16.1, 0.25, dtype=np.float32)
"""Spans, in steps of a code, that are tried for the values of a block: a little clipping can be better."""
_FOUR, _SIX, _LOW = np.uint8(4), np.uint8(6), np.uint8(15)
_ROWS = 1 << 12
"""Superblocks quantised at a time: bounds the memory."""


def encode(values: Floats, form: str, name: str) -> Bytes:
    """Return rows [n, K] of values as stored bytes [n, row bytes]; `form` is F32, F16, Q8_0 or Q4_K."""
    if form in ("F32", "F16"):
        stored = narrowed(values, form, name)
        return np.frombuffer(stored.tobytes(), np.uint8).reshape(len(values), -1)
    rows, width = values.shape
    length, block = (32, _q8_0) if form == "Q8_0" else (256, _q4_k)
    blocks = values.reshape(-1, length)
    parts = [block(blocks[start : start + _ROWS]) for start in range(0, len(blocks), _ROWS)]
    assert width % length == 0
    return np.concatenate(parts).reshape(rows, -1)


def _q8_0(x: Floats) -> Bytes:
    """Return blocks [n, 32] as 34 bytes: a float16 scale, then signed codes, halves rounded away from 0."""
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = x * inverse
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return np.concatenate((scale.astype("<f2").view(np.uint8), codes.view(np.uint8)), axis=1)


def _q4_k(x: Floats) -> Bytes:
    """Return superblocks [n, 256] as 144 bytes: value = d * scale * code - dmin * minimum.

    Each 32 values get the step and minimum of least squares over a few spans; then both are rounded to six
    bits under the superblock's float16, and the codes are chosen again for what they became.
    """
    count = len(x)
    blocks = x.reshape(count, 8, 32)
    step, low = _fit(blocks)
    d, dmin = _half_scale(step), _half_scale(low)
    scales, minima = _sixths(step, d), _sixths(low, dmin)
    with np.errstate(divide="ignore", invalid="ignore"):
        real = (d.astype(np.float32) * scales)[:, :, None]
        shifted = blocks + (dmin.astype(np.float32) * minima)[:, :, None]
        codes = np.where(real > 0, np.rint(shifted / real), 0)
    nibbles: Bytes = np.clip(codes, 0, 15).astype(np.uint8).reshape(count, 4, 2, 32)
    packed: Bytes = (nibbles[:, :, 0] | (nibbles[:, :, 1] << _FOUR)).reshape(count, 128)
    s: Bytes = scales.astype(np.uint8)
    m: Bytes = minima.astype(np.uint8)
    fields = np.concatenate(
        (
            s[:, :4] | (s[:, 4:] >> _FOUR << _SIX),
            m[:, :4] | (m[:, 4:] >> _FOUR << _SIX),
            (s[:, 4:] & _LOW) | ((m[:, 4:] & _LOW) << _FOUR),
        ),
        axis=1,
    )
    return np.concatenate((d.view(np.uint8), dmin.view(np.uint8), fields, packed), axis=1)


def _fit(x: Floats) -> tuple[Floats, Floats]:
    """Return (step, subtracted minimum), both [n, 8] and not negative, of blocks [n, 8, 32]."""
    lowest = np.minimum(x.min(-1), 0)
    span = x.max(-1) - lowest
    best_step, best_low = span / np.float32(15), -lowest
    best = np.full(span.shape, np.inf, np.float32)
    safe = np.where(span > 0, span, 1)
    mean_x = x.mean(-1)
    for levels in _LEVELS:
        codes = np.clip(np.rint((x - lowest[..., None]) * (levels / safe)[..., None]), 0, 15)
        mean_c = codes.mean(-1)
        spread = (codes * codes).mean(-1) - mean_c * mean_c
        slope = ((codes * x).mean(-1) - mean_c * mean_x) / np.where(spread > 0, spread, 1)
        low = slope * mean_c - mean_x
        # A minimum is subtracted and cannot be negative: the line then goes through 0.
        square = (codes * codes).mean(-1)
        through = (codes * x).mean(-1) / np.where(square > 0, square, 1)
        slope, low = np.where(low < 0, through, slope), np.maximum(low, 0)
        error = np.square(slope[..., None] * codes - low[..., None] - x).sum(-1)
        better = (error < best) & (slope > 0)
        best = np.where(better, error, best)
        best_step, best_low = np.where(better, slope, best_step), np.where(better, low, best_low)
    return best_step.astype(np.float32), best_low.astype(np.float32)


def _half_scale(values: Floats) -> npt.NDArray[np.float16]:
    """Return the superblock's float16 [n, 1] under which the largest of [n, 8] values is 63."""
    return (values.max(1, keepdims=True) / np.float32(63)).astype("<f2")


def _sixths(values: Floats, unit: npt.NDArray[np.float16]) -> Floats:
    wide = unit.astype(np.float32)
    return np.clip(np.rint(values / np.where(wide > 0, wide, 1)), 0, 63).astype(np.float32)
