"""The torch backend: any device, any float dtype, differentiable; in float64 the oracle for every other
backend.

Plain formulas on purpose: this file defines what the ops mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from bise.kernels import BLOCK_SIZE, AttentionMeta
from bise.kernels.grouped import FLOATS, Grouped, unpack_floats, unpack_panels
from bise.kernels.panels import PANEL_FORMATS

TorchWeight = Tensor | Grouped
Bank = Sequence[tuple[TorchWeight, TorchWeight, TorchWeight]]
TorchLora = tuple[Tensor, Tensor, float]


class TorchPages:
    """K and V of one layer, [slots, G, D] each, in the compute dtype unless a narrower one is asked for."""

    def __init__(self, slots: int, heads: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.k = torch.zeros(slots, heads, width, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)

    def block(self, index: int) -> list[Tensor]:
        """Return what one block holds, each part a flat view."""
        rows = slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
        return [tensor[rows].view(-1) for tensor in (self.k, self.v)]


class TorchOps:
    """Ops over torch tensors; see `bise.kernels.Ops` for the contracts."""

    name = "torch"

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """Compute in `dtype` on `device`; weights of another dtype are cast at each use (and get
        gradients).
        """
        self.dtype = dtype
        self.device = torch.device(device)
        self._masks: dict[tuple[int, int], Tensor] = {}

    @property
    def residual(self) -> torch.dtype:
        """Type of the rows that go from layer to layer."""
        return self.dtype

    def layer(self, index: int) -> TorchOps:
        """See `Ops.layer`."""
        return self

    def weight(self, array: npt.NDArray[np.generic] | Tensor) -> Tensor:
        """See `Ops.weight`."""
        return torch.as_tensor(array, device=self.device).to(self.dtype)

    vector = weight

    def packed(
        self, packed_format: str, num_rows: int, num_columns: int, memory: npt.NDArray[np.uint8]
    ) -> TorchWeight:
        """Return the matrix whose panels (docs/formats.md) lie in `memory`, values unchanged.

        Quantised ones stay so and are multiplied out at each use; floats become `dtype`.
        """
        panels = torch.as_tensor(memory).to(self.device)
        if packed_format in PANEL_FORMATS:
            return unpack_panels(packed_format, num_rows, num_columns, panels)
        return self.floats(packed_format, unpack_floats(packed_format, num_rows, num_columns, panels))

    def floats(self, packed_format: str, matrix: Tensor) -> TorchWeight:
        """Return a float matrix [N, K] as `packed` would return it from panels of a float format."""
        return matrix.to(FLOATS[packed_format]).to(self.dtype)

    def pages(self, num_blocks: int, num_kv_heads: int, head_dim: int, kv_format: str) -> TorchPages:
        """See `Ops.pages`; float64 keeps K and V in float64 whatever the format."""
        dtype = self.dtype if self.dtype == torch.float64 else FLOATS[kv_format]
        return TorchPages(num_blocks * BLOCK_SIZE, num_kv_heads, head_dim, dtype, self.device)

    def read_block(self, pages: TorchPages, block: int) -> list[npt.NDArray[np.uint8]]:
        """See `Ops.read_block`."""
        return [part.view(torch.uint8).cpu().numpy() for part in pages.block(block)]

    def write_block(self, pages: TorchPages, block: int, content: npt.NDArray[np.uint8]) -> None:
        """See `Ops.write_block`."""
        raw, start = torch.from_numpy(content.copy()), 0  # pyright: ignore[reportUnknownMemberType]
        for part in pages.block(block):
            size = part.numel() * part.element_size()
            part.copy_(raw[start : start + size].view(part.dtype))
            start += size

    def rope(
        self, inv_freq: npt.NDArray[np.float64], positions: npt.NDArray[np.int32], factor: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.rope`; cos and sin are [T, 1, D / 2]."""
        # On the host: there are devices without float64.
        angles = positions[:, None, None] * inv_freq
        dtype = np.float64 if self.dtype == torch.float64 else np.float32
        cos, sin = (np.cos(angles) * factor).astype(dtype), (np.sin(angles) * factor).astype(dtype)
        return torch.as_tensor(cos, device=self.device), torch.as_tensor(sin, device=self.device)

    def embed(self, table: TorchWeight, token_ids: npt.NDArray[np.int32]) -> Tensor:
        """See `Ops.embed`."""
        ids = torch.as_tensor(token_ids, dtype=torch.int64, device=self.device)
        if isinstance(table, Grouped):
            return table.rows(ids).values(self.dtype)
        return functional.embedding(ids, table).to(self.dtype)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.norm`; the reduction is float32 at least."""
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.to(wide.dtype)).to(x.dtype)

    def add_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Ops.add_norm`."""
        total = x + y
        return total, self.norm(total, weight, eps)

    def together(self, weights: Sequence[TorchWeight]) -> Sequence[TorchWeight]:
        """See `Ops.together`."""
        return weights

    def linear(self, x: Tensor, weights: Sequence[TorchWeight]) -> list[Tensor]:
        """See `Ops.linear`."""
        return [functional.linear(x, _dense(weight, x.dtype)) for weight in weights]

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
        """See `Ops.attend`."""
        q3 = _rotate(q.view(q.shape[0], -1, head_dim), rope)
        k3 = _rotate(k.view(k.shape[0], -1, head_dim), rope)
        v3 = v.view(v.shape[0], -1, head_dim)
        if pages is None:
            return self._attend_texts(q3, k3, v3, meta.q_start, window)
        slots = torch.as_tensor(meta.slots, dtype=torch.int64, device=self.device)
        pages.k[slots] = k3.to(pages.k.dtype)
        pages.v[slots] = v3.to(pages.v.dtype)
        outputs: list[Tensor] = []
        for index in range(len(meta.q_pos)):
            first = int(meta.q_pos[index])
            start, end = int(meta.q_start[index]), int(meta.q_start[index + 1])
            low = max(0, first - (window or first + 1) + 1)
            positions = np.arange(low, first + end - start)
            blocks = meta.block_table[index, positions // BLOCK_SIZE].astype(np.int64)
            rows = torch.as_tensor(blocks * BLOCK_SIZE + positions % BLOCK_SIZE, device=self.device)
            query = torch.arange(first, first + end - start, device=self.device)[:, None]
            key = torch.as_tensor(positions, device=self.device)[None, :]
            mask = (key <= query) & (key > query - (window or 1 << 30))
            keys, values = pages.k[rows].to(q3.dtype), pages.v[rows].to(q3.dtype)
            outputs.append(_attention(q3[start:end][None], keys[None], values[None], mask)[0])
        return torch.cat(outputs)

    def _attend_texts(
        self, q: Tensor, k: Tensor, v: Tensor, q_start: npt.NDArray[np.int32], window: int | None
    ) -> Tensor:
        """Return attention [T, H*D] inside of each text; texts of several lengths are padded at their ends,
        where the causal mask hides the padding.
        """
        lengths = np.diff(q_start)
        count, longest = len(lengths), int(lengths.max())
        if (lengths == longest).all():
            return self._attend_rows(q, k, v, count, window)
        inside = np.arange(int(q_start[-1])) - np.repeat(q_start[:-1], lengths)
        places = np.repeat(np.arange(count) * longest, lengths) + inside
        index = torch.as_tensor(places, dtype=torch.int64, device=self.device)
        q, k, v = (t.new_zeros(count * longest, *t.shape[1:]).index_copy(0, index, t) for t in (q, k, v))
        return self._attend_rows(q, k, v, count, window).index_select(0, index)

    def _attend_rows(self, q: Tensor, k: Tensor, v: Tensor, num_sequences: int, window: int | None) -> Tensor:
        length = q.shape[0] // num_sequences
        key = (length, window or 0)
        if key not in self._masks:
            position = torch.arange(length, device=self.device)
            distance = position[:, None] - position[None, :]
            self._masks[key] = (distance >= 0) & (distance < (window or length))
        q, k, v = (t.view(num_sequences, length, -1, t.shape[-1]) for t in (q, k, v))
        return _attention(q, k, v, self._masks[key]).reshape(num_sequences * length, -1)

    def experts(self, experts: Sequence[tuple[TorchWeight, TorchWeight, TorchWeight]]) -> Bank:
        """See `Ops.experts`."""
        return list(experts)

    def mlp(self, x: Tensor, bank: Bank) -> Tensor:
        """See `Ops.mlp`."""
        gate, up, down = bank[0]
        left, right = self.linear(x, (gate, up))
        return self.linear(self.gated(left, right), (down,))[0]

    def route(self, x: Tensor, router: TorchWeight, top_k: int) -> tuple[Tensor, Tensor]:
        """Return the experts of each row [T, top_k], best first, and their shares, which add up to 1."""
        scores = self.linear(x, (router,))[0]
        ranked = torch.sort(scores, dim=-1, descending=True, stable=True)
        share = torch.softmax(ranked.values[:, :top_k].to(_wide(x.dtype)), -1).to(x.dtype)
        return ranked.indices[:, :top_k], share

    def mix(self, parts: Tensor, share: Tensor) -> Tensor:
        """Return the sum over ranks of shares [T, top_k] times outputs of experts [T, top_k, E]."""
        return (parts * share[..., None]).sum(1)

    def moe(self, x: Tensor, router: TorchWeight, bank: Bank, top_k: int) -> Tensor:
        """See `Ops.moe`."""
        chosen, share = self.route(x, router, top_k)
        parts = torch.zeros(len(x), top_k, x.shape[1], dtype=x.dtype, device=x.device)
        for index, expert in enumerate(bank):
            rows, rank = torch.nonzero(chosen == index, as_tuple=True)
            if len(rows):
                parts = parts.index_put((rows, rank), self.mlp(x[rows], [expert]))
        return self.mix(parts, share)

    def lora(
        self, a: npt.NDArray[np.float32] | Tensor, b: npt.NDArray[np.float32] | Tensor, scale: float
    ) -> TorchLora:
        """See `Ops.lora`."""
        return self.weight(a), self.weight(b), scale

    def add_lora(self, y: Tensor, x: Tensor, lora: TorchLora, rows: npt.NDArray[np.intp]) -> Tensor:
        """See `Ops.add_lora`."""
        a, b, scale = lora
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.device)
        wide = x[index].to(_wide(x.dtype))
        low = functional.linear(wide, a.to(wide.dtype)) * scale
        return y.index_add(0, index, functional.linear(low, b.to(wide.dtype)).to(y.dtype))

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Ops.gated`."""
        return functional.silu(gate) * up

    def logits(self, x: Tensor, head: TorchWeight) -> Tensor:
        """See `Ops.logits`."""
        scores = self.linear(x, (head,))[0]
        return scores.to(_wide(scores.dtype))


def _dense(weight: TorchWeight, dtype: torch.dtype) -> Tensor:
    return weight.values(dtype) if isinstance(weight, Grouped) else weight.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    left, right = x.to(cos.dtype).chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Return attention [S, Lq, H*D] of q [S, Lq, H, D] over k and v [S, Lk, G, D] under a mask [Lq, Lk]."""
    share = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(share, dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)
