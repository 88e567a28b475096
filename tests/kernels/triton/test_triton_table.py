"""Op x backend x dtype x size: the largest error against the float64 oracle, as a table (`pytest -s` prints
it).

Small sizes in the interpreter; on a GPU (`make test-gpu`) also those of a Mistral layer.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from bise.kernels import BLOCK_SIZE, AttentionMeta  # noqa: E402
from bise.kernels.torch import TorchOps  # noqa: E402
from bise.kernels.triton.lazy import dense  # noqa: E402
from bise.kernels.triton.ops import TritonOps  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
BOUNDS = {"f32": 2e-5, "f16": 4e-3, "bf16": 3e-2}
"""Largest error over the largest value."""
SIZES = {"small": (2, 96, 160)} | ({"mistral": (5, 4096, 14336)} if ON_GPU else {})
"""Rows, width, hidden width."""
ORACLE = TorchOps(torch.float64)
LINES: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n" + "\n".join(["op         backend dtype size     largest error", *LINES]))


def draw(*shape, seed=0):
    values = np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)
    return values / shape[-1] ** 0.5 if len(shape) == 2 and seed else values


def rows(ops, values):
    return torch.as_tensor(values, device=ops.device).to(ops.dtype)


def norm(ops, count, width, _):
    x = torch.as_tensor(draw(count, width), device=ops.device).to(ops.residual)
    return ops.norm(x, ops.vector(draw(width, seed=1)), 1e-5)


def add_norm(ops, count, width, _):
    x, y = (torch.as_tensor(draw(count, width, seed=s), device=ops.device).to(ops.residual) for s in (0, 2))
    return ops.add_norm(x, y, ops.vector(draw(width, seed=1)), 1e-5)[1]


def linear(ops, count, width, hidden):
    return ops.linear(rows(ops, draw(count, width)), [ops.weight(draw(hidden, width, seed=3))])[0]


def mlp(ops, count, width, hidden):
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    bank = ops.experts([tuple(ops.weight(draw(*shape, seed=4 + i)) for i, shape in enumerate(shapes))])
    return ops.mlp(rows(ops, draw(count, width)), bank)


def moe(ops, count, width, hidden):
    hidden //= 4
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    bank = ops.experts(
        [
            tuple(ops.weight(draw(*shape, seed=9 * e + i + 1)) for i, shape in enumerate(shapes))
            for e in range(4)
        ]
    )
    # A clear choice: what is compared is arithmetic, not which of two equal experts is better.
    router = np.zeros((4, width), np.float32)
    router[np.arange(4), np.arange(4)] = (9, 6, 3, 1)
    x = draw(count, width)
    x[:, :4] = (1, 2, 0.1, 0.2)
    return ops.moe(rows(ops, x), ops.weight(router), bank, 2)


def attend(ops, count, width, _, window=None):
    """Decode a row at position 33, whose keys were stored before."""
    count = 1
    heads, head_dim = (8, width // 8 // 4 * 4) if width < 4096 else (32, 128)
    kv_heads, past = heads // 4, 33
    pages = ops.pages(2 * count, kv_heads, head_dim, "f32")
    table = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    out = None
    for first, length in ((0, past), (past, 1)):
        at = np.tile(np.arange(first, first + length, dtype=np.int32), count)
        owner = np.repeat(np.arange(count), length)
        meta = AttentionMeta(
            np.arange(0, count * length + 1, length, dtype=np.int32),
            np.full(count, first, np.int32),
            table,
            table[owner, at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE,
        )
        angles = ops.rope(10000.0 ** -(np.arange(0, head_dim, 2) / head_dim), at, 1.0)
        parts = (
            torch.as_tensor(draw(len(at), size * head_dim, seed=first), device=ops.device).to(ops.residual)
            for size in (heads, kv_heads, kv_heads)
        )
        out = ops.attend(*parts, angles, meta, pages, head_dim, window)
    return out


def attend_window(ops, count, width, hidden):
    return attend(ops, count, width, hidden, window=9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "op", [norm, add_norm, linear, mlp, moe, attend, attend_window], ids=lambda op: op.__name__
)
def test_an_op_is_as_near_to_the_oracle_as_its_type_allows(op, backend, dtype, size, request):
    if backend == "triton" and not ON_GPU and dtype == "bf16":
        request.getfixturevalue("bf16")
    ops = (TritonOps if backend == "triton" else TorchOps)(DTYPES[dtype], DEVICE)
    got = dense(op(ops, *SIZES[size])).double().cpu()
    want = op(ORACLE, *SIZES[size])
    error = float((got - want).abs().max() / want.abs().max())
    LINES.append(f"{op.__name__:<10.10} {backend:<7} {dtype:<5} {size:<8} {error:.1e}")
    assert error < BOUNDS[dtype]
