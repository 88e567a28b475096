"""Ops of one GPU: `TorchOps` with the hot ones as Triton kernels, five launches for a decoded layer.

The residual stream and every product are float32, what goes into a product has the compute type; K and V
lie in pages as on the other backends. Steps are laid out by the same scheduler from the same numpy
metadata, which is copied to the device once a step; a captured step (`graphs.py`) brings it there itself.

A norm and the product of a layer's output are not computed when they are asked for, but by the kernel that
needs them: `Rows` and `Product` wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bise.errors import ConfigError
from bise.kernels import BLOCK_SIZE, AttentionMeta
from bise.kernels.grouped import FLOATS, unpack_floats, unpack_panels
from bise.kernels.torch import TorchOps
from bise.kernels.triton import compute_on, fused
from bise.kernels.triton.attention import Attention
from bise.kernels.triton.lazy import Product, Rows, dense
from bise.kernels.triton.matmul import MOST_EXPERTS, Chosen, Matmul, Normed
from bise.kernels.triton.paging import KV_FORMATS, Placed, TritonPages, place
from bise.kernels.triton.sampling import sample
from bise.kernels.triton.sorting import sorted_slots
from bise.kernels.triton.tiles import Tiles, chained, stacked, tile

_FUSED_ROWS = 16
"""Up to this many rows every program of a product norms its rows itself; more are normed once, by a kernel.
"""

TiledLora = tuple[Tiles, Tiles, float]


@dataclass(frozen=True, slots=True)
class TiledExperts:
    """Feed-forward weights of all experts of a layer, or of its only one."""

    gate: Tiles
    up: Tiles
    down: Tiles


class TritonOps(TorchOps):
    """Ops on one GPU; see `bise.kernels.Ops` for the contracts."""

    name = "triton"
    takes_masks = True

    def __init__(self, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> None:
        """Compute products in `dtype` (float16, bfloat16 or float32) on `device`."""
        super().__init__(dtype, device)
        self._matmul = Matmul(dtype, self.device)
        self._attention = Attention(dtype, self.device)
        self._step: dict[int, tuple[AttentionMeta, Placed]] = {}
        self._angles: dict[tuple[bytes, float], tuple[Tensor, Tensor]] = {}
        self._outgrown: list[tuple[Tensor, Tensor]] = []
        """Angles that longer ones took the place of: recorded steps look theirs up here."""
        self._stream: tuple[Tensor, Tensor] | None = None
        """The residual stream as it left the last kernel, and the sums of its squares."""

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
            return self.floats(packed_format, unpack_floats(packed_format, num_rows, num_columns, panels))
        return tile(unpack_panels(packed_format, num_rows, num_columns, panels))

    def floats(self, packed_format: str, matrix: Tensor) -> Tiles:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `TorchOps.floats`; float32 stays."""
        return tile(
            matrix.float() if packed_format == "f32" else matrix.to(FLOATS[packed_format]).to(self.dtype)
        )

    def together(self, weights: Sequence[Tiles]) -> list[Tiles]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.together`: neighbours of one format become one matrix, of which they are views then."""
        groups: list[list[Tiles]] = []
        for weight in weights:
            if groups and groups[-1][0].like(weight):
                groups[-1].append(weight)
            else:
                groups.append([weight])
        return [chained(group) for group in groups]

    def pages(self, num_blocks: int, num_kv_heads: int, head_dim: int, kv_format: str) -> TritonPages:
        """See `Ops.pages`."""
        if kv_format not in KV_FORMATS:
            raise ConfigError(
                f"kv must be one of {', '.join(KV_FORMATS)} on a GPU, got '{kv_format}'", field="kv"
            )
        return TritonPages(num_blocks * BLOCK_SIZE, num_kv_heads, head_dim, kv_format, self.device)

    def experts(self, experts: Sequence[tuple[Tiles, Tiles, Tiles]]) -> TiledExperts:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.experts`."""
        gate, up, down = (stacked(matrices) for matrices in zip(*experts, strict=True))
        return TiledExperts(gate, up, down)

    # Ops

    def rope(
        self, inv_freq: npt.NDArray[np.float64], positions: npt.NDArray[np.int32] | Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.rope`; begins a step. Returns cos and sin [positions, D / 2] of all positions up to the
        highest so far: kernels look theirs up. A captured step brings its positions as a tensor; they must
        have been reached before.
        """
        compute_on(self.device)
        self._step.clear()
        self._stream = None
        key = (inv_freq.tobytes(), factor)
        known = self._angles.get(key)
        if isinstance(positions, Tensor):
            assert known is not None
            return known
        needed = int(positions.max()) + 1
        if known is None or len(known[0]) < needed:
            self._outgrown += [] if known is None else [known]
            count = max(1 << (needed - 1).bit_length(), 256)
            cos, sin = super().rope(inv_freq, np.arange(count, dtype=np.int32), factor)
            known = self._angles[key] = (cos.float().view(count, -1), sin.float().view(count, -1))
        return known

    def embed(self, table: Tiles, token_ids: npt.NDArray[np.int32] | Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.embed`."""
        ids = torch.as_tensor(token_ids, device=self.device)
        self._stream = fused.embed(table, ids, self._matmul.levels)
        return self._stream[0]

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Rows:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.norm`; waits for who needs it, who must come before x changes."""
        known = self._stream is not None and self._stream[0] is x
        squares = self._stream[1] if known and self._stream is not None else fused.add_rows(x, None)
        return Rows(Normed(x, squares, weight, eps), self.dtype)

    def add_norm(self, x: Tensor, y: Tensor | Product, weight: Tensor, eps: float) -> tuple[Tensor, Rows]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.add_norm`; the sum takes the place of x."""
        squares = fused.add_rows(x, y) if isinstance(y, Tensor) else y.add_to(x)
        self._stream = (x, squares)
        return x, self.norm(x, weight, eps)

    def linear(self, x: Tensor | Rows, weights: Sequence[Tiles]) -> list[Tensor | Product]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.linear`; float32."""
        if isinstance(x, Tensor) and len(weights) == 1 and len(weights[0].parts) == 1:
            return [Product(self._matmul, x, weights[0])]
        found: list[Tensor | Product] = []
        for weight in weights:
            out = self._matmul(self._operand(x), weight)
            offsets = weight.offsets()
            found += [out[:, at : at + rows] for at, rows in zip(offsets, weight.parts, strict=False)]
        return found

    def attend(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q: Tensor | Product,
        k: Tensor | Product,
        v: Tensor | Product,
        rope: tuple[Tensor, Tensor],
        meta: AttentionMeta | Placed,
        pages: TritonPages | None,
        head_dim: int,
        window: int | None,
    ) -> Tensor:
        """See `Ops.attend`. Needs pages: this backend does not train."""
        assert pages is not None
        assert pages.k.shape[2] == head_dim
        q, k, v = dense(q), dense(k), dense(v)
        if k.stride(0) != v.stride(0):
            k, v = k.contiguous(), v.contiguous()
        return self._attention((q, k, v), rope, self._placed(meta), pages, window)

    def mlp(self, x: Tensor | Rows, bank: TiledExperts) -> Tensor | Product:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.mlp`; of the rows of a norm the last product waits for the residual stream."""
        operand = self._operand(x)
        if bank.gate.like(bank.up):
            hidden = self._matmul.gate(operand, bank.gate, bank.up)
        else:
            width = bank.gate.shape[0]
            left, right = (self._matmul(operand, weight)[:, :width] for weight in (bank.gate, bank.up))
            hidden = fused.gate(left, right, self.dtype)
        product = Product(self._matmul, hidden, bank.down)
        return product if isinstance(x, Rows) else product.tensor()

    def route(self, x: Tensor | Rows, router: Tiles, top_k: int) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `TorchOps.route`; shares are float32."""
        operand = self._operand(x)
        count = router.shape[0]
        if count <= MOST_EXPERTS:
            return self._matmul.route(operand, router, top_k)
        ranked = torch.sort(self._matmul(operand, router)[:, :count], dim=-1, descending=True, stable=True)
        return ranked.indices[:, :top_k].int(), torch.softmax(ranked.values[:, :top_k], -1)

    def mix(self, parts: Tensor, share: Tensor) -> Tensor:
        """See `TorchOps.mix`."""
        return fused.mix(parts.flatten(0, 1), share)

    def moe(self, x: Tensor | Rows, router: Tiles, bank: TiledExperts, top_k: int) -> Product:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.moe`. Slots no more than experts are not sorted: each (row, rank) has its own programs."""
        experts, shares = self.route(x, router, top_k)
        if experts.numel() <= bank.gate.count:
            chosen = Chosen(experts.view(-1))
        else:
            chosen = sorted_slots(experts, bank.gate.count, self._matmul.card.sorted_slots)
        operand = self._operand(x)
        if bank.gate.like(bank.up):
            hidden = self._matmul.gate(operand, bank.gate, bank.up, chosen, top_k)
        else:
            width = bank.gate.shape[0]
            left, right = (
                self._matmul.slots(operand, each, chosen, top_k)[:, :width] for each in (bank.gate, bank.up)
            )
            hidden = fused.gate(left, right, self.dtype)
        return Product(self._matmul, hidden, bank.down, chosen, shares)

    def lora(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, a: npt.NDArray[np.float32] | Tensor, b: npt.NDArray[np.float32] | Tensor, scale: float
    ) -> TiledLora:
        """See `Ops.lora`; float32."""
        first, second = (tile(torch.as_tensor(each, device=self.device).float()) for each in (a, b))
        return first, second, scale

    def add_lora(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, y: Tensor | Product, x: Tensor | Rows, lora: TiledLora, rows: npt.NDArray[np.intp]
    ) -> Tensor:
        """See `Ops.add_lora`: with the products of this backend, whose bits no other row changes."""
        a, b, scale = lora
        y, x = dense(y), dense(x)
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        low = self._matmul(x[index], a)[:, : a.shape[0]] * scale
        return y.index_add(0, index, self._matmul(low, b)[:, : b.shape[0]])

    def gated(self, gate: Tensor | Product, up: Tensor | Product) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.gated`."""
        return fused.gate(dense(gate), dense(up), self.dtype)

    def logits(self, x: Tensor | Rows, head: Tiles) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Ops.logits`."""
        return self._matmul(self._operand(x), head)[:, : head.shape[0]]

    def sample(
        self, logits: Tensor, parameters: npt.NDArray[np.float64], mask: npt.NDArray[np.uint32] | None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """See `triton.sampling.sample`."""
        compute_on(self.device)
        return sample(logits, parameters, mask)

    def _operand(self, x: Tensor | Rows) -> Tensor | Normed:
        """Return rows as a product takes them: few are normed by it."""
        if isinstance(x, Tensor):
            return x
        return x.normed if len(x) <= _FUSED_ROWS else x.tensor()

    def _placed(self, meta: AttentionMeta | Placed) -> Placed:
        """Return where the rows stand on the device, copied once a step."""
        if isinstance(meta, Placed):
            return meta
        found = self._step.get(id(meta))
        if found is None:
            found = self._step[id(meta)] = (meta, place(meta, self.device))
        return found[1]
