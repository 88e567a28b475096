"""Two backends as one: the first layers of a network on the processor, the others on a device.

An op runs where its weights and pages lie, so whoever calls it sees no border. What crosses it are the rows
of the residual stream, once a step: where the next norm lies on the device, they are carried there first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bise.kernels import Array, AttentionMeta, Experts, Lora, Pages, Rope, Weight
from bise.kernels.counts import ExpertCounts
from bise.kernels.cpu import CpuOps, CpuPages, Floats, Packed
from bise.kernels.experts import Held, PlacedExperts, run_experts
from bise.kernels.torch import TorchOps

if TYPE_CHECKING:
    from bise.kernels.triton.ops import TritonOps


class SplitRope(NamedTuple):
    """Tables of one step for both places."""

    host: Rope
    device: Rope


class SplitOps:
    """Ops on the processor and on one device; see `bise.kernels.Ops` for the contracts."""

    name = "split"

    def __init__(self, host: CpuOps, device: TorchOps, host_layers: int) -> None:
        """Compute the first `host_layers` layers on `host`, the others and the head on `device`."""
        self.host = host
        self.device = device
        self._host_layers = host_layers
        self.banks: list[PlacedExperts] = []
        """Of the layers whose experts lie in several places, in their order."""

    def layer(self, index: int) -> CpuOps | SplitOps:
        """See `Ops.layer`: the processor's or, where weights may be in both places, itself."""
        return self.host if index < self._host_layers else self

    @property
    def expert_counts(self) -> ExpertCounts | None:
        """What became of the experts that were wanted so far; None where every layer has its own together."""
        return ExpertCounts.total(bank.counts for bank in self.banks) if self.banks else None

    def carry(self, x: Array) -> Tensor:
        """Return rows of the residual stream on the device."""
        if isinstance(x, np.ndarray):
            return torch.from_numpy(x).to(self.device.device, self.device.residual)  # pyright: ignore[reportUnknownMemberType]
        return x

    def _at(self, thing: Any) -> Any:
        """Return the backend on which an array, a weight or pages lie."""
        is_host = isinstance(thing, (np.ndarray, Packed, CpuPages))
        return self.host if is_host else self.device

    def weight(self, array: Array) -> Weight:
        """See `Ops.weight`; on the device. `layer(index).weight` puts it where that layer is."""
        return self.device.weight(array)

    def vector(self, array: Array) -> Array:
        """See `Ops.vector`; on the device, as `weight`."""
        return self.device.vector(array)

    def pages(self, num_blocks: int, num_kv_heads: int, head_dim: int, kv_format: str) -> Pages:
        """See `Ops.pages`; on the device, as `weight`."""
        return self.device.pages(num_blocks, num_kv_heads, head_dim, kv_format)

    def read_block(self, pages: Pages, block: int) -> Sequence[npt.NDArray[np.uint8]]:
        """See `Ops.read_block`."""
        return self._at(pages).read_block(pages, block)

    def write_block(self, pages: Pages, block: int, content: npt.NDArray[np.uint8]) -> None:
        """See `Ops.write_block`."""
        self._at(pages).write_block(pages, block, content)

    def rope(
        self, inv_freq: npt.NDArray[np.float64], positions: npt.NDArray[np.int32], factor: float
    ) -> SplitRope:
        """See `Ops.rope`."""
        return SplitRope(
            self.host.rope(inv_freq, positions, factor) if self._host_layers else None,
            self.device.rope(inv_freq, positions, factor),
        )

    def embed(self, table: Weight, token_ids: npt.NDArray[np.int32]) -> Array:
        """See `Ops.embed`."""
        return self._at(table).embed(table, token_ids)

    def norm(self, x: Array, weight: Array, eps: float) -> Array:
        """See `Ops.norm`."""
        at = self._at(weight)
        return at.norm(self.carry(x) if at is self.device else x, weight, eps)

    def add_norm(self, x: Array, y: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        """See `Ops.add_norm`."""
        at = self._at(weight)
        if at is self.host or isinstance(x, Tensor):
            return at.add_norm(x, y, weight, eps)
        total = self.carry(x + y)  # the last layer of the host ends, the first one of the device begins
        return total, self.device.norm(total, weight, eps)

    def together(self, weights: Sequence[Weight]) -> Sequence[Weight]:
        """See `Ops.together`."""
        return self._at(weights[0]).together(weights)

    def linear(self, x: Array, weights: Sequence[Weight]) -> list[Array]:
        """See `Ops.linear`."""
        return self._at(weights[0]).linear(x, weights)

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        rope: SplitRope,
        meta: AttentionMeta,
        pages: Pages | None,
        head_dim: int,
        window: int | None,
    ) -> Array:
        """See `Ops.attend`."""
        at = self._at(q)
        table = rope.host if at is self.host else rope.device
        return at.attend(q, k, v, table, meta, pages, head_dim, window)

    def experts(self, experts: Sequence[tuple[Weight, Weight, Weight]]) -> Experts:
        """See `Ops.experts`; of a layer on the device, whose experts may be in RAM, some or all."""
        if not any(isinstance(gate, (Packed, Held)) for gate, _, _ in experts):
            return self.device.experts(experts)
        bank = PlacedExperts(self.host, self.device, experts)
        if self.banks:
            self.banks[-1].follower = bank
        self.banks.append(bank)
        return bank

    def mlp(self, x: Array, bank: Experts) -> Array:
        """See `Ops.mlp`."""
        return self._at(x).mlp(x, bank)

    def moe(self, x: Array, router: Weight, bank: Experts, top_k: int) -> Array:
        """See `Ops.moe`."""
        if isinstance(bank, PlacedExperts):
            return run_experts(x, router, bank, top_k)
        return self._at(x).moe(x, router, bank, top_k)

    def lora(self, a: Array, b: Array, scale: float) -> Lora:
        """See `Ops.lora`; on the device, as `weight`."""
        return self.device.lora(a, b, scale)

    def add_lora(self, y: Array, x: Array, lora: Lora, rows: npt.NDArray[np.intp]) -> Array:
        """See `Ops.add_lora`."""
        return self._at(y).add_lora(y, x, lora, rows)

    def gated(self, gate: Array, up: Array) -> Array:
        """See `Ops.gated`."""
        return self._at(gate).gated(gate, up)

    def logits(self, x: Array, head: Weight) -> Floats | Array:
        """See `Ops.logits`."""
        at = self._at(head)
        return at.logits(self.carry(x) if at is self.device else x, head)


class ChoosingSplitOps(SplitOps):
    """As `SplitOps`, on a device that chooses tokens itself; logits always lie there."""

    takes_masks = True

    def __init__(self, host: CpuOps, device: TritonOps, host_layers: int) -> None:
        """See `SplitOps`."""
        super().__init__(host, device, host_layers)
        self._chooser = device

    def sample(
        self, logits: Tensor, parameters: npt.NDArray[np.float64], mask: npt.NDArray[np.uint32] | None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """See `engine.candidates.Chooses`."""
        return self._chooser.sample(logits, parameters, mask)
