"""The network of `bise.model.transformer` made ready for training: first weights, and the loss of rows.

Owns float32 master weights and the bf16 pass over them. The network and its operations are bise's own.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bise.config import ModelConfig
from bise.model.batch import Batch, training_batch
from bise.model.transformer import Transformer, weight_shapes
from bise.train.balance import RoutingOps, balance_loss

Weights = dict[str, Tensor]


def initial_weights(config: ModelConfig, seed: int) -> Weights:
    """Return float32 weights: norms 1, matrices normal (std 0.02), the outputs of a block scaled down."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in weight_shapes(config).items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        std = 0.02 / math.sqrt(2 * config.num_layers) if name.endswith((".wo", ".w2")) else 0.02
        weights[name] = torch.randn(shape, generator=generator) * std
    return weights


class Network:
    """A loss over rows of one shape."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        rows: int,
        row_tokens: int,
        *,
        balance: float = 0.0,
    ) -> None:
        """Compute in bf16 over the float32 `weights`, which stay the caller's. `balance` is what the
        load-balancing loss of a model with experts counts.
        """
        self.ops = RoutingOps(torch.bfloat16)
        self.ops.fix_rows(config, rows, row_tokens)
        self._model = Transformer(config, weights, self.ops)
        self._batch = training_batch(np.zeros((rows, row_tokens), np.int32), len(config.window_groups))
        self.rows = rows
        self._top_k, self._balance = config.experts_per_token, balance

    def token_losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of every target in nats; ids and targets [T] int64."""
        batch = Batch(
            token_ids=ids,  # type: ignore[arg-type]  # TorchOps takes a tensor as well; torch.compile needs one
            positions=self._batch.positions,
            attention=self._batch.attention,
            logit_rows=self._batch.logit_rows,
        )
        logits = self._model.logits(self._model.forward(batch))
        return functional.cross_entropy(logits, targets, reduction="none")

    def loss(self, ids: Tensor, targets: Tensor, share: Tensor) -> Tensor:
        """Return the sum of share * loss in nats, and the balancing loss; share [T] float32."""
        loss = (self.token_losses(ids, targets) * share).sum()
        scores = self.ops.take_scores()
        return loss + self._balance * balance_loss(scores, self._top_k) if self._balance else loss
