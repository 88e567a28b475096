"""Logits to token ids: finite check, penalties, temperature, truncation, one draw, log-probs. numpy only.

Every function works on one row alone, in float64 once anything but the highest logit matters, so a sequence's
tokens and log-probs do not depend on who shares the batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from bise.engine.request import SamplingParams, TokenLogprob
from bise.errors import NonFiniteError, RequestError

Row = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]

_NUM_ROWS = 32
"""Parts of a row of logits that `largest` compares with one another."""

_NUM_BINS = 2048
_NARROWEST = 1e-300
"""A span of keys that cannot be divided into bins: what is divided by less may overflow."""
_WIDEST = 32.0
"""Tempered scores further than this from the best one share the last bin of `smallest_set`: e^-32 is a weight
of nothing.
"""


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on (seed, position) alone: 53 bits of BLAKE2b over both."""
    counter = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(counter, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def check_finite(logits: Row) -> None:
    """Raise NonFiniteError when a row of logits [V] holds NaN or an infinity."""
    # Both reductions hand NaN on, so two fast passes see everything.
    if not (math.isfinite(logits.max()) and math.isfinite(logits.min())):
        raise NonFiniteError(
            f"the model produced {int(np.count_nonzero(~np.isfinite(logits)))} non-finite logits of "
            f"{logits.size}; its weights or the arithmetic are broken"
        )


def token_logprob(logits: Row, token_id: int, num_top: int) -> TokenLogprob:
    """Return the natural log-prob of `token_id` under softmax(logits [V]), and the `num_top` most likely
    tokens.
    """
    wide = logits.astype(np.float64)
    best = wide.max()
    # The sum is numpy's pairwise one over a fresh contiguous row: the same bits for the same row, always.
    log_total = best + math.log(np.exp(wide - best).sum())
    top = tuple((int(index), float(wide[index] - log_total)) for index in largest(wide, num_top))
    return TokenLogprob(token_id, float(wide[token_id] - log_total), top)


def largest(values: Wide, count: int) -> Ids:
    """Return the indices of the `count` largest values, largest first, ties to the lower index."""
    if count <= 0:
        return np.zeros(0, np.intp)
    if count >= values.size:
        return np.argsort(-values, kind="stable")
    near = np.flatnonzero(values >= _floor(values, count))
    return near[np.argsort(-values[near], kind="stable")[:count]]


def _floor(values: Wide, count: int) -> float:
    """Return a number that at least `count` values reach, and not many more."""
    # `count` of the columns' maxima reach their count-th largest, so as many values do. That is one pass
    # over the row; to partition all of it takes ten times as long (32,000 values: 300 us on a Zen 4).
    columns = values.size // _NUM_ROWS
    if columns > count:
        values = values[: columns * _NUM_ROWS].reshape(_NUM_ROWS, columns).max(axis=0)
    return float(np.partition(values, values.size - count)[values.size - count])


def smallest_set(keys: Wide, weights: Wide, mass: float, widest: float = _WIDEST) -> Ids:
    """Return, ascending, the fewest indices by ascending key (ties: lower index) whose weights reach `mass`
    of all.

    Weights are summed per bin of keys, and only the bin in which the mass is reached gets sorted, so that a
    vocabulary of 128k takes a few passes and no sort. Keys `widest` and more from the lowest share a bin.
    """
    goal = mass * float(weights.sum())
    lowest = float(keys.min())
    span = min(float(keys.max()) - lowest, widest)
    if span < _NARROWEST:
        span = 1.0
    bins = np.minimum((keys - lowest) * ((_NUM_BINS - 1) / span), _NUM_BINS - 1).astype(np.intp)
    running = np.cumsum(np.bincount(bins, weights, _NUM_BINS))
    last = min(int(np.searchsorted(running, goal)), _NUM_BINS - 1)
    inside = np.flatnonzero(bins == last)
    order = inside[np.argsort(keys[inside], kind="stable")]
    reached = np.cumsum(weights[order]) + (running[last - 1] if last else 0.0)
    kept = bins < last
    kept[order[: int(np.searchsorted(reached, goal)) + 1]] = True
    return np.flatnonzero(kept)


def truncate(scores: Wide, params: SamplingParams) -> tuple[Ids | None, Wide]:
    """Apply temperature, top_k, top_p, min_p and typical_p, each on what the one before left.

    `scores` [V] are logits with penalties; they are used up. Returns (ids kept, their weights, 1 for the
    best); ids None means all. Compared with transformers' warpers, ties are cut at the count that was asked
    for, lower ids first. The order is that of the scores themselves: less their maximum, two that differ
    may round to one number, and a backend that sorts logits would see a tie here that it cannot see.
    """
    ids: Ids | None = None
    if 0 < params.top_k < scores.size:
        ids = largest(scores, params.top_k)
        scores = scores[ids]
    # In place where nobody needs the scores any more: a fresh row of a vocabulary costs more in page faults
    # than the arithmetic on it.
    needs_scores = params.top_p < 1 or params.typical_p < 1
    weights = np.subtract(scores, scores.max(), out=None if needs_scores else scores)
    weights /= params.temperature
    np.exp(weights, out=weights)
    if params.top_p < 1:
        kept = smallest_set(-scores, weights, params.top_p, _WIDEST * params.temperature)
        ids, scores, weights = _narrow(ids, kept), scores[kept], weights[kept]
    if params.min_p > 0:
        kept = np.flatnonzero(weights >= params.min_p * weights.max())
        ids, scores, weights = _narrow(ids, kept), scores[kept], weights[kept]
    if params.typical_p < 1:
        kept = _typical_set((scores - scores.max()) / params.temperature, weights, params.typical_p)
        ids, weights = _narrow(ids, kept), weights[kept]
    return ids, weights


def _narrow(ids: Ids | None, kept: Ids) -> Ids:
    return kept if ids is None else ids[kept]


def _typical_set(scores: Wide, weights: Wide, mass: float) -> Ids:
    """Return the tokens whose surprise is nearest to the entropy, up to `mass` (arXiv 2202.00666, section
    4).
    """
    possible = np.flatnonzero(weights)
    weights = weights[possible]
    total = weights.sum()
    surprise = math.log(total) - scores[possible]
    entropy = float((weights * surprise).sum() / total)
    return possible[smallest_set(np.abs(surprise - entropy), weights, mass)]


def pick(running: Wide, share: float) -> int:
    """Return the index at which `running`, the running sum of weights, first exceeds `share` (in [0, 1)) of
    its last value.
    """
    total = float(running[-1])
    # share * total may round up to the total, which no running sum exceeds.
    goal = min(share * total, math.nextafter(total, 0.0))
    return int(np.searchsorted(running, goal, side="right"))


class Sampler:
    """Chooses the tokens of one sequence; remembers what penalties need."""

    __slots__ = (
        "_bias_ids",
        "_bias_values",
        "_counts",
        "_is_plain",
        "_masked_ids",
        "_params",
        "_seen",
        "seed",
    )

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        prompt: Sequence[int],
        stop_ids: Iterable[int],
        seed: int,
    ) -> None:
        """Sample as `params` say with `seed`; `stop_ids` stay masked until `params.min_tokens` were produced.

        Raises RequestError for a token id outside the vocabulary or when everything would be masked.
        """
        self._params = params
        self.seed = seed
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if (highest := max(ids, default=0)) >= vocab_size:
                raise RequestError(
                    f"{name}: token {highest} is outside the vocabulary of {vocab_size}", field=name
                )
        self._bias_ids = np.fromiter(params.logit_bias.keys(), np.intp)
        self._bias_values = np.fromiter(params.logit_bias.values(), np.float64)
        self._masked_ids = np.array(sorted(set(stop_ids)) if params.min_tokens else [], np.intp)
        if self._masked_ids.size >= vocab_size:
            raise RequestError("min_tokens cannot be kept: every token is a stop token", field="min_tokens")
        self._seen = np.zeros(vocab_size if params.repetition_penalty != 1 else 0, np.bool_)
        counted = params.presence_penalty or params.frequency_penalty
        self._counts = np.zeros(vocab_size if counted else 0, np.float64)
        if self._seen.size:
            self._seen[np.array(prompt, np.intp)] = True
        self._is_plain = not (
            self._seen.size or self._counts.size or self._bias_ids.size or self._masked_ids.size
        )

    @property
    def plain_params(self) -> SamplingParams | None:
        """The parameters, where a choice takes nothing but them, the logits and `uniform`, in an order of
        tokens that the scores give; else None.
        """
        return self._params if self._is_plain and self._params.typical_p >= 1 else None

    def accept(self, token_id: int) -> None:
        """Count a token that became part of the output."""
        if self._seen.size:
            self._seen[token_id] = True
        if self._counts.size:
            self._counts[token_id] += 1

    def choose(self, logits: Row, position: int, num_output: int, allowed: Ids | None = None) -> int:
        """Return the token for `position` (absolute), the output's `num_output`-th from zero, given logits
        [V], out of `allowed` (ascending; None: all).

        Raises NonFiniteError. Changes nothing: `accept` does.
        """
        check_finite(logits)
        if allowed is None:
            return self._pick(logits, position, num_output, None)
        return int(allowed[self._pick(logits, position, num_output, allowed)])

    def _pick(self, logits: Row, position: int, num_output: int, allowed: Ids | None) -> int:
        """Return the index of the choice, in `allowed` where that is given."""
        params = self._params
        if self._is_plain and params.temperature == 0:
            return int((logits if allowed is None else logits[allowed]).argmax())
        if self._is_plain and allowed is not None:
            scores = logits[allowed].astype(np.float64)
        else:
            scores = logits.astype(np.float64)
            if not self._is_plain:
                self._adjust(scores, num_output)
            if allowed is not None:
                scores = scores[allowed]
                if np.isneginf(scores).all():  # a grammar that can only end comes before min_tokens
                    scores = logits[allowed].astype(np.float64)
        if params.temperature == 0:
            return int(scores.argmax())
        with np.errstate(over="ignore"):  # at a tiny temperature all but the best are infinitely far away
            ids, weights = truncate(scores, params)
        index = pick(np.cumsum(weights, out=weights), uniform(self.seed, position))
        return index if ids is None else int(ids[index])

    def _adjust(self, scores: Wide, num_output: int) -> None:
        """Apply bias, penalties and the stop mask to `scores` [V] in place."""
        params = self._params
        if self._bias_ids.size:
            scores[self._bias_ids] += self._bias_values
        if self._seen.size:
            seen = np.flatnonzero(self._seen)
            values = scores[seen]
            scores[seen] = np.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        if self._counts.size:
            scores -= self._counts * params.frequency_penalty + (self._counts > 0) * params.presence_penalty
        if num_output < params.min_tokens:
            scores[self._masked_ids] = -np.inf
