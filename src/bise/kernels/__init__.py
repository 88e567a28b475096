"""The operations a Mistral-family network is made of: one protocol, several backends.

`model/transformer.py` is written once against `Ops`. The docstrings here are the contract that every backend
(`cpu`: numpy over the native extension, `torch`: any device, differentiable, float64 oracle) is tested
against.

Letters: T tokens in the step, S sequences, H query heads, G key/value heads, D head width, E model width,
F hidden width, V vocabulary, X experts, N and K rows and columns of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = Any
"""A backend's own array: numpy.ndarray (cpu) or torch.Tensor (torch)."""

Weight = Any
"""A backend's own weight matrix [N, K]: a packed native handle (cpu) or a tensor (torch)."""

Rope = Any
"""A backend's own cos/sin tables for the positions of one step."""

Pages = Any
"""A backend's own K and V pages of one layer."""

Experts = Any
"""A backend's own bank of feed-forward weights: (gate, up, down) of one dense layer or of each expert."""

Lora = Any
"""A backend's own low-rank addition to a weight: (A [r, K], B [N, r], scale)."""

BLOCK_SIZE = 32
"""Tokens in one KV block (a page); block b of a sequence holds positions [32 b, 32 b + 32)."""

SPLIT_SIZE = 512
"""Attention reduces over absolute positions in splits [512 s, 512 (s + 1)), combined in ascending order."""


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """Where the queries of one step stand and where their keys live, for layers that share a block table.

    Worked example: blocks of 4 tokens, two sequences; A decodes its 10th token (position 9), B brings its
    first three. A's table is [7, 2, 5] (positions 8..11 live in block 5), B's is [0]:

        q_start     = [0, 1, 4]          rows of A: 0..0, of B: 1..3
        q_pos       = [9, 0]             position of each sequence's first row
        block_table = [[7, 2, 5], [0, -1, -1]]
        slots       = [5*4+1, 0, 1, 2]   where the rows' K and V are stored

    A table entry is -1 where a block is absent: not yet allocated, or slid out of the window.
    """

    q_start: npt.NDArray[np.int32]
    """[S + 1] first row of each sequence; ends with T."""
    q_pos: npt.NDArray[np.int32]
    """[S] absolute position of each sequence's first row; rows of a sequence are consecutive positions."""
    block_table: npt.NDArray[np.int32]
    """[S, N] physical block of logical block n of a sequence, or -1."""
    slots: npt.NDArray[np.int32]
    """[T] physical token slot (block * BLOCK_SIZE + offset) of each row."""


class Ops(Protocol):
    """A backend. Methods return new arrays unless they say that they modify an argument."""

    name: str
    """`cpu`, `torch`, `triton` or `split`."""

    def layer(self, index: int) -> Ops:
        """Return the backend that computes a layer: itself, unless layers lie in several places."""
        ...

    def weight(self, array: Array) -> Weight:
        """Return the dense matrix [N, K] in the backend's form, values unchanged."""
        ...

    def vector(self, array: Array) -> Array:
        """Return a norm weight [K] in the backend's compute dtype."""
        ...

    def pages(self, num_blocks: int, num_kv_heads: int, head_dim: int, kv_format: str) -> Pages:
        """Allocate K and V pages of one layer; `kv_format` is f32, f16, bf16, q16 or q8 (integers, one
        scale per token and head).
        """
        ...

    def read_block(self, pages: Pages, block: int) -> Sequence[npt.NDArray[np.uint8]]:
        """Return the bytes of one block, keys, values and scales, in host memory: views where pages lie
        there, else copies.
        """
        ...

    def write_block(self, pages: Pages, block: int, content: npt.NDArray[np.uint8]) -> None:
        """Put the bytes of a block, end to end as `read_block` gave them, into a block of pages of the same
        shape and format, where they stand for the same keys and values.
        """
        ...

    def rope(
        self, inv_freq: npt.NDArray[np.float64], positions: npt.NDArray[np.int32], factor: float
    ) -> Rope:
        """Return cos and sin of positions [T] x inv_freq [D / 2], times `factor`; angles are formed in
        float64.
        """
        ...

    def embed(self, table: Weight, token_ids: npt.NDArray[np.int32]) -> Array:
        """Return rows [T, E] of the embedding table [V, E]."""
        ...

    def norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Return x / sqrt(mean(x^2) + eps) * weight, over the last axis of x [T, E]."""
        ...

    def add_norm(self, x: Array, y: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        """Return (x + y, norm(x + y)); the cpu backend may reuse the storage of x for the sum."""
        ...

    def together(self, weights: Sequence[Weight]) -> Sequence[Weight]:
        """Return weights [N_i, K] that `linear` is always going to take together in the form that suits it
        best; the given ones stay usable.
        """
        ...

    def linear(self, x: Array, weights: Sequence[Weight]) -> list[Array]:
        """Return x [T, K] times the transpose of each weight [N_i, K]; x is quantised once for all of
        them.
        """
        ...

    def attend(
        self,
        q: Array,
        k: Array,
        v: Array,
        rope: Rope,
        meta: AttentionMeta,
        pages: Pages | None,
        head_dim: int,
        window: int | None,
    ) -> Array:
        """Rotate q [T, H*D] and k [T, G*D], store k and v in `pages`, return attention [T, H*D].

        Scores are q.k / sqrt(D); the query at position p sees keys max(0, p - window + 1) .. p (all up to p
        when `window` is None). Rotation pairs (i, i + D/2). `pages=None` (training): the rows of each
        sequence attend to one another only.
        """
        ...

    def experts(self, experts: Sequence[tuple[Weight, Weight, Weight]]) -> Experts:
        """Return the bank of (gate [F, E], up [F, E], down [E, F]) of each expert; a dense layer has one."""
        ...

    def mlp(self, x: Array, bank: Experts) -> Array:
        """Return (silu(x gate^T) * (x up^T)) down^T with the only expert of `bank`, x [T, E]."""
        ...

    def moe(self, x: Array, router: Weight, bank: Experts, top_k: int) -> Array:
        """Return the sum over the top_k experts of each row, weighted by a softmax over their router scores.

        Experts are ranked by score, ties by lower index; contributions are added in rank order.
        """
        ...

    def lora(self, a: Array, b: Array, scale: float) -> Lora:
        """Return A [r, K], B [N, r] and their scale in the backend's form, values unchanged."""
        ...

    def add_lora(self, y: Array, x: Array, lora: Lora, rows: npt.NDArray[np.intp]) -> Array:
        """Return y [T, N] with scale * (x A^T) B^T added to its `rows` (distinct, ascending), x [T, K].

        In float32 at least, in one order per row whatever the other rows are; rows not named keep their bits.
        May reuse the storage of y.
        """
        ...

    def gated(self, gate: Array, up: Array) -> Array:
        """Return silu(gate) * up, element by element, [T, F]: what `mlp` has between its products. May reuse
        the storage of gate.
        """
        ...

    def logits(self, x: Array, head: Weight) -> npt.NDArray[np.float32] | Array:
        """Return scores [R, V] of rows x [R, E] in float32 (float64 on a float64 backend)."""
        ...
