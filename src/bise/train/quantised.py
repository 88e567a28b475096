"""Frozen matrices kept in 8 or 4 bits (QLoRA): opened up for one product at a time, forwards and backwards.

Blocks of 32 values share a float16 step, and in 4 bits a float16 lowest value too (5 bits a weight in all).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from bise.errors import ConfigError
from bise.kernels.torch import TorchWeight
from bise.train.rows import RowOps

BLOCK = 32
BITS = {"q8": 8, "q4": 4}


class FrozenMatrix:
    """A matrix [N, K] in few bits."""

    def __init__(self, values: npt.NDArray[np.float32], bits: int, device: str) -> None:
        """Quantise `values`; ConfigError unless K is a multiple of 32."""
        rows, width = values.shape
        if width % BLOCK:
            raise ConfigError(
                f"--base: rows of {width} values are no multiple of {BLOCK}; use none", field="base"
            )
        blocks = torch.from_numpy(np.ascontiguousarray(values)).view(rows, -1, BLOCK)  # pyright: ignore[reportUnknownMemberType]
        if bits == 8:
            low = None
            step = (blocks.abs().amax(-1, keepdim=True) / 127).half()
            codes = _codes(blocks, step, -127, 127).to(torch.int8)
        else:
            low = blocks.amin(-1, keepdim=True).half()
            step = ((blocks.amax(-1, keepdim=True) - low.float()) / 15).half()
            codes = _codes(blocks - low.float(), step, 0, 15).to(torch.uint8)
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
            low = low.to(device)
        self._codes, self._step, self._low = codes.to(device), step.to(device), low
        self.shape = (rows, width)

    @property
    def size_bytes(self) -> int:
        """Bytes in memory."""
        parts = [self._codes, self._step, *([] if self._low is None else [self._low])]
        return sum(part.numel() * part.element_size() for part in parts)

    def to(self, dtype: torch.dtype) -> Tensor:
        """Return the values [N, K]."""
        step = self._step.to(dtype)
        if self._low is None:
            return (self._codes.to(dtype) * step).view(self.shape)
        pairs = torch.stack((self._codes & 15, self._codes >> 4), -1).flatten(-2)
        return (pairs.to(dtype) * step + self._low.to(dtype)).view(self.shape)


def _codes(values: Tensor, step: Tensor, low: int, high: int) -> Tensor:
    wide = step.float()
    return (values / torch.where(wide > 0, wide, 1)).round().clamp(low, high)


class _Product(torch.autograd.Function):
    """x W^T of a frozen W that is opened up again for the way back, so that no open copy is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: FrozenMatrix) -> Tensor:
        """Return x [.., K] times the matrix [N, K], transposed."""
        ctx.weight = weight
        return functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        return grads[0] @ cast(FrozenMatrix, ctx.weight).to(grads[0].dtype), None


class FrozenOps(RowOps):
    """The backend for training over matrices of which some are frozen in few bits."""

    def linear(self, x: Tensor, weights: Sequence[TorchWeight]) -> list[Tensor]:
        """See `Ops.linear`."""
        found: Sequence[TorchWeight | FrozenMatrix] = weights
        return [
            cast(Tensor, _Product.apply(x, weight))  # pyright: ignore[reportUnknownMemberType]
            if isinstance(weight, FrozenMatrix)
            else super(FrozenOps, self).linear(x, [weight])[0]
            for weight in found
        ]
