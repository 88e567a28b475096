from __future__ import annotations

import pytest

from bise.config import ModelConfig
from bise.engine.memory import kv_bytes, packed_formats, scratch_bytes
from bise.errors import ConfigError, UserError
from bise.plan import MachineLimits, decode_work, known_shape, make_plan, prefill_work, shape_source

GIB = 1 << 30
LIMITS = MachineLimits(read_bytes_s=34e9, int8_ops_s=930e9, float_ops_s=220e9)


def plan_of(name: str, **changes):
    options = {"quant": "q4", "kv": "auto", "context": 4096, "sequences": 1, "memory": 16 * GIB} | changes
    return make_plan(known_shape(name), limits=LIMITS, **options)


def small(**changes) -> ModelConfig:
    fields = {"family": "mistral", "dim": 256, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
              "head_dim": 64, "hidden_dim": 512, "vocab_size": 1024, "max_context": 65536}  # fmt: skip
    return ModelConfig(**(fields | changes))


def test_weights_of_a_7b_in_4_bits_are_its_matrices_at_4_5_bits_and_two_8_bit_tables():
    tables = 2 * 32768 * 4096
    inner = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    norms = 65 * 4096 * 4
    expected = inner * 4.5 / 8 + tables * 8.5 / 8 + norms
    assert plan_of("mistral-7b").need.weights == pytest.approx(expected, abs=4 << 20)


def test_kv_counts_every_sequence_and_every_layer():
    one = plan_of("mistral-7b").need.kv
    assert one == 4096 * 32 * 2 * (1024 * 2 + 8 * 4)
    assert plan_of("mistral-7b", sequences=3).need.kv == 3 * one
    assert plan_of("mistral-7b", kv="q8").need.kv == 4096 * 32 * 2 * (1024 + 8 * 4)


def test_a_window_bounds_the_kv_of_a_long_context():
    full, windowed = small(), small(windows=(1024,) * 4)
    assert kv_bytes(windowed, 1024, "f16") == kv_bytes(full, 1024, "f16")
    assert kv_bytes(windowed, 65536, "f16") < kv_bytes(full, 2048, "f16")


def test_scratch_grows_with_the_rows_of_a_step():
    config = small()
    formats = packed_formats(shape_source("x", config), "q8")
    one, many = scratch_bytes(config, formats, 1), scratch_bytes(config, formats, 512)
    logits = config.vocab_size * 12
    assert many - logits == pytest.approx(512 * (one - logits), rel=0.01)


def test_the_largest_context_fits_and_one_more_token_does_not():
    plan = plan_of("s06", memory=900 << 20, context=64, quant="q8")
    assert 64 < plan.largest_context < 65536
    assert plan_of("s06", memory=900 << 20, context=plan.largest_context, quant="q8").fits
    beyond = -(-(plan.largest_context + 1) // 32) * 32  # a block is the smallest step of memory
    assert not plan_of("s06", memory=900 << 20, context=beyond, quant="q8").fits


def test_the_best_quantisation_is_the_widest_that_fits():
    assert plan_of("mistral-7b", memory=16 * GIB).best_quant == "bf16"
    assert plan_of("mistral-7b", memory=10 * GIB).best_quant == "q8"
    assert plan_of("mistral-7b", memory=6 * GIB).best_quant == "q4"
    assert plan_of("mistral-7b", memory=3 * GIB).best_quant is None


def test_a_model_that_does_not_fit_is_told_without_a_context():
    plan = plan_of("mixtral-8x7b", memory=8 * GIB)
    assert not plan.fits
    assert plan.largest_context == 0


def test_decoding_is_bound_by_the_bytes_of_the_weights_read_once():
    source = known_shape("mistral-7b")
    work = decode_work(source.config, packed_formats(source, "q4"), "f16", batch=1, context=1)
    table = 32768 * 4096 * 8.5 / 8
    assert work.bytes_read == pytest.approx(plan_of("mistral-7b").need.weights - table, rel=0.001)
    assert work.seconds(LIMITS) == work.bytes_read / 34e9


def test_prefill_is_bound_by_operations_and_counts_the_head_once():
    source = known_shape("mistral-7b")
    work = prefill_work(source.config, packed_formats(source, "q4"), prompt=512)
    assert work.operations == 512 * 2 * 6_979_321_856 + 2 * 32768 * 4096
    assert work.seconds(LIMITS) == work.operations / 930e9


def test_float_weights_are_held_against_the_float_rate():
    source = known_shape("s06")
    work = prefill_work(source.config, packed_formats(source, "bf16"), prompt=512)
    assert work.seconds(LIMITS) == work.operations / 220e9


def test_a_mixture_reads_two_of_eight_experts_for_one_row_and_nearly_all_for_many():
    source = known_shape("moe")
    formats = packed_formats(source, "q8")
    expert_bytes = 8 * 8 * 3 * 2048 * 4096 * 8.5 / 8
    rows = [
        decode_work(source.config, formats, "f16", batch=batch, context=1).bytes_read for batch in (1, 32)
    ]
    assert rows[1] - rows[0] == pytest.approx(expert_bytes * 0.75, rel=0.01)


def test_a_tied_model_reads_its_table_as_the_head():
    tied, free = small(tied_embeddings=True), small()
    read = [
        decode_work(
            config, packed_formats(shape_source("x", config), "q8"), "f16", batch=1, context=1
        ).bytes_read
        for config in (tied, free)
    ]
    assert read[0] == read[1]


def test_without_limits_no_speed_is_told():
    plan = make_plan(known_shape("s06"), quant="q8", kv="auto", context=64, sequences=1, memory=GIB)
    assert plan.decode_tokens_s is None


def test_a_context_beyond_the_models_own_is_refused():
    with pytest.raises(ConfigError, match="from 1 to 32768 tokens"):
        plan_of("mistral-7b", context=40000)


def test_an_unknown_shape_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'nope' is not a known shape; known: tinyllama, .* s06, moe"):
        known_shape("nope")


def test_a_shape_has_no_values():
    with pytest.raises(ConfigError, match="no values"):
        known_shape("s06").tensors["output"].floats(0, 1)


def test_adapters_take_their_memory_from_the_longest_context():
    plain, tuned = plan_of("mistral-7b", memory=6 * GIB), plan_of("mistral-7b", memory=6 * GIB, adapters=GIB)
    assert tuned.need.total == plain.need.total + GIB
    assert 0 < tuned.largest_context < plain.largest_context
    assert (plain.fits, plan_of("mistral-7b", memory=5 * GIB, adapters=GIB).fits) == (True, False)
