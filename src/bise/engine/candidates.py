"""Tokens chosen by the backend, where the logits are: many rows in one call, and none of them crosses a bus.

A backend decides for rows whose choice depends on logits, a few numbers and a mask. Rows with log-probs,
penalties, bias or typical_p, and those in which rounding might decide, come to `engine.sampling`, which gives
the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bise.engine.sampling import Row, uniform
from bise.engine.scheduler import Step, StepRow
from bise.kernels import Array

Candidates = npt.NDArray[np.float32] | Sequence[Row | int]
"""For each row of a step either its logits [V] or the token that the backend chose."""


@runtime_checkable
class Chooses(Protocol):
    """A backend that chooses tokens."""

    takes_masks: bool
    """Whether it rules tokens out by itself, better than by picking out the logits of those allowed."""

    def sample(
        self, logits: Array, parameters: npt.NDArray[np.float64], mask: npt.NDArray[np.uint32] | None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Return a token for each row of logits [R, V], and 0 where it is sure.

        `parameters` [R, 5] are temperature, top_k, top_p, min_p and a random number; bit t % 32 of
        `mask`[r, t / 32] allows token t.
        """
        ...


class _Draw(NamedTuple):
    """What a backend needs to choose for one row."""

    parameters: tuple[float, float, float, float, float]
    allowed: npt.NDArray[np.intp] | None


def choose_there(step: Step, scores: Array, backend: Chooses) -> Candidates:
    """Return the candidates of a step's rows of scores [R, V], which lie where the backend computes."""
    masks = backend.takes_masks
    draws = [_draw(row, index, masks) for row in step.rows for index in range(row.num_samples)]
    found: list[Row | int] = [-1] * len(draws)
    left = [index for index, draw in enumerate(draws) if draw is None]
    wanted = [(index, draw) for index, draw in enumerate(draws) if draw is not None]
    if wanted:
        places = np.array([index for index, _ in wanted], np.int64)
        mine = scores if len(wanted) == len(draws) else scores[places]
        parameters = np.array([draw.parameters for _, draw in wanted], np.float64)
        tokens, status = backend.sample(
            mine, parameters, _mask([draw for _, draw in wanted], scores.shape[1])
        )
        for index, token, state in zip(places, tokens, status, strict=True):
            found[index] = int(token)
            if state:
                left.append(int(index))
    if left:
        for index, row in zip(left, on_host(scores[np.array(left, np.int64)]), strict=True):
            found[index] = row
    return found


def on_host(scores: Array) -> npt.NDArray[np.float32]:
    """Return logits as an array of this process."""
    if not isinstance(scores, np.ndarray):
        scores = scores.detach().cpu().numpy()
    return np.ascontiguousarray(scores, np.float32)


def _draw(row: StepRow, index: int, takes_masks: bool) -> _Draw | None:
    """Return what chooses the token after a step's row and `index` guesses; None when that takes more."""
    sequence = row.sequence
    params, grammar = sequence.sampler.plain_params, sequence.grammar
    if params is None or params.logprobs is not None:
        return None
    allowed = None
    if grammar is not None:
        # Each guess changes what may follow. Before its trigger a grammar allows all that a token may be.
        if row.draft or (grammar.is_started and not takes_masks):
            return None
        try:
            allowed = grammar.allowed(sequence.max_tokens - sequence.num_output)
        except Exception:  # met again where this sequence alone ends for it: `choice.choose`
            return None
        if allowed is not None and not (allowed.size and takes_masks):
            return None
    number = uniform(sequence.sampler.seed, len(sequence.token_ids) + index) if params.temperature else 0.0
    return _Draw((params.temperature, params.top_k, params.top_p, params.min_p, number), allowed)


def _mask(draws: Sequence[_Draw], vocab_size: int) -> npt.NDArray[np.uint32] | None:
    """Return bits [R, V / 32] of allowed tokens; None when all are."""
    if all(draw.allowed is None for draw in draws):
        return None
    bits = np.zeros((len(draws), -(-vocab_size // 32) * 32), np.bool_)
    for line, draw in zip(bits, draws, strict=True):
        line[slice(None) if draw.allowed is None else draw.allowed] = True
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
