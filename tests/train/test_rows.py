"""The backend for training rows: the plain backend's values, less of them computed."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from bise.config import ModelConfig  # noqa: E402
from bise.kernels.torch import TorchOps  # noqa: E402
from bise.model.batch import training_batch  # noqa: E402
from bise.model.transformer import Transformer, weight_shapes  # noqa: E402
from bise.train.rows import RowOps  # noqa: E402


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("window", [1, 5, 64, 71, 149, 150, None])
def test_attention_in_chunks_equals_the_plain_one(window: int | None) -> None:
    q, k, v = (drawn(450, heads, 16, seed=heads) for heads in (4, 2, 2))
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    results: list[torch.Tensor] = []
    slopes: list[tuple[torch.Tensor, ...]] = []
    for ops in (RowOps(torch.float64), TorchOps(torch.float64)):
        mixed = ops._attend_rows(q, k, v, 3, window)
        results.append(mixed)
        slopes.append(torch.autograd.grad((mixed * drawn(450, 64)).sum(), (q, k, v)))
    assert torch.allclose(results[0], results[1], atol=1e-12)
    for ours, plain in zip(*slopes, strict=True):
        assert torch.allclose(ours, plain, atol=1e-12)


def test_rows_of_one_shape_get_the_rotations_of_their_positions() -> None:
    config = ModelConfig(
        family="mistral", dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24,
        vocab_size=40, max_context=64, windows=(4,), tied_embeddings=True,
    )  # fmt: skip
    weights = {name: drawn(*shape) for name, shape in weight_shapes(config).items()}
    batch = training_batch(np.arange(30, dtype=np.int32).reshape(3, 10), 1)
    ops = RowOps(torch.float64)
    free = Transformer(config, weights, ops).forward(batch)
    ops.fix_rows(config, 3, 10)
    assert torch.equal(Transformer(config, weights, ops).forward(batch), free)
