"""Panels taken apart on a torch device against what the cpu backend says that they hold."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bise.formats import FORMATS  # noqa: E402
from bise.kernels.cpu import PACKED_FORMATS, CpuOps, arena, packed_format_of, packed_size  # noqa: E402
from bise.kernels.grouped import unpack_floats, unpack_panels  # noqa: E402
from bise.kernels.panels import PANEL_FORMATS, device_bytes  # noqa: E402

BLOCKS = {packed_format_of(stored.ggml_id): stored for stored in FORMATS.values() if stored.is_quantised}
HALVES = {
    "q4_1": (0, 2),
    "q5_1": (0, 2),
    "q4k": (0, 2),
    "q5k": (0, 2),
    "q2k": (80, 82),
    "q3k": (108,),
    "q6k": (208,),
}
"""Byte positions of the float16 numbers in a stored block; first in all others."""


def packed(ops, packed_format, num_rows, num_columns):
    """Return a packed matrix and its memory, made of random blocks."""
    rng = np.random.default_rng(num_rows + num_columns)
    memory = arena(packed_size(packed_format, num_rows, num_columns))
    if packed_format == "z4":  # no file holds it
        values = rng.standard_normal((num_rows, num_columns)).astype(np.float32)
        assert ops.pack_floats(packed_format, values, memory)
        return ops.packed(packed_format, num_rows, num_columns, memory), memory
    stored = BLOCKS[packed_format]
    raw = rng.integers(0, 256, (num_rows, stored.row_bytes(num_columns)), dtype=np.uint8)
    blocks = raw.reshape(-1, stored.block_bytes)
    for at in HALVES.get(packed_format, (0,)):
        halves = rng.standard_normal(len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    assert ops.pack_blocks(stored.ggml_id, raw, num_columns, memory)
    return ops.packed(packed_format, num_rows, num_columns, memory), memory


def test_every_quantised_packed_format_can_be_taken_apart():
    assert set(PANEL_FORMATS) == set(PACKED_FORMATS) - {"f32", "f16", "bf16"}


@pytest.mark.parametrize("num_rows", [1, 16, 37])
@pytest.mark.parametrize("packed_format", PANEL_FORMATS)
def test_the_values_on_the_device_are_those_of_the_panels_bit_for_bit(packed_format, num_rows):
    ops = CpuOps(1)
    matrix, memory = packed(ops, packed_format, num_rows, 768)
    grouped = unpack_panels(packed_format, num_rows, 768, torch.from_numpy(memory))
    assert grouped.shape == (num_rows, 768)
    assert np.array_equal(grouped.values(torch.float32).numpy(), ops.unpack(matrix))
    assert grouped.size_bytes == device_bytes(packed_format, num_rows, 768, float_bytes=2, is_tiled=False)
    picked = torch.tensor([num_rows - 1, 0])
    assert torch.equal(grouped.rows(picked).values(torch.float32), grouped.values(torch.float32)[picked])


@pytest.mark.parametrize("packed_format", ["q8", "q4", "n4", "z4"])
def test_columns_of_a_padded_block_are_left_out(packed_format):
    ops = CpuOps(1)
    values = np.random.default_rng(0).standard_normal((5, 45)).astype(np.float32)
    memory = arena(packed_size(packed_format, 5, 45))
    assert ops.pack_floats(packed_format, values, memory)
    grouped = unpack_panels(packed_format, 5, 45, torch.from_numpy(memory))
    unpacked = ops.unpack(ops.packed(packed_format, 5, 45, memory))
    assert np.array_equal(grouped.values(torch.float32).numpy(), unpacked)


@pytest.mark.parametrize("packed_format", ["f32", "f16", "bf16"])
def test_float_panels_keep_their_values(packed_format):
    ops = CpuOps(1)
    values = np.random.default_rng(1).standard_normal((19, 45)).astype(np.float32)
    memory = arena(packed_size(packed_format, 19, 45))
    assert ops.pack_floats(packed_format, values, memory)
    found = unpack_floats(packed_format, 19, 45, torch.from_numpy(memory))
    assert np.array_equal(found.float().numpy(), ops.unpack(ops.packed(packed_format, 19, 45, memory)))
