"""What tests of every backend share."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from bise.engine.request import SamplingParams
from bise.engine.sampling import Sampler, uniform

SURE, UNSURE = 0, 1
NEARLY_EQUAL = np.array([[0.0, 4e-17, 1.0, 0.5, 3e-17]], np.float32)
"""Less the best, as the sampler weighs them, three of these are one number; their order is still theirs."""
WAYS = [
    {"temperature": 0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.8, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
]


def _check_nearly_equal(sample):
    ways = [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.8}]
    ways = [{"temperature": 3.0, **way} for way in ways * 4]
    assert _check(sample, NEARLY_EQUAL.repeat(len(ways), 0), ways) == 0


def _rows(vocab, count, seed, width=3.0):
    """Return logits [count, vocab]: plain ones, and ones full of equal values."""
    logits = (np.random.default_rng(seed).standard_normal((count, vocab)) * width).astype(np.float32)
    logits[1::3] = np.round(logits[1::3])
    return logits


def _numbers(ways, position):
    """Return what a backend is told of each way of choosing; the seed is its place."""
    every = [SamplingParams(**way) for way in ways]
    return np.array(
        [(p.temperature, p.top_k, p.top_p, p.min_p, uniform(i, position)) for i, p in enumerate(every)]
    )


def _check(sample, logits, ways, mask=None, position=9):
    """Assert that every row gets the sampler's token or is left to it; return how many are left."""
    packed = None
    if mask is not None:
        padded = np.pad(mask, ((0, 0), (0, -mask.shape[1] % 32)))
        packed = np.packbits(padded, axis=1, bitorder="little").view(np.uint32)
    tokens, status = sample(logits, _numbers(ways, position), packed)
    for index, way in enumerate(ways):
        if status[index] == UNSURE:
            continue
        assert status[index] == SURE
        params = SamplingParams(**way)
        sampler = Sampler(params, vocab_size=logits.shape[1], prompt=[0], stop_ids=[], seed=index)
        allowed = None if mask is None else np.flatnonzero(mask[index])
        assert tokens[index] == sampler.choose(logits[index], position, 0, allowed), (index, way)
    return int((status == UNSURE).sum())


@pytest.fixture(scope="session")
def choosing():
    """Ways of choosing tokens, logits, what a backend is told, and its tokens against the sampler's."""
    return SimpleNamespace(
        ways=WAYS, rows=_rows, numbers=_numbers, check=_check, check_nearly_equal=_check_nearly_equal
    )
