"""How far a quantised model is from its reference: KL divergence, top-1 agreement and perplexity on a text.

Both models read the same rows of tokens; their log-probs are compared position by position in float64, a few
positions at a time, so that memory does not grow with the text. The numbers depend on the models and the
tokens alone: not on threads, instruction set or chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bise.errors import ConfigError
from bise.kernels import BLOCK_SIZE, AttentionMeta, Ops, Pages
from bise.model.batch import Batch
from bise.model.transformer import Transformer

Doubles = npt.NDArray[np.float64]

CHUNK = 64
"""Positions whose logits exist at once."""


@dataclass(frozen=True, slots=True)
class Network:
    """A model to measure: the network and the ops it runs on."""

    transformer: Transformer
    ops: Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A candidate against a reference."""

    positions: int
    """Positions whose distributions were compared: every token of every row."""
    kl_mean: float
    """Mean of KL(reference || candidate) in nats per token."""
    kl_p99: float
    """Its 99th percentile (linear between the neighbours)."""
    top1_agreement: float
    """Share of the positions where both rank the same token first."""
    predicted_tokens: int
    """Tokens that the perplexities are over: all but the first of each row."""
    perplexity_reference: float
    perplexity: float


class _Cache:
    def __init__(self, layers: list[Pages]) -> None:
        self._layers = layers

    def layer(self, index: int) -> Pages:
        return self._layers[index]


def compare(reference: Network, candidate: Network, rows: Sequence[Sequence[int]]) -> Quality:
    """Return the quality of `candidate` on rows of token ids; ConfigError when nothing is to be predicted."""
    vocabulary = reference.transformer.config.vocab_size
    if candidate.transformer.config.vocab_size != vocabulary:
        raise ConfigError("the two models have different vocabularies; they cannot be compared")
    divergences: list[Doubles] = []
    agreed = 0
    losses = [0.0, 0.0]
    predicted = 0
    for row in rows:
        ids = np.asarray(row, np.int32)
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= vocabulary:
            raise ConfigError(f"a row to measure on must hold token ids from 0 to {vocabulary - 1}")
        for start, ours, theirs in zip(
            range(0, len(ids), CHUNK), log_probs(reference, ids), log_probs(candidate, ids), strict=True
        ):
            divergences.append((np.exp(ours) * (ours - theirs)).sum(1))
            agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())
            following = ids[start + 1 : start + 1 + len(ours)]
            rank = np.arange(len(following))
            losses[0] -= math.fsum(ours[rank, following])
            losses[1] -= math.fsum(theirs[rank, following])
            predicted += len(following)
    if predicted == 0:
        raise ConfigError("the text holds no token to predict; give a longer one", field="text")
    every = np.concatenate(divergences)
    return Quality(
        positions=len(every),
        kl_mean=math.fsum(every) / len(every),
        kl_p99=float(np.quantile(every, 0.99)),
        top1_agreement=agreed / len(every),
        predicted_tokens=predicted,
        perplexity_reference=math.exp(losses[0] / predicted),
        perplexity=math.exp(losses[1] / predicted),
    )


def log_probs(network: Network, ids: npt.NDArray[np.int32]) -> Iterator[Doubles]:
    """Yield natural log-probs [up to CHUNK, V] in float64 of what follows each position of one row."""
    for hidden in hidden_states(network, ids):
        logits = np.asarray(network.transformer.logits(hidden), np.float64)
        if not np.isfinite(logits).all():
            raise ConfigError("the model's logits are not finite on this text; it cannot be measured")
        logits -= logits.max(1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(1, keepdims=True))


def hidden_states(network: Network, ids: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the normed hidden states [up to CHUNK, E] of one row of ids, run as one sequence."""
    config = network.transformer.config
    blocks = -(-len(ids) // BLOCK_SIZE)
    cache = _Cache(
        [
            network.ops.pages(blocks, config.num_kv_heads, config.head_dim, "f32")
            for _ in range(config.num_layers)
        ]
    )
    table = np.arange(blocks, dtype=np.int32)[None, :]
    for start in range(0, len(ids), CHUNK):
        part = np.ascontiguousarray(ids[start : start + CHUNK])
        positions = np.arange(start, start + len(part), dtype=np.int32)
        meta = AttentionMeta(
            q_start=np.array([0, len(part)], np.int32),
            q_pos=np.array([start], np.int32),
            block_table=table,
            slots=positions,
        )
        batch = Batch(part, positions, (meta,) * len(config.window_groups), positions - start)
        yield network.transformer.forward(batch, cache)
