"""Recorded decode steps: the same bits as steps that run as they are, and only where they may stand in."""

import tracemalloc

import numpy as np
import pytest

from bise.cache.pages import KVCache
from bise.config import ModelConfig
from bise.engine.engine import Engine
from bise.engine.replay import MAX_ROWS, STEP_BYTES, ReplayedModel, row_bytes
from bise.engine.request import Request, SamplingParams
from bise.kernels import AttentionMeta
from bise.kernels.cpu import CpuOps
from bise.model.batch import AdaptedRows, Batch
from bise.model.transformer import Transformer, weight_shapes

SHAPES = {
    "two window groups": {"windows": (None, 40)},
    "experts": {"windows": (None, None), "num_experts": 4, "experts_per_token": 2},
}


def models(name, threads=2):
    """Return (config, plain model, recorded one, ops) over the same weights."""
    config = ModelConfig(
        family="mistral", dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=96,
        vocab_size=60, max_context=256, **SHAPES[name],
    )  # fmt: skip
    ops, rng = CpuOps(threads), np.random.default_rng(1)
    weights = {}
    for key, shape in weight_shapes(config).items():
        values = rng.standard_normal(shape, np.float32)
        weights[key] = ops.vector(values) if len(shape) == 1 else ops.quantized(values / 6, "q8")
    plain = Transformer(config, weights, ops)
    return config, plain, ReplayedModel(plain, weights, ops, max_context=256), ops


class Counting:
    """A model that counts its passes."""

    def __init__(self, model):
        self.inner = model
        self.config = model.config
        self.passes = 0

    def forward(self, batch, cache=None):
        self.passes += 1
        return self.inner.forward(batch, cache)

    def logits(self, hidden):
        return self.inner.logits(hidden)


def answers(model, ops, config, kv_format):
    engine = Engine(
        model, ops, config=config, tokenizer=None, num_blocks=60, kv_format=kv_format, max_sequences=16,
        threaded=False,
    )  # fmt: skip
    params = SamplingParams(temperature=1, seed=3, max_tokens=45, logprobs=2, ignore_eos=True)
    first = engine.submit(Request(token_ids=tuple(range(1, 30)), params=params))
    for _ in range(9):  # alone at first, then others come and go
        engine.step()
    others = [
        engine.submit(Request(token_ids=tuple(range(n, n + 3 * n)), params=params)) for n in range(2, 8)
    ]
    return [[(c.token_ids, c.logprobs) for c in (handle.result(),)] for handle in (first, *others)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kv_format", ["q16", "f16"])
def test_recorded_steps_give_the_same_bits(name, kv_format):
    config, plain, recorded, ops = models(name)
    counted = Counting(plain)
    recorded._model = counted
    assert answers(recorded, ops, config, kv_format) == answers(plain, ops, config, kv_format)
    counted_alone = Counting(plain)
    answers(counted_alone, ops, config, kv_format)
    assert counted.passes < counted_alone.passes / 2


def decode_batch(config, rows, position):
    numbers = np.arange(rows, dtype=np.int32)
    meta = AttentionMeta(
        q_start=np.arange(rows + 1, dtype=np.int32),
        q_pos=np.full(rows, position, np.int32),
        block_table=numbers[:, None].copy(),
        slots=numbers * 32 + position,
    )
    return Batch(numbers + 5, np.full(rows, position, np.int32), (meta,) * len(config.window_groups), numbers)


def test_more_rows_than_are_recorded_another_cache_and_adapters_run_as_they_are():
    config, plain, recorded, ops = models("two window groups")
    mine, other = (KVCache(config, ops, (12, 12), "f32") for _ in range(2))
    recorded.prepare(mine)
    adapted = (AdaptedRows({}, np.array([0])),)
    cases = [
        (decode_batch(config, MAX_ROWS + 1, 0), mine),
        (decode_batch(config, 2, 0), other),
        (decode_batch(config, 2, 0).with_adapters(adapted), mine),
    ]
    for batch, cache in cases:
        counted = recorded._model = Counting(plain)
        recorded.forward(batch, cache)
        assert counted.passes == 1
    counted = recorded._model = Counting(plain)
    recorded.forward(decode_batch(config, 2, 0), mine)
    assert counted.passes == 0


def test_a_step_keeps_little_memory_and_a_large_model_none():
    from bise.hub.embedded import embedded_path
    from bise.model.checkpoint import open_model
    from bise.plan import shapes

    assert MAX_ROWS * row_bytes(open_model(embedded_path()).config) < STEP_BYTES
    assert row_bytes(shapes()["mistral-7b"]) > STEP_BYTES
    config, _, recorded, ops = models("experts")
    cache, batch = KVCache(config, ops, (12,), "f32"), decode_batch(config, 8, 0)
    recorded.prepare(cache)
    tracemalloc.start()
    try:
        recorded.forward(batch, cache)
        arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
        kept = tracemalloc.take_snapshot().filter_traces([arrays]).statistics("filename")
    finally:
        tracemalloc.stop()
    assert 0.7 < sum(entry.size for entry in kept) / (8 * row_bytes(config)) < 1.2


def test_what_changes_from_step_to_step_is_checked_at_each():
    config, _, recorded, ops = models("two window groups")
    cache = KVCache(config, ops, (4, 4), "f32")
    recorded.prepare(cache)
    batch = decode_batch(config, 1, 0)
    recorded.forward(batch, cache)
    batch.attention[0].block_table[0, 0] = 4
    with pytest.raises(ValueError, match="block table entry"):
        recorded.forward(batch, cache)
    batch.attention[0].block_table[0, 0] = 0
    batch.token_ids[0] = config.vocab_size
    with pytest.raises(ValueError, match="token id"):
        recorded.forward(batch, cache)
