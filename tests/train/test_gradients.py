"""The backward of whole losses, in float64 against finite differences: nothing on the way may be cut off."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bise.config import ModelConfig
from bise.model.transformer import weight_shapes
from bise.text.turns import LearnedText
from bise.train.network import Network, torch_ops
from bise.train.objective import Preference
from bise.train.quantised import FrozenMatrix

SHAPES = {
    "tied embeddings": {},
    "embeddings and output apart": {"tied_embeddings": False},
    "a window in one layer": {"windows": (3, None)},
    "experts": {"num_experts": 3, "experts_per_token": 2},
}


def config_of(**changes) -> ModelConfig:
    fields = {
        "family": "mistral", "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6,
        "hidden_dim": 64, "vocab_size": 19, "max_context": 32, "windows": (None, None),
        "tied_embeddings": True,
    }  # fmt: skip
    return ModelConfig(**fields | changes)


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * (0.5 if len(shape) > 1 else 1)
        for name, shape in weight_shapes(config).items()
    }


def texts() -> list[LearnedText]:
    rng = np.random.default_rng(2)
    return [
        LearnedText(tuple(map(int, rng.integers(0, 19, length))), (False, False, *(True,) * (length - 2)))
        for length in (7, 4, 9)
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_every_weight_of_a_model_gets_the_gradient_of_finite_differences(name):
    config = config_of(**SHAPES[name])
    weights = weights_of(config)

    def losses(*values):
        network = Network(config, dict(zip(weights, values, strict=True)), torch_ops("f64", "cpu"))
        return network.token_losses(texts())

    values = [weight.requires_grad_() for weight in weights.values()]
    assert torch.autograd.gradcheck(losses, values, fast_mode=True, atol=1e-6)
    losses(*values).sum().backward()
    assert all(float(value.grad.abs().max()) > 0 for value in values)  # and none is cut off


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_half_of_an_adapter_does_also_over_a_base_in_few_bits(bits, recompute):
    config = config_of()
    base = {
        name: FrozenMatrix(weight.float().numpy(), bits, "cpu")
        if bits and weight.ndim == 2 and name != "tok_embeddings" and not weight.shape[1] % 32
        else weight
        for name, weight in weights_of(config).items()
    }
    generator = torch.Generator().manual_seed(3)
    names = [name for name in base if name.rpartition(".")[2] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")]
    halves = [
        (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3).requires_grad_()
        for name in names
        for shape in ((2, weight_shapes(config)[name][1]), (weight_shapes(config)[name][0], 2))
    ]
    network = Network(config, base, torch_ops("f64", "cpu"), recompute=recompute)

    def losses(*values):
        loras = {name: (values[2 * n], values[2 * n + 1], 0.7) for n, name in enumerate(names)}
        return network.token_losses(texts(), loras)

    assert torch.autograd.gradcheck(losses, halves, fast_mode=True, atol=1e-6)
    losses(*halves).sum().backward()
    assert all(float(half.grad.abs().max()) > 0 for half in halves)


def test_the_loss_of_preferences_does():
    config = config_of()
    weights = weights_of(config)
    generator = torch.Generator().manual_seed(4)
    a, b = (
        (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3).requires_grad_()
        for shape in ((2, config.q_dim), (config.dim, 2))
    )
    first, second, third = texts()
    held: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    objective = Preference(Network(config, weights, torch_ops("f64", "cpu")), lambda: held, beta=0.5)

    def losses(a, b):
        held["layers.1.wo"] = (a, b, 0.7)
        return objective.losses([(first, second), (third, first)])

    assert torch.autograd.gradcheck(losses, [a, b], atol=1e-6)


def test_a_loss_is_minus_the_log_of_the_learned_tokens_probability():
    config = config_of()
    network = Network(config, weights_of(config), torch_ops("f64", "cpu"))
    text = texts()[0]
    losses = network.token_losses([text]).tolist()
    # The last learned token alone, against each other token in its place: the probabilities must add up to 1.
    ids = text.ids
    others = [LearnedText((*ids[:-1], token), (*(False,) * (len(ids) - 1), True)) for token in range(19)]
    shares = [math.exp(-float(network.token_losses([other]))) for other in others]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    assert losses[-1] == pytest.approx(-math.log(shares[ids[-1]]), abs=1e-12)
    assert len(losses) == sum(text.learned)
