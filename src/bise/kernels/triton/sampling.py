"""One token for each row of logits: temperature, top_k, top_p, min_p and a draw, on the device.

The same token as `engine.sampling` chooses for the same logits and the same random number. Both compute in
float64; their sums and exponentials may differ in the last bits, so a choice that lies within `_MARGIN` of
turning out otherwise is not made here: it is marked as unsure, and left to the processor.

What top_k and top_p keep is a run of tokens in one order, highest score first and ties by lower id: a
threshold, found digit by digit, and a number of tokens at the threshold itself. No row is sorted.
"""

# Kernels are written in Triton's language, whose types are not Python's.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from bise.kernels.triton import EXACT

SURE, UNSURE, BROKEN = 0, 1, 2
"""What became of a row: a token was chosen; rounding might change it; its logits are not finite."""

_MARGIN = tl.constexpr(1e-9)
"""Of the sum of all weights. 2^18 weights, added in any order, differ by less than 1e-10 of their sum. It
stands behind what it is multiplied with: before it, Triton 3.7's interpreter takes no tensor.
"""

_PARAMETERS = 5
"""Temperature, top_k, top_p, min_p, random number."""


@triton.jit
def _scores(logits, at, vocab):
    """Return scores; -0 becomes 0, so that equal scores have equal keys."""
    return tl.load(logits + at, mask=at < vocab, other=0.0) + 0.0


