"""The matrix kernel under Triton's interpreter against float64: every format, odd sizes."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bise.kernels.cpu import CpuOps, arena, packed_size  # noqa: E402
from bise.kernels.grouped import Grouped, unpack_panels  # noqa: E402
from bise.kernels.panels import PANEL_FORMATS  # noqa: E402
from bise.kernels.triton.fused import add_rows, embed, norm  # noqa: E402
from bise.kernels.triton.launches import Card, Launch, launch_of, least_rows_of, shape_of, with_norm  # noqa: E402
from bise.kernels.triton.matmul import Chosen, Matmul, Normed  # noqa: E402
from bise.kernels.triton.sorting import sorted_slots  # noqa: E402
from bise.kernels.triton.tiles import chained, stacked, tile  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FOUR_BITS = [name for name, layout in PANEL_FORMATS.items() if layout.stored_bits == 4]


def random_grouped(packed_format: str, num_rows: int, num_columns: int, seed: int = 0) -> Grouped:
    """Return a matrix with random codes and scales: every bit pattern of a code occurs."""
    layout = PANEL_FORMATS[packed_format]
    bits = layout.stored_bits
    padded = -(-num_columns // 32) * 32
    generator = torch.Generator().manual_seed(seed)
    high = 256 if bits == 4 else 1 << (layout.low_bits + layout.high_bits)
    codes = torch.randint(0, high, (num_rows, padded * bits // 8), generator=generator, dtype=torch.int32)
    groups = (num_rows, padded // layout.group)
    if layout.nested:
        return Grouped(
            codes.to(torch.uint8).to(DEVICE),
            random_words(layout.nested, num_rows, -(-num_columns // 256), generator).to(DEVICE),
            None, bits, layout.group, layout.zero, layout.codebook, num_columns, layout.nested,
        )  # fmt: skip
    scale = torch.rand(groups, generator=generator) * 0.01
    minimum = torch.rand(groups, generator=generator) * 0.05 if layout.has_min else None
    return Grouped(
        codes.to(torch.uint8).to(DEVICE),
        scale.half().to(DEVICE),
        None if minimum is None else minimum.half().to(DEVICE),
        bits,
        layout.group,
        layout.zero,
        layout.codebook,
        num_columns,
    )


def random_words(nested: str, num_rows: int, supers: int, generator) -> torch.Tensor:
    """Return words whose low bits are random and whose top bits are halves between 1/64 and 1/8."""
    low = torch.randint(0, 1 << 24, (num_rows, supers, 4), generator=generator).int()
    halves = torch.randint(0x2400, 0x3000, (num_rows, supers, 2), generator=generator).int()
    if nested == "u6":
        tops = [halves[..., i // 2] >> 8 * (i % 2) & 255 for i in range(4)]
        return (low | torch.stack(tops, 2) << 24).flatten(1)
    tops = [halves[..., 0] >> 4 * i & 15 for i in range(4)]
    more = torch.randint(0, 16, low.shape, generator=generator).int() << 24  # the last field of seven bits
    return (low | more | torch.stack(tops, 2) << 28).flatten(1)


def error(got, x, values):
    """Return the largest error relative to |x| . |w|."""
    x, values = x.double().cpu(), values.double().cpu()
    return float(((got.double().cpu() - x @ values.T).abs() / (x.abs() @ values.abs().T)).max())


def product(dtype, x, weight, **options):
    """Return x [T, K] times the transpose of a matrix, without the padding."""
    return Matmul(dtype, DEVICE)(x, weight, **options)[:, : weight.shape[0]]


@pytest.mark.parametrize(
    ("packed_format", "rows"), [*((name, 3) for name in PANEL_FORMATS), *((name, 1) for name in FOUR_BITS)]
)
def test_products_of_every_format_match_float64(packed_format, rows):
    weight = random_grouped(packed_format, 70, 300)
    x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    got = product(torch.float16, x, tile(weight))
    assert got.shape == (rows, 70)
    assert got.dtype == torch.float32
    assert error(got, x, weight.values(torch.float64)) < 1e-6


def test_products_of_few_rows_match_float64_where_tensor_cores_take_no_fewer_than_16():
    assert [least_rows_of(major, "3.6.0") for major in (8, 9, 10, 12)] == [8, 16, 16, 8]
    assert least_rows_of(9, "3.9.0+git1") == 8
    matmul = Matmul(torch.float16, DEVICE)
    matmul.card = Card(least_rows=16)
    assert [shape_of(rows, bits, matmul.card).rows for bits in (0, 4, 8) for rows in (1, 8)] == [
        16,
        16,
        1,
        16,
        16,
        16,
    ]
    assert shape_of(8, 0, matmul.card, is_wide=True).rows == 8  # no tensor core takes it
    assert [with_norm(shape_of(rows, 4, matmul.card), matmul.card).stages for rows in (1, 16)] == [2, 3]
    assert with_norm(shape_of(1, 4, Card()), Card()).stages == 3
    weight = random_grouped("z4", 70, 600)
    x = torch.randn(3, 600, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    for rows in (x, x[:1]):
        assert error(matmul(rows, tile(weight))[:, :70], rows, weight.values(torch.float64)) < 1e-6


@pytest.mark.parametrize("packed_format", FOUR_BITS)
def test_a_row_alone_has_the_bits_that_it_has_among_others(packed_format):
    weight = tile(random_grouped(packed_format, 70, 600))
    # Whole numbers: the interpreter adds up dot products in another order, and they are exact in any.
    x = torch.randint(-8, 8, (3, 600), generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    assert torch.equal(product(torch.float16, x[1:2], weight)[0], product(torch.float16, x, weight)[1])


@pytest.mark.parametrize(("packed_format", "rows"), [("z4", 1), ("z4", 3), ("n4", 3), ("q8", 3)])
def test_products_in_bf16_match_float64(bf16, packed_format, rows):
    weight = random_grouped(packed_format, 66, 96)
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    assert error(product(torch.bfloat16, x, tile(weight)), x, weight.values(torch.float64)) < 1e-6


def test_products_with_bf16_weights_match_float64(bf16):
    weight = torch.randn(66, 96, generator=torch.Generator().manual_seed(2)).bfloat16().to(DEVICE)
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    assert error(product(torch.bfloat16, x, tile(weight)), x, weight) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 32), (3, 65, 45), (17, 64, 1040), (1, 40, 2100)])
def test_products_of_odd_sizes_match_float64(dtype, rows, n, k):
    generator = torch.Generator().manual_seed(n)
    values = torch.randn(n, k, generator=generator).to(dtype).to(DEVICE)
    x = torch.randn(rows, k, generator=generator).to(dtype).to(DEVICE)
    assert error(product(dtype, x, tile(values)), x, values) < 1e-6


def test_ranges_of_columns_side_by_side_and_one_after_the_other_give_the_same_bits():
    weight = tile(random_grouped("n4", 64, 2048))
    assert weight.num_splits == 4
    x = torch.randint(-8, 8, (3, 2048), generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    apart, behind = (
        product(torch.float16, x, weight, launch=Launch(16, 4, 3, apart=apart, two_blocks=False))
        for apart in (True, False)
    )
    assert torch.equal(apart, behind)


@pytest.mark.parametrize(("rows", "two_blocks"), [(32, False), (64, True), (128, True), (256, True)])
def test_the_shape_of_a_program_does_not_change_the_product(rows, two_blocks):
    weight = tile(random_grouped("q4", 150, 64))
    x = torch.randint(-8, 8, (20, 64), generator=torch.Generator().manual_seed(2)).half().to(DEVICE)
    launch = Launch(rows, 4, 3, apart=False, two_blocks=two_blocks)
    want = product(torch.float16, x, weight)
    # On a CPU products of other widths go other ways through BLAS: only a GPU can prove equal bits.
    assert torch.allclose(product(torch.float16, x, weight, launch=launch), want, rtol=1e-6, atol=0)


def normed_rows(rows, width, seed=5):
    """Return rows of a residual stream as `Normed`, and what their norm is in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator).to(DEVICE)
    weight = torch.randn(width, generator=generator).to(DEVICE)
    squares = add_rows(values, None)
    wide = values.double()
    want = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    return Normed(values, squares, weight, 1e-5), want


