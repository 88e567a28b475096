"""Ops of one GPU: `TorchOps` with the hot ones as Triton kernels.

The residual stream and every product are float32, what goes into a product has the compute type; K and V
lie in pages as on the other backends. Steps are laid out by the same scheduler from the same numpy
metadata, which is copied to the device once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bise.errors import ConfigError
from bise.kernels import AttentionMeta
from bise.kernels.grouped import FLOATS, unpack_floats, unpack_panels
from bise.kernels.torch import TorchOps, TorchPages
from bise.kernels.triton import attention, fused
from bise.kernels.triton.matmul import FEW_ROWS, Matmul
from bise.kernels.triton.tiles import Tiles, stacked, tile

KV_FORMATS = ("f32", "f16", "bf16")
"""What pages on a GPU hold so far."""

_SORTED_ROWS = 64
"""Slots of one program when rows are sorted by expert."""


@dataclass(frozen=True, slots=True)
class TiledExperts:
    """Feed-forward weights of all experts of a layer, or of its only one."""

    gate: Tiles
    up: Tiles
    down: Tiles


class TritonOps(TorchOps):
    """Ops on one GPU; see `bise.kernels.Ops` for the contracts."""

    name = "triton"

    def __init__(self, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> None:
        """Compute products in `dtype` (float16, bfloat16 or float32) on `device`."""
        super().__init__(dtype, device)
        self._matmul = Matmul(dtype, self.device)
        self._step: dict[int, tuple[AttentionMeta, tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    @property
    def residual(self) -> torch.dtype:
        """See `TorchOps.residual`."""
        return torch.float32

    # Weights

    def weight(self, array: npt.NDArray[np.generic] | Tensor) -> Tiles:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.weight`."""
        return tile(super().weight(array))

    def vector(self, array: npt.NDArray[np.generic] | Tensor) -> Tensor:
        """See `Ops.vector`; float32, as the norms are."""
        return torch.as_tensor(array, device=self.device).float()

    def packed(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, packed_format: str, num_rows: int, num_columns: int, memory: npt.NDArray[np.uint8]
    ) -> Tiles:
        """Return the matrix whose panels lie in `memory`, which is free afterwards; the values are the same.

        A float32 matrix stays float32: the router, and models loaded with `--quant none`.
        """
        panels = torch.as_tensor(memory).to(self.device)
        if packed_format in FLOATS:
            matrix = unpack_floats(packed_format, num_rows, num_columns, panels)
            return tile(matrix if packed_format == "f32" else matrix.to(self.dtype))
        return tile(unpack_panels(packed_format, num_rows, num_columns, panels))

    def pages(self, num_blocks: int, num_kv_heads: int, head_dim: int, kv_format: str) -> TorchPages:
        """See `Ops.pages`."""
        if kv_format not in KV_FORMATS:
            raise ConfigError(
                f"kv must be one of {', '.join(KV_FORMATS)} on a GPU, got '{kv_format}'", field="kv"
            )
        return super().pages(num_blocks, num_kv_heads, head_dim, kv_format)

    def experts(self, experts: Sequence[tuple[Tiles, Tiles, Tiles]]) -> TiledExperts:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.experts`."""
        gate, up, down = (stacked(matrices) for matrices in zip(*experts, strict=True))
        return TiledExperts(gate, up, down)

    # Ops

    def rope(
        self, inv_freq: npt.NDArray[np.float64], positions: npt.NDArray[np.int32], factor: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.rope`; begins a step."""
        self._step.clear()
        cos, sin = super().rope(inv_freq, positions, factor)
        return cos.float().contiguous(), sin.float().contiguous()

    def embed(self, table: Tiles, token_ids: npt.NDArray[np.int32]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.embed`."""
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device=self.device)
        return table.row_values(ids, torch.float32)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.norm`."""
        return fused.norm(x, None, weight, eps, self.dtype)

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops.add_norm`; the sum takes the place of x."""
        return x, fused.norm(x, y, weight, eps, self.dtype)

    def linear(self, x: Tensor, weights: Sequence[Tiles]) -> list[Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.linear`; float32."""
        return [self._matmul(x, weight, len(x)) for weight in weights]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor],
        meta: AttentionMeta,
        pages: TorchPages | None,
        head_dim: int,
        window: int | None,
    ) -> Tensor:
        """See `Ops.attend`. Needs pages: this backend does not train."""
        assert pages is not None
        assert pages.k.shape[2] == head_dim
        q_start, q_pos, table, slots = self._tensors(meta)
        both = (pages.k, pages.v)
        turned = attention.rotate_and_store(q, k, v, rope, slots, both, self.dtype)
        return attention.attend(turned, both, meta, (q_start, q_pos, table), window)

    def mlp(self, x: Tensor, bank: TiledExperts) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.mlp`."""
        left, right = self._matmul(x, bank.gate, len(x)), self._matmul(x, bank.up, len(x))
        return self._matmul(fused.gate(left, right, self.dtype), bank.down, len(x))

    def route(self, x: Tensor, router: Tiles, top_k: int) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `TorchOps.route`; shares are float32."""
        ranked = torch.sort(self._matmul(x, router, len(x)), dim=-1, descending=True, stable=True)
        return ranked.indices[:, :top_k], torch.softmax(ranked.values[:, :top_k], -1)

    def mix(self, parts: Tensor, share: Tensor) -> Tensor:
        """See `TorchOps.mix`."""
        return fused.mix(parts.flatten(0, 1), share)

    def moe(self, x: Tensor, router: Tiles, bank: TiledExperts, top_k: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.moe`. Few rows are not sorted: every (row, rank) is a program of its own."""
        ranked, shares = self.route(x, router, top_k)
        chosen = ranked.flatten()
        num_slots = len(x) * top_k
        if num_slots <= FEW_ROWS:
            rows = FEW_ROWS
            experts = chosen.int()
            slots = torch.full((num_slots, rows), -1, dtype=torch.int32, device=self.device)
            slots[:, 0] = torch.arange(num_slots, dtype=torch.int32, device=self.device)
        else:
            rows = _SORTED_ROWS
            slots, experts = _sorted_slots(chosen, bank.gate.count, rows)

        def product(rows_of: Tensor, matrices: Tiles, slots_per_row: int = 1) -> Tensor:
            return self._matmul(
                rows_of,
                matrices,
                num_slots,
                slots_per_row=slots_per_row,
                slots=slots.flatten(),
                experts=experts,
                rows=rows,
            )

        hidden = fused.gate(product(x, bank.gate, top_k), product(x, bank.up, top_k), self.dtype)
        parts = product(hidden, bank.down)
        return fused.mix(parts, shares)

    def logits(self, x: Tensor, head: Tiles) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.logits`."""
        return self._matmul(x, head, len(x))

    def _tensors(self, meta: AttentionMeta) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q_start, q_pos, block_table and slots on the device, copied once a step."""
        found = self._step.get(id(meta))
        if found is None:
            arrays = (meta.q_start, meta.q_pos, meta.block_table, meta.slots)
            q_start, q_pos, table, slots = (torch.as_tensor(each, device=self.device) for each in arrays)
            found = self._step[id(meta)] = (meta, (q_start, q_pos, table, slots))
        return found[1]


def _sorted_slots(chosen: Tensor, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Return slots [P, rows] (-1: none) and experts [P] so that every program has one expert.

    `chosen` [S] is the expert of each slot. P is the most that any choice can need: nothing is read back.
    """
    num_slots = len(chosen)
    programs = min(num_slots, -(-num_slots // rows) + num_experts)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    counts.scatter_add_(0, chosen, torch.ones_like(chosen))
    needed = (counts + rows - 1) // rows
    ends = needed.cumsum(0)
    order = torch.argsort(chosen, stable=True)
    owner = chosen[order]
    inside = torch.arange(num_slots, device=chosen.device) - (counts.cumsum(0) - counts)[owner]
    slots = torch.full((programs * rows,), -1, dtype=torch.int32, device=chosen.device)
    slots[(ends - needed)[owner] * rows + inside] = order.int()
    experts = torch.searchsorted(ends, torch.arange(programs, device=chosen.device), right=True)
    return slots.view(programs, rows), experts.clamp(max=num_experts - 1).int()
