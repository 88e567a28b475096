"""What a kernel that comes later computes on its way: norms of rows, and products that join the residual
stream.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bise.kernels.triton import fused
from bise.kernels.triton.matmul import Chosen, Matmul, Normed
from bise.kernels.triton.tiles import Tiles


class Rows:
    """Normed rows [T, E] that the product which needs them norms itself; `tensor` computes them once."""

    def __init__(self, normed: Normed, dtype: torch.dtype) -> None:
        self.normed = normed
        self._dtype = dtype
        self._tensor: Tensor | None = None

    def tensor(self) -> Tensor:
        """Return the rows in the compute type; only before the residual stream changes."""
        if self._tensor is None:
            self._tensor = fused.norm(self.normed, self._dtype)
        return self._tensor

    @property
    def shape(self) -> torch.Size:
        """[T, E]."""
        return self.normed.values.shape

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.normed.values.device

    def float(self) -> Tensor:
        """Return the rows in float32."""
        return self.tensor().float()

    def __len__(self) -> int:
        return len(self.normed.values)

    def __getitem__(self, index: Any) -> Tensor:
        values, squares = self.normed.values[index], self.normed.squares[index]
        normed = replace(self.normed, values=values.contiguous(), squares=squares.contiguous())
        return fused.norm(normed, self._dtype)


class Product:
    """Rows x [T, K] times a matrix, or slots times the matrices of their experts: added to the residual
    stream by the kernel that multiplies, or computed by `tensor` for whoever wants it alone.
    """

    def __init__(
        self,
        matmul: Matmul,
        x: Tensor,
        weight: Tiles,
        chosen: Chosen | None = None,
        shares: Tensor | None = None,
    ) -> None:
        self._matmul = matmul
        self._x = x
        self._weight = weight
        self._chosen = chosen
        self._shares = shares
        self._tensor: Tensor | None = None

    def add_to(self, residual: Tensor) -> Tensor:
        """Add the rows to `residual` [T, N] in place; return the sums of its squares per 64 columns."""
        if self._tensor is not None:
            return fused.add_rows(residual, self._tensor)
        if self._chosen is None or self._shares is None:
            return self._matmul.add(self._x, self._weight, residual)
        if self._chosen.slots is None:
            return self._matmul.mix(self._x, self._weight, self._chosen, self._shares, residual)
        return fused.add_rows(residual, self.tensor())

    def tensor(self) -> Tensor:
        """Return the rows [T, N] in float32."""
        if self._tensor is None:
            width = self._weight.shape[0]
            if self._chosen is None or self._shares is None:
                self._tensor = self._matmul(self._x, self._weight)[:, :width]
            else:
                parts = self._matmul.slots(self._x, self._weight, self._chosen)[:, :width]
                self._tensor = fused.mix(parts, self._shares)
        return self._tensor

    def __len__(self) -> int:
        return len(self._x) if self._shares is None else len(self._shares)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __setitem__(self, index: Any, values: Tensor | Product) -> None:
        self.tensor()[index] = dense(values)


def dense(x: Tensor | Rows | Product) -> Tensor:
    """Return what waits as a tensor, and a tensor as it is."""
    return x if isinstance(x, Tensor) else x.tensor()
