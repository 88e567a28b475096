"""Whole decode steps under the interpreter: launches counted, recorded and replayed, the same bits as
without.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("counts launches in the interpreter", allow_module_level=True)

from bise.cache.pages import KVCache  # noqa: E402
from bise.config import ModelConfig  # noqa: E402
from bise.engine.graphs import GraphedModel  # noqa: E402
from bise.kernels import BLOCK_SIZE, AttentionMeta  # noqa: E402
from bise.kernels.triton.ops import TritonOps  # noqa: E402
from bise.model.batch import Batch  # noqa: E402
from bise.model.transformer import Transformer, weight_shapes  # noqa: E402

DENSE_LAYER = ["matmul", "_decode", "matmul", "matmul", "matmul"]
"""q, k and v; rotation, cache and attention; output; gate and up; down. Norms and sums go along."""
MIXTURE_LAYER = ["matmul", "_decode", "matmul", "matmul", "matmul", "matmul"]
"""As a dense layer, and the router."""


def model_of(layers=2, experts=0, windows=None, kv="f32"):
    config = ModelConfig(
        family="mistral", dim=64, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=96,
        vocab_size=70, max_context=256, windows=windows or (None,) * layers, num_experts=experts,
        experts_per_token=2 if experts else 0,
    )  # fmt: skip
    ops, rng = TritonOps(torch.float32, "cpu"), np.random.default_rng(0)
    weights = {
        name: ops.vector(np.ones(shape, np.float32))
        if len(shape) == 1
        else ops.weight(rng.standard_normal(shape).astype(np.float32) * 2 / shape[1] ** 0.5)
        for name, shape in weight_shapes(config).items()
    }
    cache = KVCache(config, ops, [12] * len(config.window_groups), kv)
    for index in range(layers):
        pages = cache.layer(index)
        pages.k.copy_(torch.randn(pages.k.shape, generator=torch.Generator().manual_seed(index)) * 3)
        pages.v.copy_(torch.randn(pages.v.shape, generator=torch.Generator().manual_seed(9 + index)) * 3)
        pages.k_scale.fill_(0.3)
        pages.v_scale.fill_(0.3)
    return Transformer(config, weights, ops), cache


def decode_batch(tables, positions, tokens, groups=1):
    """Return a step: sequence i brings its token at positions[i], its blocks are tables[i]."""
    width = max(len(table) for table in tables)
    table = np.array([[*each, *[-1] * (width - len(each))] for each in tables], np.int32)
    at = np.array(positions, np.int32)
    rows = np.arange(len(at))
    meta = AttentionMeta(
        q_start=np.arange(len(at) + 1, dtype=np.int32),
        q_pos=at,
        block_table=table,
        slots=table[rows, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE,
    )
    ids = np.array(tokens, np.int32)
    return Batch(ids, at, (meta,) * groups, rows.astype(np.int32))


def pages_of(cache, layers):
    return [each.clone() for index in range(layers) for each in cache.layer(index).arrays()]


@pytest.mark.parametrize(("experts", "layer"), [(0, DENSE_LAYER), (4, MIXTURE_LAYER)])
def test_a_decoded_layer_takes_five_launches_and_a_mixture_one_more(tape, experts, layer):
    model, cache = model_of(experts=experts)
    batch = decode_batch([[3, 1]], [40], [7])
    model.logits(model.forward(batch, cache))  # the tables of angles are made once
    with tape.running():
        model.logits(model.forward(batch, cache))
    assert tape.kernels == ["_embed", *layer, *layer, "matmul"]
    # A step brings its tokens and its places; nothing is computed outside of the kernels.
    assert set(tape.operations) <= {"_to_copy"}


@pytest.mark.parametrize(("windows", "kv"), [((None, 40), "f32"), ((None, None), "q8")])
def test_a_replayed_step_has_the_bits_of_a_plain_one_and_writes_where_it_does(tape, windows, kv):
    steps = [
        decode_batch([[3, 1], [5], [0, 2, 4]], [40, 9, 90], [7, 1, 69], len(set(windows))),
        decode_batch([[6], [10, 1]], [0, 63], [4, 7], len(set(windows))),
    ]
    plain, plain_cache = model_of(windows=windows, kv=kv)
    want = [plain.logits(plain.forward(step, plain_cache)) for step in steps]
    model, cache = model_of(windows=windows, kv=kv)
    before = pages_of(cache, 2)
    graphed = GraphedModel(model, torch.device("cpu"), max_rows=4, max_context=256, sizes=(4,), recorder=tape)
    graphed.prepare(cache)
    for old, new in zip(before, pages_of(cache, 2), strict=True):
        assert torch.equal(old, new), "rows that fill a step up wrote somewhere"
    for step, wanted in zip(steps, want, strict=True):
        hidden = graphed.forward(step, cache)
        assert len(hidden) == len(wanted)
        last = hidden[-1:]  # of this step, not of one before
        assert torch.allclose(graphed.logits(last), wanted[-1:], rtol=1e-5, atol=1e-5)
        assert torch.equal(graphed.logits(hidden), wanted)
    assert graphed.num_replayed == len(steps)
    for one, other in zip(pages_of(cache, 2), pages_of(plain_cache, 2), strict=True):
        assert torch.equal(one, other)


def test_steps_that_were_not_recorded_run_as_they_are(tape):
    model, cache = model_of(layers=1)
    graphed = GraphedModel(model, torch.device("cpu"), max_rows=2, max_context=64, sizes=(2,), recorder=tape)
    graphed.prepare(cache)
    too_many = decode_batch([[1], [2], [3]], [4, 5, 6], [7, 8, 9])
    too_far = decode_batch([[1, 2, 3]], [70], [7])
    meta = AttentionMeta(
        np.array([0, 2], np.int32),
        np.array([0], np.int32),
        np.array([[4]], np.int32),
        np.array([128, 129], np.int32),
    )
    prompt = Batch(np.array([1, 2], np.int32), np.array([0, 1], np.int32), (meta,), np.array([1], np.int32))
    for step in (too_many, too_far, prompt):
        assert len(graphed.logits(graphed.forward(step, cache))) == len(step.token_ids)
    assert graphed.num_replayed == 0


def test_a_device_that_cannot_record_runs_steps_as_they_are(caplog):
    class Refusing:
        def record(self, run):
            raise RuntimeError("operation not permitted when stream is capturing")

    model, cache = model_of(layers=1)
    graphed = GraphedModel(model, torch.device("cpu"), max_rows=2, max_context=64, recorder=Refusing())
    graphed.prepare(cache)
    assert "graphs_off" in caplog.text
    assert len(graphed.logits(graphed.forward(decode_batch([[1]], [4], [7]), cache))) == 1


def test_a_recorded_step_that_looked_at_a_value_would_be_noticed(tape):
    with pytest.raises(AssertionError, match="waits for the device"), tape.running():
        torch.arange(3)[1].item()
