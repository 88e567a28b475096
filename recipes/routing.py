"""Which experts a model with experts chooses for which texts."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bise.config import ModelConfig
from bise.model.batch import training_batch
from bise.model.transformer import Transformer
from bise.train.balance import RoutingOps, expert_shares

ROWS_AT_ONCE = 8
Grid = list[list[float]]
"""Shares of all choices, [layers][experts]; every row sums to 1."""


def expert_use(
    config: ModelConfig, weights: Mapping[str, Tensor], texts: Mapping[str, npt.NDArray[np.integer]]
) -> dict[str, Grid]:
    """Return the share of choices that falls on each expert of each layer, for named rows of ids [R, L]."""
    ops = RoutingOps(torch.bfloat16)
    model = Transformer(config, weights, ops)
    found: dict[str, Grid] = {}
    for name, rows in texts.items():
        layers: list[list[Tensor]] = [[] for _ in range(config.num_layers)]
        for first in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[first : first + ROWS_AT_ONCE].astype(np.int32)
            with torch.no_grad():
                model.forward(training_batch(part, len(config.window_groups)))
            for layer, scores in zip(layers, ops.take_scores(), strict=True):
                layer.append(scores)
        found[name] = [
            [
                round(share, 4)
                for share in expert_shares(torch.cat(layer).float(), config.experts_per_token).tolist()
            ]
            for layer in layers
        ]
    return found
