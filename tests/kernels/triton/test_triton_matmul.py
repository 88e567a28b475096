"""The matrix kernel under Triton's interpreter against float64: every format, odd sizes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bise.kernels.cpu import CpuOps, arena, packed_size  # noqa: E402
from bise.kernels.grouped import PANEL_FORMATS, Grouped, unpack_panels  # noqa: E402
from bise.kernels.triton.matmul import Matmul  # noqa: E402
from bise.kernels.triton.tiles import stacked, tile  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_grouped(packed_format: str, num_rows: int, num_columns: int, seed: int = 0) -> Grouped:
    """Return a matrix with random codes and scales: every bit pattern of a code occurs."""
    layout = PANEL_FORMATS[packed_format]
    bits = layout.stored_bits
    padded = -(-num_columns // 32) * 32
    generator = torch.Generator().manual_seed(seed)
    high = 256 if bits == 4 else 1 << (layout.low_bits + layout.high_bits)
    codes = torch.randint(0, high, (num_rows, padded * bits // 8), generator=generator, dtype=torch.int32)
    groups = (num_rows, padded // layout.group)
    scale = torch.rand(groups, generator=generator) * 0.01
    minimum = torch.rand(groups, generator=generator) * 0.05 if layout.has_min else None
    return Grouped(
        codes.to(torch.uint8).to(DEVICE),
        scale.half().to(DEVICE),
        None if minimum is None else minimum.half().to(DEVICE),
        bits,
        layout.group,
        layout.zero,
        layout.codebook,
        num_columns,
    )


def error(got, x, values):
    """Return the largest error relative to |x| . |w|."""
    x, values = x.double().cpu(), values.double().cpu()
    return float(((got.double().cpu() - x @ values.T).abs() / (x.abs() @ values.abs().T)).max())


@pytest.mark.parametrize("packed_format", PANEL_FORMATS)
def test_products_of_every_format_match_float64(packed_format):
    weight = random_grouped(packed_format, 70, 160)
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    got = Matmul(torch.float16, DEVICE)(x, tile(weight), 5)
    assert got.shape == (5, 70)
    assert got.dtype == torch.float32
    assert error(got, x, weight.values(torch.float64)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 32), (3, 65, 45), (17, 64, 1040), (1, 40, 2100)])
def test_products_of_odd_sizes_match_float64(dtype, rows, n, k):
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, k, generator=generator).to(dtype).to(DEVICE)
    x = torch.randn(rows, k, generator=generator).to(dtype).to(DEVICE)
    got = Matmul(dtype, DEVICE)(x, tile(values), rows)
    assert error(got, x, values) < 1e-6


def test_splits_side_by_side_and_one_after_the_other_give_the_same_bits():
    weight = tile(random_grouped("n4", 64, 2048))
    assert weight.num_splits == 4
    # On a CPU products of other widths go other ways through BLAS: only a GPU can prove equal bits.
    x = torch.randint(-8, 8, (40, 2048), generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    matmul = Matmul(torch.float16, DEVICE)
    many = matmul(x, weight, 40)
    few = matmul(x[:3], weight, 3)
    if DEVICE.type == "cuda":
        assert torch.equal(many[:3], few)
    assert torch.allclose(many[:3], few, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [16, 64])
def test_slots_take_their_row_and_their_expert(rows):
    weights = [random_grouped("q4", 33, 64, seed) for seed in range(3)]
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).half().to(DEVICE)
    # Two slots per row of x; expert 2 has none, expert 0 has five, expert 1 three.
    slots = torch.full((2, rows), -1, dtype=torch.int32)
    slots[0, :5] = torch.tensor([0, 2, 3, 4, 7])
    slots[1, :3] = torch.tensor([1, 5, 6])
    experts = torch.tensor([0, 1], dtype=torch.int32)
    got = Matmul(torch.float16, DEVICE)(
        x,
        stacked([tile(weight) for weight in weights]),
        8,
        slots_per_row=2,
        slots=slots.flatten().to(DEVICE),
        experts=experts.to(DEVICE),
        rows=rows,
    )
    for expert, mine in ((0, [0, 2, 3, 4, 7]), (1, [1, 5, 6])):
        picked = x[torch.tensor(mine, device=DEVICE) // 2]
        assert error(got[mine], picked, weights[expert].values(torch.float64)) < 1e-6


def test_panels_of_the_packed_cache_give_the_products_of_their_values():
    ops = CpuOps(1)
    values = np.random.default_rng(0).standard_normal((50, 96)).astype(np.float32)
    memory = arena(packed_size("n4", 50, 96))
    assert ops.pack_floats("n4", values, memory)
    weight = unpack_panels("n4", 50, 96, torch.from_numpy(memory).to(DEVICE))
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    got = Matmul(torch.float32, DEVICE)(x, tile(weight), 2)
    unpacked = torch.from_numpy(ops.unpack(ops.packed("n4", 50, 96, memory)))
    assert error(got, x, unpacked) < 1e-6
