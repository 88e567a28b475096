"""A prompt as one vector: final hidden states gathered while the prompt is computed, chunk by chunk."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from bise.errors import NonFiniteError
from bise.kernels import Array


class Pooler:
    """Gathers the normed hidden states of one prompt. The vector does not depend on how the prompt was cut
    into steps: rows are added one by one in float64, in the order of their positions.
    """

    def __init__(self, kind: Literal["last", "mean"], num_tokens: int) -> None:
        """Pool a prompt of `num_tokens` as `Request.pooling` says."""
        self._kind = kind
        self._num_tokens = num_tokens
        self._num_seen = 0
        self._sum: npt.NDArray[np.float64] | None = None

    def add(self, first: int, hidden: Array) -> None:
        """Take the rows [n, E] of positions `first` and on; rows that were taken before (a prompt computed
        again after preemption) are passed over.
        """
        last = first + len(hidden)
        if self._kind == "last":
            if last == self._num_tokens:
                self._sum = _wide(hidden[-1:])[0]
            return
        assert first <= self._num_seen, "a mean needs the hidden state of every token"
        for row in _wide(hidden[self._num_seen - first :]):
            self._sum = row if self._sum is None else self._sum + row
        self._num_seen = max(self._num_seen, last)

    def vector(self) -> tuple[float, ...]:
        """Return the unit vector [E], rounded to float32. Raises NonFiniteError where there is none."""
        assert self._sum is not None, "the prompt was not computed to its end"
        length = float(np.sqrt(np.square(self._sum).sum()))
        if not np.isfinite(length) or length == 0:
            raise NonFiniteError(
                "the model's hidden states hold NaN, infinity or only zeros, so they have no direction; the "
                "weights or the arithmetic are broken"
            )
        unit = (self._sum / length).astype(np.float32)
        return tuple(unit.tolist())


def _wide(hidden: Array) -> npt.NDArray[np.float64]:
    if hasattr(hidden, "detach"):
        hidden = hidden.detach().cpu().double().numpy()  # numpy has no bfloat16
    return np.asarray(hidden, np.float64)
