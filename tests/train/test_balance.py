"""The load-balancing loss: its value, its gradient, and that it balances."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from bise.config import ModelConfig  # noqa: E402
from bise.kernels.torch import TorchOps  # noqa: E402
from bise.model.batch import training_batch  # noqa: E402
from bise.model.transformer import Transformer, weight_shapes  # noqa: E402
from bise.train.balance import RoutingOps, balance_loss, expert_shares  # noqa: E402

CONFIG = ModelConfig(
    family="mixtral", dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24,
    vocab_size=40, max_context=64, windows=(4, 4), num_experts=4, experts_per_token=2, tied_embeddings=True,
)  # fmt: skip


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def losses(dtype: torch.dtype, rows: int = 3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the balancing loss of a whole network, and its weights."""
    weights = {
        name: (drawn(*shape, seed=number) * 0.3).to(dtype).requires_grad_()
        for number, (name, shape) in enumerate(weight_shapes(CONFIG).items())
    }
    ops = RoutingOps(dtype)
    ids = (drawn(rows, 9, seed=99).abs() * 13).long().numpy().astype("int32") % 40
    Transformer(CONFIG, weights, ops).forward(training_batch(ids, 1))
    return balance_loss(ops.take_scores(), 2), weights


def test_it_is_one_when_all_are_used_alike_and_more_when_a_few_are() -> None:
    even = torch.eye(8, dtype=torch.float64).repeat(4, 1) * 1e-9
    assert float(balance_loss([even], 1)) == pytest.approx(1)
    few = torch.tensor([[9.0, 9.0, *[-9.0] * 6]] * 10)
    assert float(balance_loss([few], 2)) == pytest.approx(4, rel=1e-6)
    assert float(balance_loss([even, even * 0 + few[0].double()], 2)) > 2


def test_it_is_that_of_transformers() -> None:
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    for seed, experts, top_k in ((1, 8, 2), (2, 4, 1), (3, 5, 3)):
        scores = drawn(50, experts, seed=seed).float()
        # Theirs sums over the choices of a token where ours takes their share.
        theirs = float(mixtral.load_balancing_loss_func((scores,), experts, top_k)) / top_k
        assert float(balance_loss([scores], top_k)) == pytest.approx(theirs, rel=1e-5)


def test_its_gradient_is_the_slope() -> None:
    scores = (drawn(6, 5) * 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: balance_loss([values, values * 0.5], 2), (scores,))


def test_in_float32_a_networks_gradient_of_it_is_that_of_float64() -> None:
    gradients: dict[torch.dtype, dict[str, torch.Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        loss, weights = losses(dtype)
        loss.backward()
        gradients[dtype] = {name: w.grad for name, w in weights.items() if w.grad is not None}
    assert {"layers.0.router", "layers.1.router", "layers.0.experts.3.w2"} <= set(gradients[torch.float64])
    for name, exact in gradients[torch.float64].items():
        off = (gradients[torch.float32][name].double() - exact).abs().max()
        assert off <= 1e-4 * exact.abs().max() + 1e-8, name


def test_a_network_computes_the_same_with_its_scores_remembered() -> None:
    weights = {name: drawn(*shape) * 0.3 for name, shape in weight_shapes(CONFIG).items()}
    batch = training_batch(drawn(2, 9).abs().long().numpy().astype("int32"), 1)
    ops = RoutingOps(torch.float64)
    plain = Transformer(CONFIG, weights, TorchOps(torch.float64)).forward(batch)
    assert torch.allclose(Transformer(CONFIG, weights, ops).forward(batch), plain, atol=1e-12)
    assert [tuple(scores.shape) for scores in ops.take_scores()] == [(18, 4)] * 2
    assert ops.take_scores() == []


def test_it_wakes_experts_that_nobody_chose() -> None:
    torch.manual_seed(0)
    x = drawn(400, 16)
    router = torch.zeros(8, 16, dtype=torch.float64)
    router[:2] = x.mean(0) * 3 + 0.3 * drawn(2, 16, seed=5)  # two take nearly everything
    x, router = x + 0.5 * router[:2].mean(0), router.requires_grad_()
    before = expert_shares((x @ router.T).detach(), 2)
    optimizer = torch.optim.Adam([router], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        balance_loss([x @ router.T], 2).backward()
        optimizer.step()
    after = expert_shares((x @ router.T).detach(), 2)
    assert float(before.max()) > 0.25
    assert float(after.min()) > 0.08
    assert float(after.max()) < 0.18