@triton.jit
def _keys(logits, mask, at, vocab, HAS_MASK: tl.constexpr):
    """Return numbers that sort as the scores do; 0 for tokens that are not allowed."""
    allowed = at < vocab
    if HAS_MASK:
        bits = tl.load(mask + at // 32, mask=at < vocab, other=0)
        allowed = allowed & ((bits >> (at % 32)) & 1 == 1)
    raw = _scores(logits, at, vocab).to(tl.int32, bitcast=True)
    return tl.where(allowed, (raw ^ ((raw >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483649, 0)


@triton.jit
def _weight(weights, at, vocab, key, COUNT: tl.constexpr):
    """Return the weights of tokens; with COUNT 1 for each that is allowed."""
    if COUNT:
        return tl.where(key > 0, 1.0, 0.0).to(tl.float64)
    return tl.load(weights + at, mask=at < vocab, other=0.0)


@triton.jit
def _find(
    logits,
    mask,
    weights,
    vocab,
    goal,
    above,
    COUNT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the highest key from which on upwards the weights (with COUNT: tokens) reach `goal` (with
    `above`: exceed it), the sum strictly above that key, and the weight of one token at it.
    """
    found = tl.zeros((), tl.int64)
    for digit in range(16):
        step = tl.full((), 1, tl.int64) << (30 - 2 * digit)
        first = tl.zeros((), tl.float64)
        second = tl.zeros((), tl.float64)
        third = tl.zeros((), tl.float64)
        for low in range(0, vocab, BLOCK):
            at = low + tl.arange(0, BLOCK)
            key = _keys(logits, mask, at, vocab, HAS_MASK)
            weight = _weight(weights, at, vocab, key, COUNT)
            first += tl.sum(tl.where(key >= found + step, weight, 0.0), 0)
            second += tl.sum(tl.where(key >= found + 2 * step, weight, 0.0), 0)
            third += tl.sum(tl.where(key >= found + 3 * step, weight, 0.0), 0)
        by_first = (first > goal) | ((first == goal) & (above == 0))
        by_second = (second > goal) | ((second == goal) & (above == 0))
        by_third = (third > goal) | ((third == goal) & (above == 0))
        found += step * (by_first.to(tl.int64) + by_second.to(tl.int64) + by_third.to(tl.int64))
    beyond = tl.zeros((), tl.float64)
    one = tl.zeros((), tl.float64)
    for low in range(0, vocab, BLOCK):
        at = low + tl.arange(0, BLOCK)
        key = _keys(logits, mask, at, vocab, HAS_MASK)
        weight = _weight(weights, at, vocab, key, COUNT)
        beyond += tl.sum(tl.where(key > found, weight, 0.0), 0)
        one = tl.maximum(one, tl.max(tl.where(key == found, weight, 0.0), 0))
    return found, beyond, one


@triton.jit
def _cut(logits, mask, weights, vocab, threshold, number, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Keep the weights above a key and of the first `number` tokens at it that have one; return their sum."""
    total = tl.zeros((), tl.float64)
    seen = tl.zeros((), tl.int32)
    for low in range(0, vocab, BLOCK):
        at = low + tl.arange(0, BLOCK)
        key = _keys(logits, mask, at, vocab, HAS_MASK)
        weight = tl.load(weights + at, mask=at < vocab, other=0.0)
        tied = ((key == threshold) & (weight > 0.0)).to(tl.int32)
        rank = seen + tl.cumsum(tied, 0) - tied
        seen += tl.sum(tied, 0)
        weight = tl.where((key > threshold) | ((key == threshold) & (rank < number)), weight, 0.0)
        tl.store(weights + at, weight, mask=at < vocab)
        total += tl.sum(weight, 0)
    tl.debug_barrier()
    return total


@triton.jit
def _nth_of_key(
    logits,
    mask,
    weights,
    vocab,
    wanted,
    number,
    COUNT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the id of the `number`-th token, from zero, that has the key `wanted` and a weight."""
    seen = tl.zeros((), tl.int32)
    found = tl.full((), 0x7FFFFFFF, tl.int32)
    for low in range(0, vocab, BLOCK):
        at = low + tl.arange(0, BLOCK)
        key = _keys(logits, mask, at, vocab, HAS_MASK)
        weight = _weight(weights, at, vocab, key, COUNT)
        tied = ((key == wanted) & (weight > 0.0)).to(tl.int32)
        rank = seen + tl.cumsum(tied, 0) - tied
        seen += tl.sum(tied, 0)
        found = tl.minimum(found, tl.min(tl.where((tied == 1) & (rank == number), at, 0x7FFFFFFF), 0))
    return found


@triton.jit
def _draw_by_id(weights, vocab, goal, BLOCK: tl.constexpr):
    """Return the first id at which the running sum of the weights exceeds `goal`, and the distance of the
    nearest running sum from it.
    """
    running = tl.zeros((), tl.float64)
    found = tl.full((), 0x7FFFFFFF, tl.int32)
    nearest = tl.full((), float("inf"), tl.float64)
    for low in range(0, vocab, BLOCK):
        at = low + tl.arange(0, BLOCK)
        weight = tl.load(weights + at, mask=at < vocab, other=0.0)
        sums = running + tl.cumsum(weight, 0)
        found = tl.minimum(found, tl.min(tl.where((sums > goal) & (weight > 0.0), at, 0x7FFFFFFF), 0))
        nearest = tl.minimum(nearest, tl.min(tl.where(weight > 0.0, tl.abs(sums - goal), float("inf")), 0))
        running += tl.sum(weight, 0)
    return found, nearest


@triton.jit
def _weigh(logits, mask, weights, vocab, highest, temperature, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Store the weights, the powers of the tempered scores, 1 for the best; return their sum."""
    total = tl.zeros((), tl.float64)
    for low in range(0, vocab, BLOCK):
        at = low + tl.arange(0, BLOCK)
        key = _keys(logits, mask, at, vocab, HAS_MASK)
        score = _scores(logits, at, vocab).to(tl.float64)
        weight = tl.where(key > 0, tl.exp((score - highest.to(tl.float64)) / temperature), 0.0)
        total += tl.sum(weight, 0)
        tl.store(weights + at, weight, mask=at < vocab)
    tl.debug_barrier()
    return total


@triton.jit
def _cut_top_p(logits, mask, weights, vocab, goal, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Keep the fewest best tokens whose weights reach `goal`; return their sum, and how far the border is
    from one that keeps another number of tokens.
    """
    threshold, beyond, one = _find(logits, mask, weights, vocab, goal, 0, False, HAS_MASK, BLOCK)
    ties = tl.maximum(tl.ceil((goal - beyond) / one), 1.0)
    away = tl.minimum(tl.abs(beyond + ties * one - goal), tl.abs(beyond + (ties - 1.0) * one - goal))
    return _cut(logits, mask, weights, vocab, threshold, ties.to(tl.int32), HAS_MASK, BLOCK), away


@triton.jit
def _cut_min_p(weights, vocab, min_p, BLOCK: tl.constexpr):
    """Keep weights of at least `min_p`; return their sum, and the distance of the nearest one from it."""
    near = tl.full((), float("inf"), tl.float64)
    total = tl.zeros((), tl.float64)
    for low in range(0, vocab, BLOCK):
        at = low + tl.arange(0, BLOCK)
        weight = tl.load(weights + at, mask=at < vocab, other=0.0)
        near = tl.minimum(near, tl.min(tl.abs(weight - min_p), 0))
        weight = tl.where(weight >= min_p, weight, 0.0)
        total += tl.sum(weight, 0)
        tl.store(weights + at, weight, mask=at < vocab)
    tl.debug_barrier()
    return total, near


@triton.jit
def _draw_by_score(logits, mask, weights, vocab, goal, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Return the first token, best first, at which the running sum of the weights exceeds `goal`, and the
    distance of the nearest running sum from it.
    """
    key, beyond, one = _find(logits, mask, weights, vocab, goal, 1, False, HAS_MASK, BLOCK)
    ties = tl.maximum(tl.floor((goal - beyond) / one), 0.0)
    away = tl.abs(beyond + (ties + 1.0) * one - goal)
    # Nothing lies below the first token: a random number of zero is sure of it.
    if beyond + ties > 0.0:
        away = tl.minimum(away, tl.abs(beyond + ties * one - goal))
    return _nth_of_key(logits, mask, weights, vocab, key, ties.to(tl.int32), False, HAS_MASK, BLOCK), away


@triton.jit
def _choose(
    logits, mask, weights, vocab, highest, count, temperature, top_k, top_p, min_p, share,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return a token, and whether rounding might change it."""
    state = tl.zeros((), tl.int32)
    total = _weigh(logits, mask, weights, vocab, highest, temperature, HAS_MASK, BLOCK)
    by_score = (top_k > 0.0) & (top_k < count.to(tl.float64))
    if by_score:
        threshold, beyond, _one = _find(logits, mask, weights, vocab, top_k, 0, True, HAS_MASK, BLOCK)
        number = (top_k - beyond).to(tl.int32)
        total = _cut(logits, mask, weights, vocab, threshold, number, HAS_MASK, BLOCK)
    if top_p < 1.0:
        before = total
        total, away = _cut_top_p(logits, mask, weights, vocab, top_p * total, HAS_MASK, BLOCK)
        state = tl.where(away < before * _MARGIN, 1, state)
    if min_p > 0.0:
        total, near = _cut_min_p(weights, vocab, min_p, BLOCK)
        # The best weight is 1 in both computations.
        state = tl.where((near < min_p * _MARGIN) & (min_p < 1.0), 1, state)
    if by_score:
        token, away = _draw_by_score(logits, mask, weights, vocab, share * total, HAS_MASK, BLOCK)
    else:
        token, away = _draw_by_id(weights, vocab, share * total, BLOCK)
    return token, tl.where((away < total * _MARGIN) | (token >= vocab), 1, state)


@triton.jit(do_not_specialize=["tokens", "status"])
def _sample(
    logits, stride, mask, mask_stride, parameters, weights, tokens, status, vocab,
    HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row): choose a token."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    mask += row * mask_stride
    weights += row * vocab
    parameters += row * 5
    temperature = tl.load(parameters)
    best = tl.zeros((), tl.int64)
    count = tl.zeros((), tl.int32)
    broken = tl.zeros((), tl.int32)
    highest = tl.full((), float("-inf"), tl.float32)
    for low in range(0, vocab, BLOCK):
        at = low + tl.arange(0, BLOCK)
        key = _keys(logits, mask, at, vocab, HAS_MASK)
        score = _scores(logits, at, vocab)
        broken += tl.sum(tl.where(tl.abs(score) <= 3.4028234663852886e38, 0, 1), 0)  # NaN too
        count += tl.sum((key > 0).to(tl.int32), 0)
        best = tl.maximum(best, tl.max(key, 0))
        highest = tl.maximum(highest, tl.max(tl.where(key > 0, score, float("-inf")), 0))
    token = tl.zeros((), tl.int32)
    state = tl.zeros((), tl.int32)
    if (broken > 0) | (count == 0):
        state += 2
    elif temperature == 0.0:
        token = _nth_of_key(logits, mask, weights, vocab, best, 0, True, HAS_MASK, BLOCK)
    else:
        token, state = _choose(
            logits, mask, weights, vocab, highest, count, temperature, tl.load(parameters + 1),
            tl.load(parameters + 2), tl.load(parameters + 3), tl.load(parameters + 4), HAS_MASK, BLOCK,
        )  # fmt: skip
    tl.store(tokens + row, token)
    tl.store(status + row, state)


def sample(
    logits: Tensor, parameters: npt.NDArray[np.float64], mask: npt.NDArray[np.uint32] | None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Choose a token for each row of logits [R, V] (float32, on the device); returns tokens and `SURE`,
    `UNSURE` or `BROKEN` [R].

    `parameters` [R, 5] are temperature (0: the best), top_k (0: off), top_p, min_p and a random number in
    [0, 1). Bit t % 32 of `mask`[r, t / 32] allows token t.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    assert parameters.shape == (rows, _PARAMETERS)
    device = logits.device
    sent = torch.from_numpy(parameters).to(device)  # pyright: ignore[reportUnknownMemberType]
    allowed = sent if mask is None else torch.from_numpy(mask.view(np.int32)).to(device)  # pyright: ignore[reportUnknownMemberType]
    weights = torch.empty((rows, vocab), dtype=torch.float64, device=device)
    found = torch.empty((2, rows), dtype=torch.int32, device=device)
    _sample[(rows,)](
        logits, logits.stride(0), allowed, 0 if mask is None else mask.shape[1], sent, weights, found[0],
        found[1], vocab, HAS_MASK=mask is not None, BLOCK=min(triton.next_power_of_2(vocab), 4096),
        num_warps=8, **EXACT,
    )  # fmt: skip
    tokens, status = found.cpu().numpy()
    return tokens, status
