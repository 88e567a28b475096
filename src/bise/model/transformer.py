"""The Mistral-family network, once: embeddings, blocks, norm, logits.

It knows the order of operations and nothing of devices, packing or threads: those belong to `kernels`.
Weight names are bise's own (see `weight_shapes`); `checkpoint` and `gguf` translate from every source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from bise.config import ModelConfig
from bise.kernels import Array, Experts, Ops, Pages, Weight
from bise.model.batch import AdaptedRows, Batch
from bise.model.rope import rope_frequencies

_DENSE = ("w1", "w3", "w2")


class LayerPages(Protocol):
    """What the model needs of a KV cache."""

    def layer(self, index: int) -> Pages:
        """Return the pages of a layer."""
        ...


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return every weight's name and shape, in file order; matrices are [N, K], applied as x W^T.

    RoPE rows of wq and wk are in the halves layout: dimension i of a head turns with i + D/2.
    """
    dim, hidden = config.dim, config.hidden_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (config.vocab_size, dim)}
    for index in range(config.num_layers):
        layer = f"layers.{index}."
        shapes[layer + "attn_norm"] = (dim,)
        shapes[layer + "wq"] = (config.q_dim, dim)
        shapes[layer + "wk"] = (config.kv_dim, dim)
        shapes[layer + "wv"] = (config.kv_dim, dim)
        shapes[layer + "wo"] = (dim, config.q_dim)
        shapes[layer + "ffn_norm"] = (dim,)
        prefixes = [layer]
        if config.is_moe:
            shapes[layer + "router"] = (config.num_experts, dim)
            prefixes = [f"{layer}experts.{expert}." for expert in range(config.num_experts)]
        for prefix in prefixes:
            shapes[prefix + "w1"] = (hidden, dim)
            shapes[prefix + "w3"] = (hidden, dim)
            shapes[prefix + "w2"] = (dim, hidden)
    shapes["norm"] = (dim,)
    if not config.tied_embeddings:
        shapes["output"] = (config.vocab_size, dim)
    return shapes


class Block:
    """One transformer block: attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, config: ModelConfig, index: int, weights: Mapping[str, Weight], ops: Ops) -> None:
        self._prefix = prefix = f"layers.{index}."
        self._ops = ops
        self._head_dim = config.head_dim
        self._top_k = config.experts_per_token
        self.window = config.windows[index]
        self.attn_norm: Array = weights[prefix + "attn_norm"]
        self.ffn_norm: Array = weights[prefix + "ffn_norm"]
        self._qkv = ops.together([weights[prefix + name] for name in ("wq", "wk", "wv")])
        self._wo: Sequence[Weight] = [weights[prefix + "wo"]]
        self._router: Weight | None = weights.get(prefix + "router")
        experts = [f"{prefix}experts.{expert}." for expert in range(config.num_experts)] or [prefix]
        self._bank: Experts = ops.layer(index).experts(
            [(weights[name + "w1"], weights[name + "w3"], weights[name + "w2"]) for name in experts]
        )
        self._dense: Sequence[Weight] = (
            [weights[prefix + name] for name in _DENSE] if self._router is None else ()
        )

    def attention(self, x: Array, rope: Array, batch: Batch, group: int, pages: Pages | None) -> Array:
        """Return the attention output [T, E] of normed rows x [T, E]; stores their K and V."""
        q, k, v = self._ops.linear(x, self._qkv)
        if batch.adapted:
            q, k, v = (
                self._adapt(name, y, x, batch.adapted)
                for name, y in zip(("wq", "wk", "wv"), (q, k, v), strict=True)
            )
        mixed = self._ops.attend(q, k, v, rope, batch.attention[group], pages, self._head_dim, self.window)
        return self._adapt("wo", self._ops.linear(mixed, self._wo)[0], mixed, batch.adapted)

    def feed_forward(self, x: Array, adapted: Sequence[AdaptedRows] = ()) -> Array:
        """Return the feed-forward output [T, E] of normed rows x [T, E]."""
        if self._router is not None:
            return self._ops.moe(x, self._router, self._bank, self._top_k)
        inner = [item for item in adapted if any(self._prefix + name in item.loras for name in _DENSE)]
        if not inner:
            return self._ops.mlp(x, self._bank)
        rows = np.sort(np.concatenate([item.rows for item in inner]))
        inner = [item._replace(rows=np.searchsorted(rows, item.rows)) for item in inner]
        if len(rows) == len(x):
            return self._adapted_mlp(x, inner)
        # Everyone goes through the fused product; adapted rows, which need what is inside it, are replaced.
        out = self._ops.mlp(x, self._bank)
        out[rows] = self._adapted_mlp(x[rows], inner)
        return out

    def _adapted_mlp(self, x: Array, adapted: Sequence[AdaptedRows]) -> Array:
        """Return the feed-forward output of rows [n, E] that all have an adapter here."""
        w1, w3, w2 = self._dense
        gate, up = self._ops.linear(x, (w1, w3))
        hidden = self._ops.gated(self._adapt("w1", gate, x, adapted), self._adapt("w3", up, x, adapted))
        return self._adapt("w2", self._ops.linear(hidden, (w2,))[0], hidden, adapted)

    def _adapt(self, name: str, y: Array, x: Array, adapted: Sequence[AdaptedRows]) -> Array:
        """Return y, the product of x with the weight `name`, with the adapters' share added to their rows."""
        for item in adapted:
            lora = item.loras.get(self._prefix + name)
            if lora is not None:
                y = self._ops.add_lora(y, x, lora, item.rows)
        return y


