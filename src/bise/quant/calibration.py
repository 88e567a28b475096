"""Calibrated 4-bit rounding: what matrices read is measured on a text, and rounding errors are made up for.

The error that rounded weights make in an output is (w - q) H (w - q)^T, H the second moments of the inputs.
Columns are rounded in order; the error of each is spread over the columns still to come in the way that costs
least (the update of optimal brain surgery, as in GPTQ). H is kept in squares of `GROUP` columns along its
diagonal, so that memory and time stay linear in the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bise.kernels.cpu import Bytes, CpuOps, Floats, Packed, packed_size
from bise.kernels.dequant import dequantize
from bise.model.pack import PackedWeights
from bise.model.source import ModelSource
from bise.model.transformer import Transformer
from bise.quant.quality import Network, hidden_states

GROUP = 1024
"""Columns whose inputs are looked at together; also the columns that an error may be spread over."""
DAMPING = 0.02
"""Share of the mean square that is added to each: keeps H invertible when the text is short."""

_BLOCK = 32
_Expert = tuple[Packed, Packed, Packed]


class ObservingOps(CpuOps):
    """The cpu ops, feed-forward layers spelled out, that add up the second moments of what each matrix
    reads.
    """

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._moments: dict[int, list[Floats]] = {}

    def moments(self, weight: Packed) -> list[Floats] | None:
        """Return the sums of x x^T, a square per `GROUP` columns, that `weight` has read, if any."""
        return self._moments.get(id(weight))

    def linear(self, x: Floats, weights: Sequence[Packed]) -> list[Floats]:
        """See `Ops.linear`."""
        parts = [x[:, start : start + GROUP] for start in range(0, x.shape[1], GROUP)]
        squares: list[Floats] = [np.matmul(part.T, part, dtype=np.float32) for part in parts]
        known = self._moments.get(id(weights[0]))
        total: list[Floats] = squares
        if known is not None:
            total = [np.add(old, new, dtype=np.float32) for old, new in zip(known, squares, strict=True)]
        for weight in weights:  # they share their inputs, and so the arrays
            self._moments[id(weight)] = total
        return super().linear(x, weights)

    def experts(self, experts: Sequence[_Expert]) -> Any:
        """See `Ops.experts`."""
        return list(experts)

    def mlp(self, x: Floats, bank: Any) -> Floats:
        """See `Ops.mlp`."""
        return self._feed_forward(x, bank[0])

    def _feed_forward(self, x: Floats, expert: _Expert) -> Floats:
        gate, up = self.linear(x, expert[:2])
        with np.errstate(over="ignore"):  # exp(-gate) may be infinite: then the product is 0
            hidden = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
        return self.linear(hidden, expert[2:])[0]

    def moe(self, x: Floats, router: Packed, bank: Any, top_k: int) -> Floats:
        """See `Ops.moe`."""
        scores = super().linear(x, [router])[0].astype(np.float64)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        share = np.exp(np.take_along_axis(scores, chosen, 1) - scores.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        out = np.zeros_like(x)
        for index, expert in enumerate(bank):
            row, rank = np.nonzero(chosen == index)
            if len(row):
                part = self._feed_forward(np.ascontiguousarray(x[row]), expert)
                np.add.at(out, row, (part * share[row, rank][:, None]).astype(np.float32))
        return out


class CalibratedRounding:
    """Rounds matrices of one model; a `bise.model.pack.Rounding`."""

    def __init__(self, moments: dict[str, list[Floats]], ops: CpuOps) -> None:
        self._moments = moments
        self._ops = ops
        self._known: tuple[list[Floats], list[tuple[Floats, Floats]]] | None = None

    def __call__(self, name: str, rows: Floats) -> Bytes | None:
        """Return rows [n, K] of a matrix as IQ4_NL blocks [n, K / 32 * 18]; None where nothing is known of
        its inputs (an expert that no token chose) or K is not a multiple of 32.
        """
        moments = self._moments.get(name)
        if moments is None or rows.shape[1] % _BLOCK:
            return None
        if self._known is None or self._known[0] is not moments:  # slices and neighbours share their inputs
            self._known = moments, [_spreading(moment) for moment in moments]
        out = np.empty((len(rows), rows.shape[1] // _BLOCK, 18), np.uint8)
        for index, (upper, weights) in enumerate(self._known[1]):
            first = index * GROUP // _BLOCK
            part = rows[:, index * GROUP : (index + 1) * GROUP]
            blocks = part.shape[1] // _BLOCK
            out[:, first : first + blocks] = _round(part, upper, weights, self._ops)
        return out.reshape(len(rows), -1)


def observe(
    source: ModelSource, packed: PackedWeights, rows: Sequence[Sequence[int]], threads: int
) -> CalibratedRounding:
    """Run `rows` of token ids through a model and return the rounding that fits what its matrices read."""
    ops = ObservingOps(threads)
    weights = packed.weights(ops)
    network = Network(Transformer(source.config, weights, ops), ops)
    for row in rows:
        for _ in hidden_states(network, np.asarray(row, np.int32)):
            pass
    found = {name: ops.moments(weight) for name, weight in weights.items()}
    return CalibratedRounding({name: moment for name, moment in found.items() if moment is not None}, ops)


def round_with_feedback(rows: Floats, moment: Floats, ops: CpuOps) -> Bytes:
    """Return rows [n, K] as IQ4_NL blocks [n, K / 32, 18], given the moments [K, K] of their inputs."""
    return _round(rows, *_spreading(moment), ops)


def _round(rows: Floats, upper: Floats, weights: Floats, ops: CpuOps) -> Bytes:
    left = np.array(rows.T, np.float32)  # [K, n]: a column of the matrix is contiguous
    blocks = np.empty((len(rows), rows.shape[1] // _BLOCK, 18), np.uint8)
    for start in range(0, rows.shape[1], _BLOCK):
        stop = start + _BLOCK
        block = left[start:stop]
        scales = _scales(np.ascontiguousarray(block.T), weights[start:stop], ops)
        codes, errors = _round_block(block, scales, upper[start:stop, start:stop])
        left[stop:] -= upper[start:stop, stop:].T @ errors
        blocks[:, start // _BLOCK, :2] = scales.view(np.uint8).reshape(-1, 2)
        blocks[:, start // _BLOCK, 2:] = (codes[:16] | (codes[16:] << np.uint8(4))).T
    return blocks


def _spreading(moment: Floats) -> tuple[Floats, Floats]:
    """Return the upper Cholesky factor of the damped moments' inverse, rows divided by their diagonal, and
    the diagonal of the moments scaled to mean 1.
    """
    damped = moment.astype(np.float64)
    mean = float(np.trace(damped)) / len(damped)
    if mean <= 0:
        return np.eye(len(damped), dtype=np.float32), np.ones(len(damped), np.float32)
    damped /= mean
    weights = np.maximum(np.diag(damped), 1e-3).astype(np.float32)
    damped[np.diag_indices(len(damped))] += DAMPING
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    return (upper / np.diag(upper)[:, None]).astype(np.float32), weights


def _scales(block: Floats, weights: Floats, ops: CpuOps) -> npt.NDArray[np.float16]:
    """Return the best scale of each row [n, 32], as the native search finds it."""
    panels = np.zeros(packed_size("n4", *block.shape), np.uint8)
    if not ops.pack_floats("n4", block, panels, weights):
        raise ValueError("a weight is not finite or too large for 4 bits")
    tails = panels.reshape(-1, panels.size // (-(-len(block) // 16)))[:, -32:]
    return np.ascontiguousarray(tails).reshape(-1).view(np.float16)[: len(block)]


def _round_block(block: Floats, scales: npt.NDArray[np.float16], upper: Floats) -> tuple[Bytes, Floats]:
    """Return codes [32, n] and the errors [32, n] that the columns after the block have to make up for; the
    columns of `block` [32, n] are changed on the way.
    """
    values = dequantize("IQ4_NL", _LADDER)[0, :16]
    borders = (values[1:] + values[:-1]) / 2
    scale = scales.astype(np.float32)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.empty(block.shape, np.uint8)
    errors = np.empty_like(block)
    for column in range(_BLOCK):
        codes[column] = np.searchsorted(borders, block[column] * inverse)
        errors[column] = block[column] - scale * values[codes[column]]
        block[column + 1 :] -= upper[column, column + 1 :, None] * errors[column]
    return codes, errors


_LADDER = np.frombuffer(np.float16(1).tobytes() + bytes(range(16)), np.uint8).reshape(1, 18)
"""An IQ4_NL block of scale 1 whose first 16 codes are 0 to 15."""
