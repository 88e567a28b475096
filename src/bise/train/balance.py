"""Balanced routing: what experts are chosen, and the loss that keeps them all in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bise.kernels.torch import Bank, TorchWeight
from bise.train.rows import RowOps

BALANCE = 0.01
"""What the balancing loss counts beside the loss of the next token, as in Switch Transformers."""


def expert_shares(scores: Tensor, top_k: int) -> Tensor:
    """Return the share [X] of all choices that falls on each expert, for router scores [T, X]; sums to 1."""
    chosen = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :top_k]
    counts = torch.bincount(chosen.flatten(), minlength=scores.shape[1])
    return counts.to(scores.dtype) / chosen.numel()


def balance_loss(layers: Sequence[Tensor], top_k: int) -> Tensor:
    """Return the load-balancing loss of router scores, a tensor [T, X] a layer, averaged over the layers.

    Of a layer it is X * sum_e f_e P_e (Switch Transformers, arXiv 2101.03961; top_k choices a token as in
    Mixtral): f_e the share of choices that falls on expert e, which has no gradient, P_e its mean router
    probability. 1 when all experts are used alike, at most X / top_k when always the same ones are.
    """
    losses: list[Tensor] = []
    for scores in layers:
        wide = scores if scores.dtype == torch.float64 else scores.float()
        shares = expert_shares(wide.detach(), top_k)
        losses.append(wide.shape[1] * (shares * wide.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


class RoutingOps(RowOps):
    """RowOps that remember the router scores of a pass."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """See `RowOps`."""
        super().__init__(dtype, device)
        self._scores: list[Tensor] = []

    def moe(self, x: Tensor, router: TorchWeight, bank: Bank, top_k: int) -> Tensor:
        """See `Ops.moe`."""
        self._scores.append(self.linear(x, (router,))[0])
        return super().moe(x, router, bank, top_k)

    def take_scores(self) -> list[Tensor]:
        """Return the scores [T, X] of each layer since the last call, differentiable, and forget them."""
        scores, self._scores = self._scores, []
        return scores
