"""Dequantisation of every stored format against the gguf package, which nobody here wrote."""

from __future__ import annotations

import numpy as np
import pytest

from bise.formats import FORMATS
from bise.kernels.dequant import decompose, dequantize, recompose

gguf = pytest.importorskip("gguf")

QUANTISED = [name for name, entry in FORMATS.items() if entry.is_quantised]
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Byte positions of the float16 numbers in a block."""


def _random(name: str, rows: int, blocks: int, seed: int, *, finite: bool = True) -> np.ndarray:
    entry = FORMATS[name]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, entry.block_bytes), dtype=np.uint8)
    if finite:
        for at in SCALES.get(name, ()):
            halves = rng.standard_normal((rows, blocks, 1)).astype(np.float16) * np.float16(0.01)
            raw[:, :, at : at + 2] = halves.astype("<f2").view(np.uint8)
    return raw.reshape(rows, -1)


def _reference(name: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_values_equal_the_gguf_package_bit_for_bit(name: str, rows: int) -> None:
    for seed in range(8):
        raw = _random(name, rows, 5 if FORMATS[name].is_quantised else 33, seed)
        if name in ("F32", "F16", "BF16"):
            raw = _plain(name, rows, seed)
        ours = dequantize(name, raw)
        assert ours.dtype == np.float32
        assert ours.tobytes() == _reference(name, raw).tobytes()


def _plain(name: str, rows: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, 33)).astype(np.float32)
    if name == "F32":
        return values.view(np.uint8)
    if name == "F16":
        return values.astype(np.float16).view(np.uint8)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


@pytest.mark.parametrize("name", QUANTISED)
def test_any_scale_bits_give_the_gguf_packages_values_and_the_same_nans(name: str) -> None:
    raw = _random(name, 64, 4, 11, finite=False)
    ours, theirs = dequantize(name, raw), _reference(name, raw)
    assert np.isnan(theirs).any()
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    known = ~np.isnan(theirs)
    assert ours[known].tobytes() == theirs[known].tobytes()


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("bits", [0x0000, 0x8000, 0x0001, 0x03FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00])
def test_extreme_scales_equal_the_gguf_package(name: str, bits: int) -> None:
    raw = _random(name, 2, 3, 5).reshape(2, 3, -1)
    for at in SCALES[name]:
        raw[:, :, at : at + 2] = np.array([bits], "<u2").view(np.uint8)
    rows = raw.reshape(2, -1)
    ours, theirs = dequantize(name, rows), _reference(name, rows)
    known = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), ~known)
    assert ours[known].tobytes() == theirs[known].tobytes()


@pytest.mark.parametrize("name", QUANTISED)
def test_decomposed_parts_have_their_stated_shapes_and_give_the_values_back(name: str) -> None:
    entry = FORMATS[name]
    raw = _random(name, 3, 4, 7)
    blocks = decompose(name, raw)
    length = 4 * entry.block_length
    assert blocks.codes.shape == (3, length)
    assert blocks.codes.dtype == np.uint8
    assert blocks.sub in (16, 32)
    assert blocks.scale.shape == (3, length // blocks.sub)
    assert blocks.super_scale.shape == (3, length // blocks.super_length)
    assert blocks.super_length == entry.block_length
    assert recompose(blocks).tobytes() == _reference(name, raw).tobytes()


@pytest.mark.parametrize("name", QUANTISED)
def test_integer_parts_times_stored_halves_are_the_effective_scales(name: str) -> None:
    blocks = decompose(name, _random(name, 2, 3, 3))
    spread = np.repeat(blocks.super_scale.astype(np.float32), blocks.super_length // blocks.sub, axis=1)
    integer = np.float32(1) if blocks.sub_scale is None else blocks.sub_scale.astype(np.float32)
    np.testing.assert_array_equal(blocks.scale, spread * integer)
    assert (blocks.min is None) == (blocks.super_min is None)
    if blocks.min is not None and blocks.super_min is not None:
        spread = np.repeat(blocks.super_min.astype(np.float32), blocks.super_length // blocks.sub, axis=1)
        integer = np.float32(1) if blocks.sub_min is None else blocks.sub_min.astype(np.float32)
        np.testing.assert_array_equal(blocks.min, spread * integer)


@pytest.mark.parametrize("name", FORMATS)
def test_format_sizes_equal_the_gguf_package(name: str) -> None:
    entry = FORMATS[name]
    kind = gguf.GGMLQuantizationType(entry.ggml_id)
    assert kind.name == name
    assert gguf.GGML_QUANT_SIZES[kind] == (entry.block_length, entry.block_bytes)


def test_rows_that_are_not_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="whole number"):
        decompose("Q4_K", np.zeros((1, 143), np.uint8))
    with pytest.raises(ValueError, match="not a quantised format"):
        decompose("F16", np.zeros((1, 2), np.uint8))
