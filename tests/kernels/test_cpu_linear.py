"""Matrix products of the cpu backend: every format, every instruction set, odd sizes."""

import os

import numpy as np
import pytest

from bise.errors import ConfigError
from bise.formats import FORMATS
from bise.kernels.cpu import CpuOps, arena, detected_isas, packed_format_of, packed_size
from bise.kernels.dequant import dequantize

ISAS = detected_isas()
FLOAT_FORMATS = ("f32", "f16", "bf16", "q8", "q4", "z4")
BLOCK_FORMATS = tuple(name for name, stored in FORMATS.items() if stored.is_quantised)

# Largest error of x W^T against float64, relative to the largest |x| . |W| row sum: activations are rounded
# to
# max/127 per 32 columns, so each product is off by at most 1/254 of the block's largest activation.
ACTIVATION_ERROR = 1 / 254
FLOAT_ERROR = 2e-6

SCALE_OFFSETS = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def ops_on(isa, monkeypatch, threads=1):
    monkeypatch.setenv("BISE_ISA", isa)
    return CpuOps(threads)


def random_blocks(rng, name, rows, columns):
    stored = FORMATS[name]
    raw = rng.integers(0, 256, (rows, stored.row_bytes(columns)), dtype=np.uint8)
    blocks = raw.reshape(-1, stored.block_bytes)
    for offset in SCALE_OFFSETS.get(name, (0,)):
        scales = rng.uniform(-0.01, 0.01, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw


def packed_blocks(ops, name, raw, columns):
    ggml_id = FORMATS[name].ggml_id
    packed_format = packed_format_of(ggml_id)
    memory = arena(packed_size(packed_format, len(raw), columns))
    assert ops.pack_blocks(ggml_id, raw, columns, memory)
    return ops.packed(packed_format, len(raw), columns, memory)


def largest_error(got, x, weight):
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    bound = np.abs(x).max(1, keepdims=True) * np.abs(weight.astype(np.float64)).sum(1)
    return float((np.abs(got - want) / bound).max())


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_every_gguf_block_is_repacked_without_loss(name, monkeypatch):
    raw = random_blocks(np.random.default_rng(1), name, 37, 512)
    ops = ops_on(ISAS[0], monkeypatch)
    want = dequantize(name, raw)
    got = ops.unpack(packed_blocks(ops, name, raw, 512))
    assert got.view(np.int32).tolist() == want.view(np.int32).tolist()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_products_with_gguf_blocks_match_float64(isa, name, monkeypatch):
    rng = np.random.default_rng(2)
    raw = random_blocks(rng, name, 21, 768)
    x = rng.standard_normal((19, 768)).astype(np.float32)
    ops = ops_on(isa, monkeypatch)
    got = ops.linear(x, [packed_blocks(ops, name, raw, 768)])[0]
    assert largest_error(got, x, dequantize(name, raw)) < ACTIVATION_ERROR


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packed_format", FLOAT_FORMATS)
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 1, 1), (3, 17, 33), (16, 48, 64), (37, 50, 95), (5, 31, 257)]
)
def test_products_of_odd_sizes_match_float64(isa, packed_format, rows, n, k, monkeypatch):
    rng = np.random.default_rng(rows * n * k)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    ops = ops_on(isa, monkeypatch)
    weight = ops.quantized(rng.standard_normal((n, k)).astype(np.float32), packed_format)
    bound = ACTIVATION_ERROR if packed_format in ("q8", "q4", "z4") else FLOAT_ERROR
    assert largest_error(ops.linear(x, [weight])[0], x, ops.unpack(weight)) < bound


@pytest.mark.parametrize("packed_format", [*FLOAT_FORMATS, *BLOCK_FORMATS])
def test_a_row_has_the_same_bits_alone_in_any_batch_on_any_threads_and_isa(packed_format, monkeypatch):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((45, 512)).astype(np.float32)
    raw = random_blocks(rng, packed_format, 83, 512) if packed_format in BLOCK_FORMATS else None
    dense = rng.standard_normal((83, 512)).astype(np.float32)
    results = []
    for isa in ISAS:
        for threads in (1, 3):
            ops = ops_on(isa, monkeypatch, threads)
            weight = (
                ops.quantized(dense, packed_format)
                if raw is None
                else packed_blocks(ops, packed_format, raw, 512)
            )
            results.append(ops.linear(x, [weight])[0])
            for size in (1, 2, 3, 7, 11, 13, 16, 29):
                parts = [ops.linear(x[at : at + size].copy(), [weight])[0] for at in range(0, 45, size)]
                results.append(np.concatenate(parts))
            if isa == "scalar":
                break
    for other in results[1:]:
        assert other.tobytes() == results[0].tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("packed_format", ["f32", "bf16", "q8", "q4", "z4"])
def test_the_fused_feed_forward_equals_its_parts_bit_for_bit(isa, packed_format, monkeypatch):
    rng = np.random.default_rng(4)
    ops = ops_on(isa, monkeypatch, 2)
    gate, up = (
        ops.quantized(rng.standard_normal((73, 96)).astype(np.float32), packed_format) for _ in range(2)
    )
    down = ops.quantized(rng.standard_normal((50, 73)).astype(np.float32), packed_format)
    bank = ops.experts([(gate, up, down)])
    x = rng.standard_normal((21, 96)).astype(np.float32)
    together = ops.mlp(x, bank)
    alone = np.concatenate([ops.mlp(x[i : i + 1].copy(), bank) for i in range(21)])
    assert together.tobytes() == alone.tobytes()
    g, u = (part.astype(np.float64) for part in ops.linear(x, [gate, up]))
    hidden = (g / (1 + np.exp(-g)) * u).astype(np.float32)
    assert np.abs(together - ops.linear(hidden, [down])[0]).max() < 2e-2 * np.abs(together).max()


