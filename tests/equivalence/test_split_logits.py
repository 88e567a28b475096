"""Whole models on processor and device together, split at every place, against the float64 oracle."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bise.cache.pages import KVCache  # noqa: E402
from bise.kernels import BLOCK_SIZE, AttentionMeta  # noqa: E402
from bise.kernels.cpu import CpuOps  # noqa: E402
from bise.kernels.experts import hold  # noqa: E402
from bise.kernels.split import SplitOps  # noqa: E402
from bise.kernels.torch import TorchOps  # noqa: E402
from bise.model.batch import Batch  # noqa: E402
from bise.model.transformer import Transformer  # noqa: E402


class RowOps(TorchOps):
    """Torch that computes every row on its own, so that what it is computed with cannot change its bits."""

    def linear(self, x, weights):
        parts = [super(RowOps, self).linear(row[None], weights) for row in x]
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def attend(self, q, k, v, rope, meta, pages, head_dim, window):
        found = []
        for index in range(len(meta.q_pos)):
            for row in range(meta.q_start[index], meta.q_start[index + 1]):
                position = meta.q_pos[index] + row - meta.q_start[index]
                one = AttentionMeta(
                    np.array([0, 1], np.int32),
                    np.array([position], np.int32),
                    meta.block_table[index : index + 1],
                    meta.slots[row : row + 1],
                )
                rows = slice(row, row + 1)
                tables = (rope[0][rows], rope[1][rows])
                found.append(super().attend(q[rows], k[rows], v[rows], tables, one, pages, head_dim, window))
        return torch.cat(found)


def split_weights(config, weights, ops, num_slots=None, num_fixed=None):
    """Return the weights of a model where `ops` computes them: experts held for `num_slots`, or the first
    `num_fixed` of each layer on the device and the others on the processor.
    """
    found = {}
    for name, array in weights.items():
        parts = name.split(".")
        if parts[0] == "layers":
            at = ops.layer(int(parts[1]))
        else:
            at = ops.layer(0) if name == "tok_embeddings" else ops
        at = ops.device if at is ops else at
        if ".experts." in name and at is ops.device:
            if num_slots is not None:
                found[name] = hold(at.weight(array), num_slots)
                continue
            if num_fixed is not None and int(parts[3]) >= num_fixed:
                at = ops.host
        found[name] = at.vector(array) if array.ndim == 1 else at.weight(array)
    return found


class Runs:
    """Feeds one sequence to a model, in chunks, and another one beside it if wanted."""

    def __init__(self, config, weights, ops):
        self.config = config
        self.model = Transformer(config, weights, ops)
        self.blocks = 8
        self.cache = KVCache(config, ops, [self.blocks] * len(config.window_groups), "f32")

    def rows(self, spans):
        """Return logits of spans (block of its table, tokens, first position) computed as one step."""
        ids, positions, starts, firsts, slots, tables = [], [], [0], [], [], []
        for block, tokens, first in spans:
            at = np.arange(first, first + len(tokens))
            ids += list(tokens)
            positions += list(at)
            starts.append(len(ids))
            firsts.append(first)
            tables.append([block, block + 1])
            slots += list((block + at // BLOCK_SIZE) * BLOCK_SIZE + at % BLOCK_SIZE)
        meta = AttentionMeta(*(np.array(each, np.int32) for each in (starts, firsts, tables, slots)))
        batch = Batch(
            token_ids=np.array(ids, np.int32),
            positions=np.array(positions, np.int32),
            attention=(meta,) * len(self.config.window_groups),
            logit_rows=np.arange(len(ids), dtype=np.int32),
        )
        found = self.model.logits(self.model.forward(batch, self.cache))
        return torch.as_tensor(found).cpu().double()

    def chunks(self, tokens, sizes):
        """Return the logits of all tokens, computed in steps of some sizes."""
        found, first = [], 0
        for size in sizes:
            found.append(self.rows([(0, tokens[first : first + size], first)]))
            first += size
        return torch.cat(found)


def tokens_of(config, count, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).tolist()


def oracle(config, weights, tokens):
    ops = TorchOps(torch.float64)
    own = {name: ops.vector(a) if a.ndim == 1 else ops.weight(a) for name, a in weights.items()}
    return Runs(config, own, ops).chunks(tokens, [len(tokens)])


def assert_close(found, wanted):
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
    assert torch.equal(found.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("name", ["interleaved", "8 experts"])
def test_a_model_split_at_any_layer_matches_the_oracle(name, tiny_model):
    config, weights = tiny_model(name)
    tokens = tokens_of(config, 40)
    wanted = oracle(config, weights, tokens)
    for host_layers in range(config.num_layers + 1):
        ops = SplitOps(CpuOps(1), TorchOps(), host_layers)
        runs = Runs(config, split_weights(config, weights, ops), ops)
        assert_close(runs.chunks(tokens, [31, 7, 1, 1]), wanted)


@pytest.mark.parametrize("num_fixed", [0, 3, 7])
def test_experts_that_the_processor_computes_match_the_oracle(num_fixed, tiny_model):
    config, weights = tiny_model("8 experts")
    tokens = tokens_of(config, 40)
    ops = SplitOps(CpuOps(1), TorchOps(), 0)
    runs = Runs(config, split_weights(config, weights, ops, num_fixed=num_fixed), ops)
    assert_close(runs.chunks(tokens, [31, 7, 1, 1]), oracle(config, weights, tokens))
    counts = ops.banks[0].counts
    assert counts.copied == 0
    assert (counts.found == 0) == (num_fixed == 0)
    assert counts.found < counts.wanted


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_experts_that_are_copied_give_the_bits_of_experts_that_are_there(num_slots, tiny_model):
    config, weights = tiny_model("8 experts")
    tokens, sizes = tokens_of(config, 44), [31, 7, 1, 1, 1, 1, 1, 1]
    whole = TorchOps()
    own = {name: whole.vector(a) if a.ndim == 1 else whole.weight(a) for name, a in weights.items()}
    ops = SplitOps(CpuOps(1), TorchOps(), 0)
    runs = Runs(config, split_weights(config, weights, ops, num_slots=num_slots), ops)
    assert torch.equal(runs.chunks(tokens, sizes), Runs(config, own, whole).chunks(tokens, sizes))


@pytest.mark.parametrize(
    ("name", "host_layers", "places"),
    [("interleaved", 2, {}), ("8 experts", 1, {}), ("8 experts", 0, {"num_fixed": 3}),
     ("8 experts", 0, {"num_slots": 3})],
)  # fmt: skip
def test_a_fixed_split_gives_a_row_the_same_bits_in_any_batch_and_chunk(
    name, host_layers, places, tiny_model
):
    config, weights = tiny_model(name)
    ops = SplitOps(CpuOps(2), RowOps(), host_layers)
    runs = Runs(config, split_weights(config, weights, ops, **places), ops)
    tokens, other = tokens_of(config, 24), tokens_of(config, 30, seed=2)
    alone = runs.chunks(tokens, [1] * 24)
    assert torch.equal(runs.chunks(tokens, [24]), alone)
    runs.rows([(2, other[:20], 0), (0, tokens[:9], 0)])
    beside = runs.rows([(0, tokens[9:], 9), (2, other[20:], 20)])[:15]
    assert torch.equal(beside, alone[9:])


@pytest.mark.parametrize(("host_layers", "places"), [(1, {}), (0, {"num_slots": 2}), (0, {"num_fixed": 3})])
def test_the_kernels_of_a_gpu_share_a_model_with_the_processor(host_layers, places, tiny_model):
    """In Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    from bise.kernels.triton.ops import TritonOps

    config, weights = tiny_model("8 experts")
    tokens = tokens_of(config, 12)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = SplitOps(CpuOps(1), TritonOps(torch.float32, device), host_layers)
    runs = Runs(config, split_weights(config, weights, ops, **places), ops)
    assert_close(runs.chunks(tokens, [10, 1, 1]), oracle(config, weights, tokens))