@pytest.mark.parametrize("width", [96, 160, 64])
def test_a_product_norms_its_rows_as_the_norm_does(width):
    normed, want = normed_rows(3, width)
    weight = random_grouped("q4", 70, width)
    fused_product = product(torch.float16, normed, tile(weight))
    apart = product(torch.float16, norm(normed, torch.float16), tile(weight))
    assert torch.equal(fused_product, apart)
    assert float((fused_product.double() - want @ weight.values(torch.float64).T).abs().max()) < 5e-3


@pytest.mark.parametrize("apart", [False, True])
def test_a_product_joins_the_residual_stream_with_its_squares(apart):
    weight = random_grouped("q8", 90, 1030)
    x = torch.randn(3, 1030, generator=torch.Generator().manual_seed(6)).half().to(DEVICE)
    stream = torch.randn(3, 90, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    launch = Launch(16, 4, 3, apart=apart, two_blocks=False)
    want = stream + product(torch.float16, x, tile(weight), launch=launch)
    squares = Matmul(torch.float16, DEVICE).add(x, tile(weight), stream, launch=launch)
    assert torch.equal(stream, want)
    assert torch.equal(squares, add_rows(want.clone(), None))
    assert torch.allclose(squares.sum(1), want.square().sum(1), rtol=1e-6)


@pytest.mark.parametrize("apart", [False, True])
def test_gate_and_up_in_one_launch_match_float64(apart):
    gate, up = (random_grouped("q4", 70, 1100, seed) for seed in (1, 2))
    x = torch.randn(3, 1100, generator=torch.Generator().manual_seed(8)).half().to(DEVICE)
    launch = Launch(16, 4, 3, apart=apart, two_blocks=False)
    got = Matmul(torch.float16, DEVICE).gate(x, tile(gate), tile(up), launch=launch)[:, :70]
    left, right = (x.double() @ each.values(torch.float64).T for each in (gate, up))
    assert torch.allclose(got.double(), torch.nn.functional.silu(left) * right, rtol=2e-3, atol=2e-3)


def test_weights_behind_one_another_are_one_copy_and_give_each_its_own_product():
    weights = [tile(random_grouped("q4", rows, 96, rows)) for rows in (70, 20, 33)]
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(9)).half().to(DEVICE)
    alone = [product(torch.float16, x, weight) for weight in weights]
    together = chained(weights)
    out = Matmul(torch.float16, DEVICE)(x, together)
    for weight, at, want in zip(weights, together.offsets(), alone, strict=False):
        assert torch.equal(out[:, at : at + weight.shape[0]], want)
        assert torch.equal(product(torch.float16, x, weight), want)
        assert weight.codes.untyped_storage().data_ptr() == together.codes.untyped_storage().data_ptr()


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_slots_take_their_row_and_their_expert(rows):
    weights = [random_grouped("q4", 33, 64, seed) for seed in range(3)]
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3)).half().to(DEVICE)
    # Two slots per row of x; expert 2 has none, expert 0 has five, expert 1 three.
    owner = torch.tensor([[0, 1], [0, 0], [0, 1], [1, 0]], dtype=torch.int32, device=DEVICE)
    if rows == 1:
        chosen = Chosen(owner.view(-1))
    else:
        slots = torch.full((2, rows), -1, dtype=torch.int32)
        slots[0, :5] = torch.tensor([0, 2, 3, 4, 7])
        slots[1, :3] = torch.tensor([1, 5, 6])
        chosen = Chosen(
            torch.tensor([0, 1], dtype=torch.int32, device=DEVICE), slots.flatten().to(DEVICE), rows
        )
    got = Matmul(torch.float16, DEVICE).slots(x, stacked([tile(weight) for weight in weights]), chosen, 2)[
        :, :33
    ]
    for expert, mine in ((0, [0, 2, 3, 4, 7]), (1, [1, 5, 6])):
        picked = x[torch.tensor(mine, device=DEVICE) // 2]
        assert error(got[mine], picked, weights[expert].values(torch.float64)) < 1e-6


@pytest.mark.parametrize(("rows", "experts"), [(5, 3), (40, 2), (600, 5)])
def test_slots_are_sorted_by_expert_and_none_is_lost(rows, experts):
    chosen = (
        torch.randint(0, experts, (rows, 2), generator=torch.Generator().manual_seed(rows)).int().to(DEVICE)
    )
    found = sorted_slots(chosen, experts)
    slots = found.slots.view(-1, found.rows).cpu()
    assert sorted(slots[slots >= 0].tolist()) == list(range(2 * rows))
    for expert, mine in zip(found.experts.tolist(), slots, strict=True):
        mine = mine[mine >= 0]
        assert (chosen.cpu().view(-1)[mine] == expert).all()
        assert (mine.diff() > 0).all()


@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (8, 2), (64, 4)])
def test_routes_are_the_best_experts_and_their_softmax(experts, top_k):
    router = torch.randn(experts, 96, generator=torch.Generator().manual_seed(experts)).to(DEVICE)
    router[2] = router[1]  # equal scores go to the lower expert
    normed, want = normed_rows(3, 96)
    chosen, shares = Matmul(torch.float32, DEVICE).route(normed, tile(router), top_k)
    ranked = torch.sort(want @ router.double().T, dim=1, descending=True, stable=True)
    assert torch.equal(chosen.long(), ranked.indices[:, :top_k])
    assert torch.allclose(shares.double(), torch.softmax(ranked.values[:, :top_k], 1), rtol=1e-5)


