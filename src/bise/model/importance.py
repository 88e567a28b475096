"""How much the columns of a matrix matter, told by the weights that make its inputs: no text is read.

The larger an input is on average, the more an error in its column costs. What a feed-forward layer's last
matrix reads is gate times up, what an attention layer's reads are values: rows of matrices, whose lengths say
how large.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bise.kernels.cpu import Floats
from bise.model.source import ModelSource, SourceTensor

_SLICE_BYTES = 4 << 20
_LEAST = 1e-3
"""Of the mean, so that no column is given up."""


def column_importance(source: ModelSource, name: str) -> Floats | None:
    """Return weights [K] for the squared errors of a matrix's columns; None where they are all alike.

    The root of the inputs' mean square as the weights foretell it (of inputs that are norms times a random
    direction): all of it would trust the guess too much (docs/quality.md).
    """
    prefix, _, kind = name.rpartition(".")
    makers = {"w2": ("w1", "w3"), "wo": ("wv",)}.get(kind, ())
    tensors = [source.tensors.get(f"{prefix}.{maker}") for maker in makers]
    layer = prefix.partition(".experts.")[0]
    norm = source.tensors.get(f"{layer}.{'ffn_norm' if kind == 'w2' else 'attn_norm'}")
    if not makers or norm is None:
        return None
    weights = norm.floats(0, norm.shape[0]).astype(np.float64) ** 2
    size: npt.NDArray[np.float64] = np.ones(1)
    for tensor in tensors:
        if tensor is None:
            return None
        size = size * _row_sums(tensor, weights)
    if kind == "wo":  # the values of a head serve the queries of its group
        config = source.config
        heads = size.reshape(config.num_kv_heads, config.head_dim)
        size = np.repeat(heads, config.num_heads // config.num_kv_heads, axis=0).reshape(-1)
    mean = float(size.mean())
    if not 0 < mean < np.inf:
        return None
    return np.sqrt(np.maximum(size / mean, _LEAST)).astype(np.float32)


def _row_sums(tensor: SourceTensor, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the sums of weights [K] x squares over the rows of a matrix [N, K]."""
    num_rows, num_columns = tensor.shape
    sums = np.empty(num_rows)
    step = max(1, _SLICE_BYTES // (4 * num_columns))
    for start in range(0, num_rows, step):
        rows = tensor.floats(start, min(start + step, num_rows))
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused where it is packed
            sums[start : start + len(rows)] = np.square(rows) @ weights.astype(np.float32)
    return sums
