"""A whole model on the Triton backend (its interpreter, where there is no GPU) against the float64 oracle."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bise.cache.pages import KVCache  # noqa: E402
from bise.kernels import BLOCK_SIZE, AttentionMeta  # noqa: E402
from bise.kernels.cpu import CpuOps, arena, packed_size  # noqa: E402
from bise.kernels.torch import TorchOps  # noqa: E402
from bise.kernels.triton.ops import TritonOps  # noqa: E402
from bise.model.batch import Batch  # noqa: E402
from bise.model.transformer import Transformer  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOW_HERE = () if DEVICE == "cuda" else pytest.mark.slow


def packed(ops, matrix):
    """Return a matrix in four bits, as `--quant q4` makes it."""
    memory = arena(packed_size("z4", *matrix.shape))
    assert CpuOps(1).pack_floats("z4", matrix, memory)
    return ops.packed("z4", *matrix.shape, memory)


def logits(ops, config, weights, steps, *, in_four_bits=False):
    """Return the logits of every row, computed in `steps` of some rows each, through pages."""

    def placed(name, array):
        if array.ndim == 1:
            return ops.vector(array)
        return packed(ops, array) if in_four_bits and not name.endswith("router") else ops.weight(array)

    transformer = Transformer(config, {name: placed(name, a) for name, a in weights.items()}, ops)
    blocks = -(-sum(steps) // BLOCK_SIZE)
    cache = KVCache(config, ops, [blocks] * len(config.window_groups), "f32")
    found, first = [], 0
    ids = np.random.default_rng(1).integers(0, config.vocab_size, sum(steps)).astype(np.int32)
    for count in steps:
        positions = np.arange(first, first + count, dtype=np.int32)
        meta = AttentionMeta(
            np.array([0, count], np.int32),
            np.array([first], np.int32),
            np.arange(blocks, dtype=np.int32)[None],
            positions,
        )
        batch = Batch(
            token_ids=ids[positions],
            positions=positions,
            attention=(meta,) * len(config.window_groups),
            logit_rows=np.arange(count, dtype=np.int32),
        )
        found.append(transformer.logits(transformer.forward(batch, cache)).double().cpu())
        first += count
    return torch.cat(found)


@pytest.mark.parametrize("name", ["dense full", "interleaved", "8 experts"])
def test_prompt_chunks_and_single_tokens_match_the_oracle(name, tiny_model):
    config, weights = tiny_model(name)
    want = logits(TorchOps(torch.float64), config, weights, [52])
    got = logits(TritonOps(torch.float32, DEVICE), config, weights, [34, 17, 1])
    assert float((got - want).abs().max()) < 2e-4 * float(want.abs().max())
    assert torch.equal(got.argmax(1), want.argmax(1))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=SLOW_HERE) for name in ("dense full", "8 experts")]
)
def test_models_of_four_bit_weights_match_the_oracle(name, tiny_model):
    config, weights = tiny_model(name)
    want = logits(TorchOps(torch.float64), config, weights, [52], in_four_bits=True)
    got = logits(TritonOps(torch.float32, DEVICE), config, weights, [34, 17, 1], in_four_bits=True)
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
    assert torch.equal(got.argmax(1), want.argmax(1))
