"""Attention, rotation, norms and the KV pages of the cpu backend."""

import numpy as np
import pytest

from bise.kernels import BLOCK_SIZE, AttentionMeta
from bise.kernels.cpu import CpuOps, detected_isas

ISAS = detected_isas()
# Rounding of K and V when stored: relative to values of about 3 at most.
KV_ERROR = {"f32": 5e-6, "f16": 4e-3, "bf16": 3e-2, "q16": 1e-3, "q8": 6e-2}
SHAPES = [(8, 2, 32), (6, 2, 20), (4, 4, 128), (5, 1, 64), (3, 3, 2)]


def attention_float64(q, k, v, heads, kv_heads, width, window, theta=10000.0):
    rows = len(q)
    inv_freq = theta ** -(np.arange(0, width, 2) / width)
    angle = np.arange(rows)[:, None, None] * inv_freq
    cos, sin = np.cos(angle), np.sin(angle)

    def rotated(x, count):
        x = x.astype(np.float64).reshape(rows, count, width)
        a, b = x[..., : width // 2], x[..., width // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    q3, k3 = rotated(q, heads), rotated(k, kv_heads)
    v3 = v.astype(np.float64).reshape(rows, kv_heads, width)
    out = np.zeros_like(q3)
    for p in range(rows):
        low = 0 if window is None else max(0, p - window + 1)
        for h in range(heads):
            g = h // (heads // kv_heads)
            s = k3[low : p + 1, g] @ q3[p, h] / np.sqrt(width)
            e = np.exp(s - s.max())
            out[p, h] = e @ v3[low : p + 1, g] / e.sum()
    return out.reshape(rows, -1)


class Run:
    """One sequence fed in chunks through pages whose blocks lie in a shuffled order."""

    def __init__(self, ops, heads, kv_heads, width, window, kv_format, rows, seed=0):
        rng = np.random.default_rng(seed)
        self.ops, self.width, self.window = ops, width, window
        blocks = rows // BLOCK_SIZE + 1
        self.pages = ops.pages(blocks + 3, kv_heads, width, kv_format)
        self.table = rng.permutation(blocks + 3)[:blocks].astype(np.int32)[None]
        self.q = rng.standard_normal((rows, heads * width)).astype(np.float32)
        self.k = rng.standard_normal((rows, kv_heads * width)).astype(np.float32)
        self.v = rng.standard_normal((rows, kv_heads * width)).astype(np.float32)
        self.inv_freq = 10000.0 ** -(np.arange(0, width, 2) / width)

    def step(self, first, count, forget=False):
        rows = slice(first, first + count)
        positions = np.arange(first, first + count, dtype=np.int32)
        table = self.table.copy()
        if forget and self.window:
            table[0, : max(0, first - self.window + 1) // BLOCK_SIZE] = -1
        meta = AttentionMeta(
            q_start=np.array([0, count], np.int32),
            q_pos=np.array([first], np.int32),
            block_table=table,
            slots=(table[0, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).astype(np.int32),
        )
        rope = self.ops.rope(self.inv_freq, positions, 1.0)
        q, k, v = self.q[rows].copy(), self.k[rows].copy(), self.v[rows].copy()
        return self.ops.attend(q, k, v, rope, meta, self.pages, self.width, self.window)

    def whole(self):
        return self.step(0, len(self.q))

    def chunked(self, sizes, forget=False):
        parts, first = [], 0
        while first < len(self.q):
            count = min(sizes[len(parts) % len(sizes)], len(self.q) - first)
            parts.append(self.step(first, count, forget))
            first += count
        return np.concatenate(parts)


@pytest.mark.parametrize("kv_format", ["f32", "f16", "bf16", "q16", "q8"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_attention_matches_float64(kv_format, heads, kv_heads, width, window):
    run = Run(CpuOps(2), heads, kv_heads, width, window, kv_format, 70)
    want = attention_float64(run.q, run.k, run.v, heads, kv_heads, width, window)
    assert np.abs(run.whole() - want).max() < KV_ERROR[kv_format]


def test_attention_over_several_splits_matches_float64():
    for window in (None, 600):
        run = Run(CpuOps(2), 2, 1, 32, window, "f32", 1100)
        want = attention_float64(run.q, run.k, run.v, 2, 1, 32, window)
        assert np.abs(run.whole() - want).max() < KV_ERROR["f32"]


@pytest.mark.parametrize("kv_format", ["f32", "f16", "bf16", "q16", "q8"])
@pytest.mark.parametrize("window", [None, 45, 520])
def test_chunks_threads_isa_and_freed_blocks_do_not_change_a_bit(kv_format, window, monkeypatch):
    rows = 600  # two splits
    results = []
    for isa in ISAS:
        monkeypatch.setenv("BISE_ISA", isa)
        for threads, sizes, forget in ((1, [rows], False), (3, [1], True), (2, [64, 1, 1, 37, 200], True)):
            if isa == "scalar" and sizes == [1]:
                continue  # slow, and covered by the others
            results.append(Run(CpuOps(threads), 4, 2, 24, window, kv_format, rows).chunked(sizes, forget))
    for other in results[1:]:
        assert other.tobytes() == results[0].tobytes()


def test_sequences_of_one_step_do_not_see_one_another():
    ops = CpuOps(2)
    runs = [Run(ops, 4, 2, 16, None, "f16", rows, seed) for rows, seed in ((40, 1), (5, 2), (70, 3))]
    pages = ops.pages(16, 2, 16, "f16")
    tables = np.full((3, 3), -1, np.int32)
    tables[0, :2], tables[1, :1], tables[2] = [9, 2], [11], [0, 15, 4]
    q_start = np.array([0, 40, 45, 115], np.int32)
    positions = np.concatenate([np.arange(40), np.arange(5), np.arange(70)]).astype(np.int32)
    owner = np.repeat([0, 1, 2], [40, 5, 70])
    slots = (tables[owner, positions // 32] * 32 + positions % 32).astype(np.int32)
    meta = AttentionMeta(q_start, np.zeros(3, np.int32), tables, slots)
    q, k, v = (np.concatenate([getattr(run, name) for run in runs]) for name in ("q", "k", "v"))
    rope = ops.rope(runs[0].inv_freq, positions, 1.0)
    got = ops.attend(q, k, v, rope, meta, pages, 16, None)
    assert got.tobytes() == np.concatenate([run.whole() for run in runs]).tobytes()


def test_stale_values_of_a_former_owner_never_reach_a_result():
    ops = CpuOps(1)
    dirty = Run(ops, 4, 2, 16, 20, "f16", 90)
    clean = dirty.whole()
    dirty.k[:], saved = np.nan, dirty.k.copy()
    dirty.v[:], saved_v = np.nan, dirty.v.copy()
    dirty.whole()  # fills every block with NaN
    dirty.k, dirty.v = saved, saved_v
    assert dirty.chunked([13]).tobytes() == clean.tobytes()


@pytest.mark.parametrize(
    ("kv_format", "where"), [("f32", "k"), *((kv, where) for kv in ("q16", "q8") for where in "qkv")]
)
def test_nan_reaches_the_result_of_queries_that_see_it_and_no_other(kv_format, where):
    run = Run(CpuOps(1), 4, 2, 16, None, kv_format, 40)
    getattr(run, where)[30] = np.nan
    got = run.whole()
    sees = np.arange(40) == 30 if where == "q" else np.arange(40) >= 30
    assert np.isfinite(got[~sees]).all()
    assert np.isnan(got[sees]).all()


@pytest.mark.parametrize("scores", [0.1, 1, 3])
def test_sixteen_bit_integers_cost_no_more_than_half_precision(scores):
    errors = {}
    for kv_format in ("f16", "q16"):
        run = Run(CpuOps(2), 4, 1, 64, None, kv_format, 700)
        run.q *= scores
        run.k[:, 5] *= 10  # channels that stand out, as trained models have
        want = attention_float64(run.q, run.k, run.v, 4, 1, 64, None)
        errors[kv_format] = np.sqrt(((run.whole() - want) ** 2).mean() / (want**2).mean())
    assert errors["q16"] < 2 * errors["f16"] < 2e-3


@pytest.mark.parametrize("kv_format", ["q16", "q8"])
def test_values_of_any_size_keep_their_relative_error(kv_format):
    for size in (1e-12, 1e12):
        run = Run(CpuOps(1), 4, 2, 32, None, kv_format, 80)
        want = attention_float64(run.q, run.k, run.v, 4, 2, 32, None)
        run.v *= np.float32(size)
        run.q *= np.float32(1 / size)
        run.k *= np.float32(size)
        assert np.abs(run.whole() / size - want).max() < KV_ERROR[kv_format]


@pytest.mark.parametrize("width", [1, 15, 16, 100, 257])
def test_norm_matches_float64_on_every_isa_with_equal_bits(width, monkeypatch):
    rng = np.random.default_rng(width)
    x, y = (rng.standard_normal((9, width)).astype(np.float32) for _ in range(2))
    weight = rng.standard_normal(width).astype(np.float32)
    results = []
    for isa in ISAS:
        monkeypatch.setenv("BISE_ISA", isa)
        ops = CpuOps(1)
        total, normed = ops.add_norm(x.copy(), y, weight, 1e-5)
        assert total.tobytes() == (x + y).tobytes()
        assert normed.tobytes() == ops.norm(total.copy(), weight, 1e-5).tobytes()
        results.append(normed)
    wide = (x + y).astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    assert np.abs(results[0] - want).max() < 1e-5 * max(1, np.abs(want).max())
    assert all(other.tobytes() == results[0].tobytes() for other in results)


def test_attention_refuses_tables_and_slots_that_leave_the_pages():
    ops = CpuOps(1)
    pages = ops.pages(2, 1, 4, "f32")
    q, k, v = (np.zeros((1, 4), np.float32) for _ in range(3))

    def attend(block, slot, position=0, window=None, width=1):
        rope = ops.rope(np.ones(2), np.array([position], np.int32), 1.0)
        table = np.full((1, width), block, np.int32)
        meta = AttentionMeta(
            np.array([0, 1], np.int32), np.array([position], np.int32), table, np.array([slot], np.int32)
        )
        return ops.attend(q.copy(), k.copy(), v, rope, meta, pages, 4, window)

    attend(1, 33)
    for bad in (
        {"block": 2, "slot": 0},
        {"block": -1, "slot": 0},
        {"block": 0, "slot": 64},
        {"block": 0, "slot": -1},
        {"block": 0, "slot": 0, "position": 40},
        {"block": 0, "slot": 0, "position": -1},
    ):
        with pytest.raises(ValueError, match=r"range|short|bounds"):
            attend(**bad)
