"""Low-rank additions on the cpu backend: values, bits, and formats."""

from pathlib import Path

import numpy as np
import pytest

cpu = pytest.importorskip("bise.kernels.cpu", exc_type=ImportError)


@pytest.fixture(scope="module")
def ops():
    return cpu.CpuOps(2)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_an_adapter_of_small_matrices_takes_about_their_size(ops):
    a, b = random(16, 64), random(64, 16, seed=1)
    before = resident_bytes()
    kept = [ops.lora(a, b, 1.0) for _ in range(100)]
    assert resident_bytes() - before < 20 << 20
    assert len(kept) == 100


@pytest.mark.parametrize("rank", [1, 3, 16, 33])
def test_the_product_equals_the_formula(ops, rank):
    y, x, a, b = random(7, 50), random(7, 40, seed=1), random(rank, 40, seed=2), random(50, rank, seed=3)
    rows = np.array([1, 4, 6])
    found = ops.add_lora(y.copy(), x, ops.lora(a, b, 0.25), rows)
    expected = y.astype(np.float64)
    expected[rows] += 0.25 * (x[rows].astype(np.float64) @ a.T.astype(np.float64)) @ b.T.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    untouched = [0, 2, 3, 5]
    assert np.array_equal(found[untouched], y[untouched])


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(ops):
    y, x = random(65, 50), random(65, 64, seed=1)
    lora = ops.lora(random(5, 64, seed=2), random(50, 5, seed=3), 0.3)
    whole = ops.add_lora(y.copy(), x, lora, np.arange(65))
    for rows in ([0], [64], [1, 2, 3], list(range(5, 40)), [7, 21, 63]):
        index = np.array(rows)
        part = ops.add_lora(y[index].copy(), x[index], lora, np.arange(len(rows)))
        assert np.array_equal(part, whole[index])
        among = ops.add_lora(y.copy(), x, lora, index)
        assert np.array_equal(among[index], whole[index])


@pytest.mark.parametrize(("dtype", "name"), [(np.float32, "f32"), (np.float16, "f16")])
def test_values_are_kept_in_the_narrowest_format_that_holds_them(ops, dtype, name):
    values = random(9, 40).astype(dtype).astype(np.float32)
    assert cpu.narrowest_float(values) == name
    assert np.array_equal(ops.unpack(ops.lora(values, values.T.copy(), 1.0)[0]), values)
    brief = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert cpu.narrowest_float(brief) == "bf16"
    assert np.array_equal(ops.unpack(ops.lora(brief, brief.T.copy(), 1.0)[0]), brief)


def test_the_width_of_storage_does_not_change_the_bits(ops):
    a, b = (random(*shape, seed=4).astype(np.float16).astype(np.float32) for shape in ((6, 64), (50, 6)))
    x, rows = random(8, 64), np.arange(8)
    wide = (ops.quantized(a, "f32"), ops.quantized(b, "f32"), np.float32(0.5))
    zeros = np.zeros((8, 50), np.float32)
    narrow = ops.add_lora(zeros.copy(), x, ops.lora(a, b, 0.5), rows)
    assert np.array_equal(narrow, ops.add_lora(zeros.copy(), x, wide, rows))


def test_silu_of_an_element_does_not_depend_on_its_neighbours(ops):
    values = random(4097) * 20
    values[:5] = (-100.0, 100.0, -745.0, -1e30, 0.0)
    ones = np.ones_like(values)
    whole = ops.gated(values[None].copy(), ones[None])[0]
    for start, stop in ((0, 1), (1, 18), (5, 37), (3, 4096), (4096, 4097)):
        part = ops.gated(values[None, start:stop].copy(), ones[None, start:stop].copy())[0]
        assert np.array_equal(part.view(np.uint32), whole[start:stop].view(np.uint32))
    exact = values.astype(np.float64) / (1 + np.exp(-np.clip(values, -700, None).astype(np.float64)))
    np.testing.assert_allclose(whole, exact, rtol=1e-6, atol=1e-30)