@pytest.mark.parametrize("packed_format", ["q4", "n4", "z4", "q8"])
def test_rows_too_many_for_the_cache_have_the_bits_that_they_have_alone(packed_format, monkeypatch):
    rng = np.random.default_rng(11)
    ops = ops_on(ISAS[0], monkeypatch, 2)
    gate, up = (
        ops.quantized(rng.standard_normal((80, 4096)).astype(np.float32), packed_format) for _ in range(2)
    )
    down = ops.quantized(rng.standard_normal((40, 80)).astype(np.float32), packed_format)
    bank = ops.experts([(gate, up, down)])
    x = rng.standard_normal((71, 4096)).astype(np.float32)  # 71 x 128 blocks x 48 bytes: over 384 KiB
    many, hidden = ops.linear(x, [gate, up])[1], ops.mlp(x, bank)
    for size in (1, 8, 16):
        parts = [x[at : at + size].copy() for at in range(0, 71, size)]
        assert np.concatenate([ops.linear(part, [up])[0] for part in parts]).tobytes() == many.tobytes()
        assert np.concatenate([ops.mlp(part, bank) for part in parts]).tobytes() == hidden.tobytes()


@pytest.mark.parametrize("packed_format", ["f32", "q8"])
def test_a_mixture_adds_its_experts_in_rank_order_whatever_the_batch(packed_format, monkeypatch):
    rng = np.random.default_rng(5)
    ops = ops_on(ISAS[0], monkeypatch, 2)
    experts = [
        tuple(
            ops.quantized(rng.standard_normal(shape).astype(np.float32), packed_format)
            for shape in ((64, 48), (64, 48), (48, 64))
        )
        for _ in range(8)
    ]
    router = ops.weight(rng.standard_normal((8, 48)).astype(np.float32))
    bank = ops.experts(experts)
    x = rng.standard_normal((33, 48)).astype(np.float32)
    together = ops.moe(x, router, bank, 2)
    alone = np.concatenate([ops.moe(x[i : i + 1].copy(), router, bank, 2) for i in range(33)])
    assert together.tobytes() == alone.tobytes()
    scores = x.astype(np.float64) @ ops.unpack(router).T
    for row in range(33):
        first, second = np.argsort(-scores[row], kind="stable")[:2]
        share = 1 / (1 + np.exp(scores[row, second] - scores[row, first]))
        parts = [ops.mlp(x[row : row + 1].copy(), ops.experts([experts[i]]))[0] for i in (first, second)]
        want = share * parts[0] + (1 - share) * parts[1]
        assert np.abs(together[row] - want).max() < 1e-4 * np.abs(want).max()


def test_equal_router_scores_go_to_the_lower_expert(monkeypatch):
    ops = ops_on(ISAS[0], monkeypatch)
    rng = np.random.default_rng(6)
    experts = [
        tuple(ops.weight(rng.standard_normal(s).astype(np.float32)) for s in ((32, 32), (32, 32), (32, 32)))
        for _ in range(4)
    ]
    x = rng.standard_normal((1, 32)).astype(np.float32)
    got = ops.moe(x, ops.weight(np.zeros((4, 32), np.float32)), ops.experts(experts), 1)
    assert got.tobytes() == ops.mlp(x, ops.experts([experts[0]])).tobytes()


def test_infinite_activations_reach_the_result_instead_of_vanishing(monkeypatch):
    for isa in ISAS:
        ops = ops_on(isa, monkeypatch)
        weight = ops.quantized(np.ones((16, 64), np.float32), "q4")
        for bad in (np.inf, -np.inf, np.nan):
            x = np.ones((2, 64), np.float32)
            x[1, 40] = bad
            got = ops.linear(x, [weight])[0]
            assert np.isfinite(got[0]).all()
            assert np.isnan(got[1]).all()


@pytest.mark.parametrize("packed_format", FLOAT_FORMATS)
def test_packing_refuses_values_that_the_format_cannot_hold(packed_format):
    ops = CpuOps(1)
    bad = {"f16": 1e6, "q8": 1e9, "q4": 1e9, "z4": 1e9}.get(packed_format, np.inf)
    for value in (np.nan, -np.inf, bad):
        rows = np.ones((16, 32), np.float32)
        rows[3, 5] = value
        with pytest.raises(ConfigError, match="cannot hold"):
            ops.quantized(rows, packed_format)


def test_a_forced_instruction_set_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setenv("BISE_ISA", "neon")
    with pytest.raises(ConfigError, match=r"BISE_ISA=neon cannot run here; this processor offers: .*scalar"):
        CpuOps(1)
    assert os.environ["BISE_ISA"] == "neon"


def test_native_entry_points_refuse_arrays_of_the_wrong_kind_or_shape():
    ops = CpuOps(1)
    weight = ops.weight(np.ones((16, 32), np.float32))
    x = np.ones((2, 32), np.float32)
    for wrong in (x.astype(np.float64), x[:, ::2], np.asfortranarray(np.ones((3, 32), np.float32))):
        with pytest.raises((TypeError, ValueError)):
            ops.linear(wrong, [weight])
    with pytest.raises(ValueError, match="columns"):
        ops.linear(np.ones((2, 31), np.float32), [weight])
    with pytest.raises(ValueError, match="token id out of range"):
        ops.embed(weight, np.array([16], np.int32))
    with pytest.raises(ValueError, match="too few bytes"):
        ops.packed("q4", 64, 64, np.zeros(10, np.uint8))
    with pytest.raises(ValueError, match="256"):
        ops.packed("q5k", 16, 32, np.zeros(100000, np.uint8))