class Transformer:
    """A model ready to run on one backend."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Weight], ops: Ops) -> None:
        """Take `weights` by the names of `weight_shapes`, already in the backend's form."""
        self.config = config
        self._ops = ops
        self._eps = config.norm_eps
        self._inv_freq, self._rope_factor = rope_frequencies(config)
        self._embeddings: Weight = weights["tok_embeddings"]
        self._blocks = [Block(config, index, weights, ops) for index in range(config.num_layers)]
        groups = config.window_groups
        self._groups = [groups.index(block.window) for block in self._blocks]
        self._norm: Array = weights["norm"]
        # A tied head has a name of its own where it lies apart from the embeddings.
        self._head: Weight = weights["output" if "output" in weights else "tok_embeddings"]

    def forward(self, batch: Batch, cache: LayerPages | None = None) -> Array:
        """Return the normed hidden states [T, E] of all rows; K and V are stored in `cache`.

        Without a cache the rows of each sequence see only one another (training, scoring of whole texts).
        """
        ops = self._ops
        rope = ops.rope(self._inv_freq, batch.positions, self._rope_factor)
        x = ops.embed(self._embeddings, batch.token_ids)
        h = ops.norm(x, self._blocks[0].attn_norm, self._eps)
        for index in range(len(self._blocks)):
            x, h = self._layer(index, x, h, rope, batch, None if cache is None else cache.layer(index))
        return h

    def _layer(
        self, index: int, x: Array, h: Array, rope: Array, batch: Batch, pages: Pages | None
    ) -> tuple[Array, Array]:
        """Return (x, h) after a block: the sum of all outputs so far, and it normed for who comes next."""
        ops, block = self._ops, self._blocks[index]
        y = block.attention(h, rope, batch, self._groups[index], pages)
        x, h = ops.add_norm(x, y, block.ffn_norm, self._eps)
        y = block.feed_forward(h, batch.adapted)
        last = index + 1 == len(self._blocks)
        return ops.add_norm(x, y, self._norm if last else self._blocks[index + 1].attn_norm, self._eps)

    def logits(self, hidden: Array) -> Array:
        """Return scores [R, V] of hidden rows [R, E]."""
        return self._ops.logits(hidden, self._head)
