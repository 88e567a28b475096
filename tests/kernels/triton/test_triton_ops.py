"""Attention, norms and experts of the Triton backend under its interpreter, against float64."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bise.kernels import BLOCK_SIZE, AttentionMeta  # noqa: E402
from bise.kernels.cpu import CpuOps  # noqa: E402
from bise.kernels.torch import TorchOps  # noqa: E402
from bise.kernels.triton.lazy import dense  # noqa: E402
from bise.kernels.triton.ops import TritonOps  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def largest_error(got, want):
    """Return the largest error over the largest value."""
    return float((got - want).abs().max() / want.abs().max())


class Feed:
    """The same rows fed to the kernels and to the float64 oracle, in chunks, through shuffled blocks."""

    def __init__(self, heads, kv_heads, width, window, rows, dtype=torch.float32, seed=0):
        rng = np.random.default_rng(seed)
        self.backends = [
            (TritonOps(dtype, DEVICE), "f32" if dtype == torch.float32 else "f16"),
            (TorchOps(torch.float64, "cpu"), "f32"),
        ]
        self.width, self.window = width, window
        blocks = -(-rows // BLOCK_SIZE)
        self.pages = [ops.pages(blocks + 2, kv_heads, width, kv) for ops, kv in self.backends]
        self.table = rng.permutation(blocks + 2)[:blocks].astype(np.int32)[None]
        self.q = rng.standard_normal((rows, heads * width)).astype(np.float32)
        self.k = rng.standard_normal((rows, kv_heads * width)).astype(np.float32)
        self.v = rng.standard_normal((rows, kv_heads * width)).astype(np.float32)
        self.inv_freq = 10000.0 ** -(np.arange(0, width, 2) / width)

    def step(self, first, count):
        rows = slice(first, first + count)
        positions = np.arange(first, first + count, dtype=np.int32)
        table = self.table.copy()
        if self.window:
            table[0, : max(0, first - self.window + 1) // BLOCK_SIZE] = -1
        meta = AttentionMeta(
            q_start=np.array([0, count], np.int32),
            q_pos=np.array([first], np.int32),
            block_table=table,
            slots=(table[0, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).astype(np.int32),
        )
        found = []
        for (ops, _), pages in zip(self.backends, self.pages, strict=True):
            rope = ops.rope(self.inv_freq, positions, 1.0)
            q, k, v = (
                torch.as_tensor(each[rows], device=ops.device).to(
                    torch.float64 if ops.dtype == torch.float64 else torch.float32
                )
                for each in (self.q, self.k, self.v)
            )
            found.append(ops.attend(q, k, v, rope, meta, pages, self.width, self.window).cpu().double())
        return found

    def fill(self, count):
        """Put keys and values of the first positions into the pages without computing attention there."""
        slots = self.table[0, np.arange(count) // BLOCK_SIZE] * BLOCK_SIZE + np.arange(count) % BLOCK_SIZE
        angles = np.arange(count)[:, None, None] * self.inv_freq
        left, right = np.split(self.k[:count].reshape(count, -1, self.width).astype(np.float64), 2, axis=2)
        turned = (
            left * np.cos(angles) - right * np.sin(angles),
            right * np.cos(angles) + left * np.sin(angles),
        )
        for pages in self.pages:
            for into, values in ((pages.k, np.concatenate(turned, 2)), (pages.v, self.v[:count])):
                into[slots] = torch.as_tensor(values.reshape(count, -1, self.width)).to(into)

    def largest_error(self, sizes, first=0):
        worst = 0.0
        for size in sizes:
            got, want = self.step(first, size)
            worst = max(worst, float((got - want).abs().max()))
            first += size
        assert first == len(self.q)
        return worst


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "window"),
    [(8, 2, 32, None), (6, 2, 20, None), (8, 2, 32, 7), (5, 1, 64, 7), (6, 2, 20, 40), (5, 1, 64, 40)],
)
def test_prompts_and_single_tokens_match_float64(heads, kv_heads, width, window):
    assert Feed(heads, kv_heads, width, window, 43).largest_error([40, 1, 2]) < 3e-6


@pytest.mark.parametrize("window", [None, 515])
def test_attention_over_several_splits_matches_float64(window):
    feed = Feed(2, 1, 16, window, 1025)
    feed.fill(1021)
    assert feed.largest_error([1, 3], first=1021) < 3e-6


def test_half_precision_keeps_the_precision_of_its_type():
    assert Feed(4, 2, 64, 50, 90, torch.float16).largest_error([70, 1, 19]) < 4e-3


def test_rows_of_several_sequences_do_not_see_one_another():
    together = TritonOps(torch.float32, DEVICE)
    width, rng = 16, np.random.default_rng(3)
    lengths, firsts = [1, 5, 40], [37, 0, 30]
    pages = together.pages(8, 1, width, "f32")
    pages.k.normal_(generator=torch.Generator(pages.k.device).manual_seed(0))
    pages.v.normal_(generator=torch.Generator(pages.k.device).manual_seed(1))
    before = pages.k.clone(), pages.v.clone()
    table = np.array([[0, 1, -1], [2, -1, -1], [3, 4, 5]], np.int32)
    q = rng.standard_normal((46, 2 * width)).astype(np.float32)
    kv = rng.standard_normal((2, 46, width)).astype(np.float32)

    def run(pick):
        rows, start, tables, positions = [], [0], [], []
        for index in pick:
            low = sum(lengths[:index])
            rows += range(low, low + lengths[index])
            start.append(len(rows))
            tables.append(table[index])
            positions += range(firsts[index], firsts[index] + lengths[index])
        at = np.array(positions, np.int32)
        owner = np.repeat(pick, [lengths[index] for index in pick])
        meta = AttentionMeta(
            np.array(start, np.int32),
            np.array([firsts[index] for index in pick], np.int32),
            np.array(tables),
            table[owner, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE,
        )
        pages.k.copy_(before[0])
        pages.v.copy_(before[1])
        rope = together.rope(10000.0 ** -(np.arange(0, width, 2) / width), at, 1.0)
        parts = (torch.as_tensor(each[rows], device=together.device) for each in (q, kv[0], kv[1]))
        return together.attend(*parts, rope, meta, pages, width, 33)

    whole = run([0, 1, 2])
    assert torch.allclose(whole[:1], run([0]), atol=1e-6)
    assert torch.allclose(whole[1:6], run([1]), atol=1e-6)
    assert torch.allclose(whole[6:], run([2]), atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 11, 70])
def test_norms_and_the_feed_forward_part_match_float64(rows):
    rng = np.random.default_rng(rows)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((72, 40), (72, 40), (40, 72))]
    x, y = rng.standard_normal((2, rows, 40)).astype(np.float32)
    weight = rng.standard_normal(40).astype(np.float32)
    found = []
    for ops, dtype in ((TritonOps(torch.float32, DEVICE), torch.float32), (TorchOps(torch.float64), None)):
        bank = ops.experts([tuple(ops.weight(each) for each in arrays)])
        left, right = (torch.as_tensor(each, device=ops.device).to(dtype or torch.float64) for each in (x, y))
        total, normed = ops.add_norm(left.clone(), right, ops.vector(weight), 1e-5)
        found.append([dense(each).double().cpu() for each in (total, normed, ops.mlp(normed, bank))])
    for got, want in zip(*found, strict=True):
        assert largest_error(got, want) < 1e-6


@pytest.mark.parametrize("rows", [1, 8, 9, 150])
def test_a_mixture_matches_float64_sorted_or_not(rows):
    rng = np.random.default_rng(rows)
    experts = [
        [rng.standard_normal(shape).astype(np.float32) for shape in ((48, 32), (48, 32), (32, 48))]
        for _ in range(5)
    ]
    x = rng.standard_normal((rows, 32)).astype(np.float32)
    router = rng.standard_normal((5, 32)).astype(np.float32)
    router[3] = router[1]  # equal scores go to the lower expert
    found = []
    for ops in (TritonOps(torch.float32, DEVICE), TorchOps(torch.float64)):
        bank = ops.experts([tuple(ops.weight(each) for each in expert) for expert in experts])
        found.append(
            ops.moe(torch.as_tensor(x, device=ops.device).to(ops.dtype), ops.weight(router), bank, 2)
        )
    got, want = (dense(each).double().cpu() for each in found)
    assert largest_error(got, want) < 1e-6


def test_the_experts_of_a_few_rows_join_the_residual_stream_in_one_launch():
    rng = np.random.default_rng(0)
    shapes = ((48, 32), (48, 32), (32, 48))
    ops = TritonOps(torch.float32, DEVICE)
    bank = ops.experts(
        [
            tuple(ops.weight(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)
            for _ in range(4)
        ]
    )
    router = ops.weight(rng.standard_normal((4, 32)).astype(np.float32))
    x = torch.as_tensor(rng.standard_normal((2, 32)).astype(np.float32), device=DEVICE)
    weight = ops.vector(np.ones(32, np.float32))
    stream = torch.as_tensor(rng.standard_normal((2, 32)).astype(np.float32), device=DEVICE)
    want = stream + ops.moe(x, router, bank, 2).tensor()
    total, normed = ops.add_norm(stream.clone(), ops.moe(x, router, bank, 2), weight, 1e-5)
    assert torch.equal(total, want)
    assert torch.equal(normed.tensor(), ops.norm(want, weight, 1e-5).tensor())


def test_adapters_of_some_rows_match_float64_and_leave_the_others_alone():
    rng = np.random.default_rng(1)
    y, x = rng.standard_normal((6, 50)).astype(np.float32), rng.standard_normal((6, 40)).astype(np.float32)
    a, b = rng.standard_normal((8, 40)).astype(np.float32), rng.standard_normal((50, 8)).astype(np.float32)
    rows = np.array([1, 4, 5])
    ops = TritonOps(torch.float32, DEVICE)
    own, device_x = (torch.as_tensor(each, device=DEVICE) for each in (y, x))
    got = ops.add_lora(own.clone(), device_x, ops.lora(a, b, 0.5), rows).cpu().double().numpy()
    want = y.astype(np.float64)
    want[rows] += 0.5 * (x[rows].astype(np.float64) @ a.T) @ b.T
    assert np.array_equal(got[[0, 2, 3]], y[[0, 2, 3]])
    assert np.abs(got - want).max() < 1e-4
    # A row has the same bits whoever else is adapted.
    alone = ops.add_lora(own.clone(), device_x, ops.lora(a, b, 0.5), rows[1:2]).cpu().double().numpy()
    assert np.allclose(alone[4], got[4], rtol=0, atol=0 if DEVICE == "cuda" else 1e-6)


@pytest.mark.parametrize("window", [None, 20])
def test_keys_and_values_in_8_bits_keep_the_precision_of_their_codes(window):
    feed = Feed(4, 2, 32, window, 41)
    feed.pages[0] = feed.backends[0][0].pages(len(feed.pages[0].k) // BLOCK_SIZE, 2, 32, "q8")
    assert 1e-4 < feed.largest_error([37, 1, 3]) < 3e-2


def test_codes_and_scales_of_8_bit_keys_and_values_are_those_of_the_processor():
    rng = np.random.default_rng(2)
    k, v = (rng.standard_normal((3, 2, 32)).astype(np.float32) for _ in range(2))
    v[1, 0] = 0.0
    slots = np.array([5, 40, 6], np.int32)
    meta = AttentionMeta(
        np.arange(4, dtype=np.int32), np.zeros(3, np.int32), np.array([[0], [1], [0]], np.int32), slots
    )
    found = []
    for ops in (TritonOps(torch.float32, DEVICE), CpuOps(1)):
        pages = ops.pages(2, 2, 32, "q8")
        angles = ops.rope(np.ones(16), np.zeros(3, np.int32), 1.0)
        rows = (np.ones((3, 64), np.float32), k.reshape(3, -1), v.reshape(3, -1))
        if isinstance(ops, TritonOps):
            rows = tuple(torch.as_tensor(each, device=DEVICE) for each in rows)
        ops.attend(*rows, angles, meta, pages, 32, None)
        found.append(pages)
    device, host = found
    codes_k, codes_v, scale_k, scale_v = ([*host.blocks[index]] for index in range(4))
    for row, slot in enumerate(slots):
        block, offset = divmod(int(slot), BLOCK_SIZE)
        for head in range(2):
            raw = (
                codes_k[block].view(np.int8).reshape(2, 2, 16, 16, 2)
            )  # head, half of 16 keys, pair, key, part
            want_k = raw[head, offset // 16, :, offset % 16].reshape(-1)
            want_v = codes_v[block].view(np.int8).reshape(2, 16, 32, 2)[head, offset // 2, :, offset % 2]
            assert np.array_equal(device.k[slot, head].cpu().numpy(), want_k), row
            assert np.array_equal(device.v[slot, head].cpu().numpy(), want_v), row
            assert device.k_scale[slot, head] == scale_k[block].view(np.float32).reshape(2, 32)[head, offset]
            assert device.v_scale[slot, head] == scale_v[block].view(np.float32).reshape(2, 32)[head, offset]


def test_a_block_of_8_bit_pages_travels_with_its_scales():
    ops = TritonOps(torch.float32, DEVICE)
    pages = ops.pages(3, 2, 16, "q8")
    pages.k[32:64], pages.v[32:64], pages.k_scale[32:64], pages.v_scale[32:64] = 3, -4, 0.5, 0.25
    content = np.concatenate([each.view(np.uint8).reshape(-1) for each in ops.read_block(pages, 1)])
    ops.write_block(pages, 2, content)
    for tensor in pages.arrays():
        assert torch.equal(tensor[64:96], tensor[32:64])
