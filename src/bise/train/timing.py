"""How long training takes here: a step over the model's own shapes, timed with a layer or two of it.

Nothing of the model is read, so a large one costs no more than its largest layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bise.config import ModelConfig, default_threads
from bise.kernels.torch import TorchLora
from bise.model.transformer import weight_shapes
from bise.text.turns import LearnedText
from bise.train.network import Network, torch_ops
from bise.train.parameters import adaptable

_MAX_WORK = 3e10
"""Floating-point operations of a timed pass, about: longer steps are timed in part."""
_TRIES = 3
_RANK = 16


def step_seconds(config: ModelConfig, lengths: Sequence[int], learned: float, *, is_full: bool) -> float:
    """Return about how long a step over texts of such lengths takes, of whose tokens a share is `learned`."""
    torch.set_num_threads(default_threads())
    per_token = 6 * (config.num_params / config.num_layers + config.vocab_size * config.dim)
    timed: list[int] = []
    for length in lengths:
        if timed and per_token * (sum(timed) + length) > _MAX_WORK:
            break
        timed.append(length)
    timed[0] = min(timed[0], max(16, int(_MAX_WORK / per_token)))
    texts = [_text(length, learned, config.vocab_size) for length in timed]
    one, two = (_pass_seconds(config, layers, texts, is_full) for layers in (1, 2))
    whole = one + max(0.0, two - one) * (config.num_layers - 1)
    return whole * sum(lengths) / sum(timed)


def _text(length: int, learned: float, vocab_size: int) -> LearnedText:
    count = min(length - 1, max(1, round(learned * length)))
    ids = torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(length))
    return LearnedText(tuple(int(token) for token in ids), (False,) * (length - count) + (True,) * count)


def _pass_seconds(config: ModelConfig, layers: int, texts: Sequence[LearnedText], is_full: bool) -> float:
    """Return the time of the fastest of some passes there and back through the first layers."""
    shape = replace(config, num_layers=layers, windows=(*config.windows, *config.windows)[:layers])
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {
        name: (torch.randn(size, generator=generator) * 0.02).requires_grad_(is_full)
        for name, size in weight_shapes(shape).items()
    }
    loras: dict[str, TorchLora] = {}
    for name, size in () if is_full else weight_shapes(shape).items():
        if name.rpartition(".")[2] in adaptable(config):
            a, b = torch.randn(_RANK, size[1]), torch.zeros(size[0], _RANK)
            loras[name] = (a.requires_grad_(), b.requires_grad_(), 2.0)
    network = Network(shape, weights, torch_ops("f32", "cpu"))
    fastest = float("inf")
    for _ in range(_TRIES):
        started = time.perf_counter()
        network.token_losses(texts, loras).sum().backward()  # pyright: ignore[reportUnknownMemberType]
        fastest = min(fastest, time.perf_counter() - started)
    return fastest