def test_panels_of_the_packed_cache_give_the_products_of_their_values():
    ops = CpuOps(1)
    values = np.random.default_rng(0).standard_normal((50, 96)).astype(np.float32)
    memory = arena(packed_size("n4", 50, 96))
    assert ops.pack_floats("n4", values, memory)
    weight = unpack_panels("n4", 50, 96, torch.from_numpy(memory).to(DEVICE))
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    unpacked = torch.from_numpy(ops.unpack(ops.packed("n4", 50, 96, memory)))
    assert error(product(torch.float32, x, tile(weight)), x, unpacked) < 1e-6


@pytest.mark.parametrize("packed_format", [*FOUR_BITS, "q8", "q6k", "q2k", "f32"])
def test_rows_of_a_table_are_its_values_and_bring_their_squares(packed_format):
    grouped = None if packed_format == "f32" else random_grouped(packed_format, 70, 288)
    plain = torch.randn(70, 288, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    values = plain if grouped is None else grouped.values(torch.float32)
    table = tile(values if grouped is None else grouped)
    ids = torch.tensor([69, 0, 64, 3], dtype=torch.int32, device=DEVICE)
    rows, squares = embed(table, ids, Matmul(torch.float32, DEVICE).levels)
    assert torch.equal(rows, values[ids.long()])
    assert torch.equal(squares, add_rows(rows.clone(), None))


@pytest.mark.parametrize("shared", [64 << 10, 99 << 10, 163 << 10, 227 << 10])
def test_every_card_gets_a_launch_for_every_number_of_rows(shared):
    card = Card(84, shared)
    for bits in (0, 4, 8):
        rows = [shape_of(slots, bits, card).rows for slots in (1, 2, 8, 9, 64, 65, 300, 5000)]
        assert rows == sorted(rows)
        assert rows[-1] == (32 if shared < 99 << 10 or (bits == 4 and shared < 160 << 10) else 128)
    weight = tile(random_grouped("z4", 70, 256))
    for slots in (1, 17, 600):
        pair = launch_of(slots, weight, card, is_wide=False, is_pair=True)
        assert not pair.two_blocks


def test_a_large_card_reads_weights_half_as_often_where_many_rows_keep_it_busy():
    weight = tile(torch.zeros(64 * 40, 64).half().to(DEVICE))
    rows = [
        launch_of(slots, weight, card, is_wide=False, is_pair=False).rows
        for card in (Card(8), Card(8, 99 << 10), Card(132))
        for slots in (256, 512)
    ]
    assert rows == [64, 256, 64, 128, 64, 128]
