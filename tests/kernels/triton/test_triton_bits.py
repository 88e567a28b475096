"""The same bits on a GPU for any batch, chunk and split: what the interpreter cannot prove, since it
multiplies with another library. Run by `make test-gpu`.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from bise.engine.request import SamplingParams  # noqa: E402
from bise.engine.sampling import Sampler, uniform  # noqa: E402
from bise.kernels import BLOCK_SIZE, AttentionMeta  # noqa: E402
from bise.kernels.cpu import CpuOps, arena, packed_size  # noqa: E402
from bise.kernels.triton.lazy import dense  # noqa: E402
from bise.kernels.triton.ops import TritonOps  # noqa: E402
from bise.kernels.triton.sampling import SURE, sample  # noqa: E402

pytestmark = pytest.mark.gpu
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def packed_weight(ops, packed_format, num_rows, num_columns, seed=0):
    host = CpuOps(1)
    values = np.random.default_rng(seed).standard_normal((num_rows, num_columns)).astype(np.float32)
    memory = arena(packed_size(packed_format, num_rows, num_columns))
    assert host.pack_floats(packed_format, values / num_columns**0.5, memory)
    return ops.packed(packed_format, num_rows, num_columns, memory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed_format", ["z4", "n4", "q4", "q8", "bf16"])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 4096), (4096, 14336), (100, 2080)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(dtype, packed_format, n, k):
    ops = TritonOps(DTYPES[dtype])
    weight = packed_weight(ops, packed_format, n, k)
    x = torch.randn(513, k, device="cuda").to(DTYPES[dtype])
    whole = dense(ops.linear(x, [weight])[0])
    for rows in (1, 2, 3, 8, 16, 17, 64, 65, 300):
        assert torch.equal(dense(ops.linear(x[:rows], [weight])[0]), whole[:rows]), rows
        assert torch.equal(dense(ops.linear(x[200 : 200 + rows], [weight])[0]), whole[200 : 200 + rows]), rows


@pytest.mark.parametrize("packed_format", ["z4", "n4", "q8", "bf16"])
def test_a_layer_gives_a_row_the_same_bits_alone_and_in_any_batch(packed_format):
    """Norm, gate and residual sum go along with products of few rows; for many the norm is its own kernel."""
    ops = TritonOps(torch.bfloat16)
    shapes = ((2048, 1024), (2048, 1024), (1024, 2048))
    bank = ops.experts(
        [tuple(packed_weight(ops, packed_format, *shape, seed=i) for i, shape in enumerate(shapes))]
    )
    qkv = ops.together(
        [packed_weight(ops, packed_format, rows, 1024, seed=rows) for rows in (1024, 256, 256)]
    )
    weight = ops.vector(np.random.default_rng(3).standard_normal(1024).astype(np.float32))
    stream = torch.randn(300, 1024, device="cuda")

    def layer(rows):
        x = rows.clone()
        normed = ops.norm(x, weight, 1e-5)
        parts = [part.clone() for part in ops.linear(normed, qkv)]
        total, after = ops.add_norm(x, ops.mlp(normed, bank), weight, 1e-5)
        return [*parts, total, after.tensor()]

    whole = layer(stream)
    for rows in (1, 2, 16, 17, 64, 65, 129):
        for got, want in zip(layer(stream[:rows]), whole, strict=True):
            assert torch.equal(got, want[:rows]), rows


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_tokens_of_the_device_are_those_of_the_processor(rows):
    vocab = 32768
    logits = torch.randn(rows, vocab, device="cuda") * 3
    ways = [
        {"temperature": 0},
        {"temperature": 0.7},
        {"top_k": 50},
        {"top_p": 0.9},
        {"min_p": 0.02, "top_k": 99},
    ]
    params = [SamplingParams(**ways[index % len(ways)]) for index in range(rows)]
    numbers = [(p.temperature, p.top_k, p.top_p, p.min_p, uniform(i, 7)) for i, p in enumerate(params)]
    tokens, status = sample(logits, np.array(numbers), None)
    for index, one in enumerate(params):
        sampler = Sampler(one, vocab_size=vocab, prompt=[1], stop_ids=[], seed=index)
        assert status[index] != SURE or tokens[index] == sampler.choose(logits[index].cpu().numpy(), 7, 0)
    assert (status == SURE).mean() > 0.9


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 100])
def test_a_mixture_gives_a_row_the_same_bits_sorted_or_not(rows):
    ops = TritonOps(torch.bfloat16)
    shapes = ((512, 256), (512, 256), (256, 512))
    bank = ops.experts(
        [
            tuple(
                packed_weight(ops, "n4", *shape, seed=9 * expert + index)
                for index, shape in enumerate(shapes)
            )
            for expert in range(8)
        ]
    )
    router = ops.weight(np.random.default_rng(5).standard_normal((8, 256)).astype(np.float32))
    x = torch.randn(100, 256, device="cuda").bfloat16()
    whole = dense(ops.moe(x, router, bank, 2))
    assert torch.equal(dense(ops.moe(x[:rows], router, bank, 2)), whole[:rows])


@pytest.mark.parametrize("kv", ["bf16", "q8"])
@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize("sizes", [[1], [64, 1, 1, 37, 200], [512], [33], [7]])
def test_chunks_do_not_change_a_bit_of_attention(window, sizes, kv):
    rows, heads, kv_heads, width = 1100, 8, 2, 128
    rng = np.random.default_rng(0)
    parts = [
        rng.standard_normal((rows, count * width)).astype(np.float32) for count in (heads, kv_heads, kv_heads)
    ]
    table = rng.permutation(rows // BLOCK_SIZE + 1).astype(np.int32)[None]

    def run(steps):
        ops = TritonOps(torch.bfloat16)
        pages = ops.pages(table.shape[1], kv_heads, width, kv)
        found, first = [], 0
        while first < rows:
            count = min(steps[len(found) % len(steps)], rows - first)
            at = np.arange(first, first + count, dtype=np.int32)
            meta = AttentionMeta(
                np.array([0, count], np.int32),
                np.array([first], np.int32),
                table,
                table[0, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE,
            )
            rope = ops.rope(10000.0 ** -(np.arange(0, width, 2) / width), at, 1.0)
            q, k, v = (torch.as_tensor(each[at], device="cuda") for each in parts)
            found.append(ops.attend(q, k, v, rope, meta, pages, width, window))
            first += count
        return torch.cat(found)

    assert torch.equal(run(sizes), run([rows]))
